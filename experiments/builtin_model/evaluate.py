"""Retrieval of a model with its own attention and with this library's patterns.

Example, 20 prompts of each kind at two lengths:

    python experiments/builtin_model/evaluate.py --lengths 4096 16384 --samples 20 --json out.json

Prompts come from flex_prefill.retrieval, so `--model` can be any causal model of transformers that
can read them. Prefill runs under the pattern; the answer is decoded greedily with the model's own
attention. The printed density is kept blocks / causal blocks, mean over layers, heads and prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from flex_prefill import collect_audits, patch_model, retrieval, unpatch_model
from flex_prefill.cli.common import cache_of
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("dense", "flex_prefill", "streaming_llm", "vertical_slash", "flash")
REPLY_TOKENS = 8


def has_bf16_products() -> bool:
    """Whether PyTorch multiplies bf16 matrices in hardware on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompt: str) -> tuple[str, float]:
    """The model's greedy reply and the seconds to its first token."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    start = time.perf_counter()
    out = model(tokens, use_cache=True, logits_to_keep=1)
    reply = [out.logits[0, -1].argmax().item()]
    seconds = time.perf_counter() - start
    while len(reply) < REPLY_TOKENS and reply[-1] != tokenizer.eos_token_id:
        token = torch.tensor([[reply[-1]]], device=model.device)
        out = model(token, use_cache=True, **cache_of(out))
        reply.append(out.logits[0, -1].argmax().item())
    return tokenizer.decode(reply), seconds


def configuration(pattern: str, options: argparse.Namespace) -> dict[str, Any]:
    """What patch_model gets for a pattern."""
    if pattern == "flex_prefill":
        return {
            "flex_prefill_gamma": options.gamma,
            "flex_prefill_tau": options.tau,
            "flex_prefill_min_budget": options.min_budget,
        }
    if pattern == "streaming_llm":
        return {"global_window": options.global_window, "local_window": options.local_window}
    return {}


def evaluate(
    model: Any, tokenizer: Any, kind: str, length: int, pattern: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy, density and median time to first token over the prompts of a kind."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    settings = configuration(pattern, options)
    unpatch_model(model)
    if pattern != "dense":
        patch_model(model, pattern, settings)
    right, seconds, densities = [], [], []
    label = f"{length} {kind} {pattern}"
    for seed in tqdm(range(options.samples), desc=label, leave=False):
        prompt, expected = retrieval.make_prompt(kind, length, seed, count)
        with collect_audits() as audits:
            reply, taken = answer(model, tokenizer, prompt)
        right.append(retrieval.is_correct(reply, expected))
        seconds.append(taken)
        densities += [audit.mean_density for _, audit in audits]
    unpatch_model(model)
    return {
        "length": length,
        "kind": kind,
        "pattern": pattern,
        "settings": settings,
        "accuracy": sum(right) / len(right),
        "density": sum(densities) / len(densities) if densities else 1.0,
        "seconds_to_first_token": sorted(seconds)[len(seconds) // 2],
    }


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Machine, commit and command."""
    git = ["git", "rev-parse", "--verify", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, cwd=ROOT)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, Python {platform.python_version()}",
        "commit": head.stdout.strip() or "unknown",
        "command": " ".join(["python", "experiments/builtin_model/evaluate.py", *sys.argv[1:]]),
        "samples": options.samples,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shipped = ROOT / "models" / "needle-7m"
    parser.add_argument("--model", default=str(shipped), help="folder or name (default: built-in)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16_384])
    parser.add_argument(
        "--kinds", nargs="+", choices=retrieval.KINDS, default=list(retrieval.KINDS)
    )
    parser.add_argument(
        "--patterns",
        nargs="+",
        choices=PATTERNS,
        default=["dense", "flex_prefill", "streaming_llm"],
        help="dense is the model's own attention, flash this library's with every block",
    )
    parser.add_argument("--gamma", type=float, default=0.9, help="of flex_prefill (default 0.9)")
    parser.add_argument("--tau", type=float, default=0.1, help="of flex_prefill (default 0.1)")
    parser.add_argument("--min-budget", type=int, default=1024, help="in tokens (default 1024)")
    parser.add_argument("--global-window", type=int, default=1024, help="of streaming_llm")
    parser.add_argument("--local-window", type=int, default=8192, help="of streaming_llm")
    parser.add_argument("--samples", type=int, default=20, help="prompts of each kind and length")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: the weights' own, but float32 on a CPU without bf16 products, where PyTorch's "
        "bf16 layers are several times slower",
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dtype = options.dtype
    if dtype == "auto" and options.device == "cpu" and not has_bf16_products():
        dtype = "float32"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model = model.to(options.device).eval()
    results = provenance(options) | {"dtype": str(model.dtype)} | {"results": []}
    print(f"{'tokens':>6}  {'kind':10}  {'pattern':14}  right  density  first token")
    for length in options.lengths:
        for kind in options.kinds:
            for pattern in options.patterns:
                row = evaluate(model, tokenizer, kind, length, pattern, options)
                print(
                    f"{length:6}  {kind:10}  {pattern:14}  {row['accuracy']:5.3f}  "
                    f"{row['density']:7.3f}  {row['seconds_to_first_token']:9.2f} s",
                    flush=True,
                )
                results["results"].append(row)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
