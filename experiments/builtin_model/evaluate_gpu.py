"""Retrieval of the built-in model under PyTorch-only patterns, batched, on a GPU.

    python experiments/builtin_model/evaluate_gpu.py --model models/needle-7m --json out.json

`evaluate.py` measures the same prompts through the library. Here the blocks come from sparse.py
and attention over them from flex_attention. As with the library, the prompt is prefilled under the
pattern and the answer is decoded with dense attention. Answers are checked with the right digits
fed back in, which gives the same verdict as greedy decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import sparse
import torch
import torch.nn.functional as F
from common import ROOT, retrieval
from model import Llama, restore
from tokenizers import Tokenizer
from torch import Tensor
from train import dense

BLOCK = 128
BATCH = 10


@cache
def load_tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


def tokenized_prompt(
    folder: str, kind: str, length: int, seed: int
) -> tuple[list[int], list[int], float]:
    """Tokens of a prompt and of its answer with its end, and the depth of the needle in [0, 1]."""
    tokenizer = load_tokenizer(folder)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    prompt, answer = retrieval.make_prompt(kind, length, seed, count)
    depth = prompt.index(f" {answer}") / len(prompt)
    end = tokenizer.encode(answer + ".\n\n", add_special_tokens=False).ids
    return tokenizer.encode(prompt).ids, end, depth


class Run:
    """One batch under one pattern: prefill, then the answer; keeps what was selected."""

    def __init__(self, model: Llama, pattern, masked: bool = False) -> None:
        self.model, self.pattern = model, pattern
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.selections: list[sparse.Selection] = []
        self.sparse_attend = sparse.attend_masked if masked else sparse.attend

    def prefill_attend(self, lengths: Tensor, layer: int, q, k, v):
        self.cache.append((k, v))
        if self.pattern is None:
            return dense(layer, q, k, v)
        selection = sparse.select(q, k, lengths, self.pattern)
        self.selections.append(selection)
        return self.sparse_attend(q, k, v, selection.kept, BLOCK)

    def decode_attend(self, lengths: Tensor, layer: int, q, k, v):
        past_k, past_v = self.cache[layer]
        group, rows = q.shape[2] // k.shape[2], q.shape[1]
        k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
        k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
        past = torch.arange(past_k.shape[1], device=q.device) < lengths[:, None, None]
        own = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
        mask = torch.cat([past.expand(-1, rows, -1), own.expand(len(q), -1, -1)], -1)[:, None]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        return out.transpose(1, 2)

    @torch.no_grad()
    def predict(self, prompts: list[list[int]], answers: list[list[int]], length: int) -> Tensor:
        """Predicted token for each token of the answers [b, answer length]."""
        device = self.model.weight("norm").device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        tokens = torch.tensor([p + [0] * (length - len(p)) for p in prompts], device=device)
        positions = torch.arange(length, device=device).expand_as(tokens)
        hidden = self.model(tokens, positions, partial(self.prefill_attend, lengths))
        last = hidden.view(len(prompts), length, -1)[torch.arange(len(prompts)), lengths - 1]
        first = self.model.logits(last).argmax(-1)[:, None]
        fed = torch.tensor(answers, device=device)[:, :-1]
        positions = lengths[:, None] + torch.arange(fed.shape[1], device=device)
        hidden = self.model(fed, positions, partial(self.decode_attend, lengths))
        rest = self.model.logits(hidden).argmax(-1).view(len(prompts), -1)
        return torch.cat([first, rest], 1)


def evaluate(model: Llama, prompts, length: int, pattern) -> dict:
    """Accuracy, density and the heads' figures over prompts (tokens, answer, depth)."""
    right, first_digit, density, jsd, aware = [], [], [], [], []
    for i in range(0, len(prompts), BATCH):
        tokens, answers, _ = zip(*prompts[i : i + BATCH], strict=True)
        run = Run(model, pattern)
        predicted = run.predict(list(tokens), list(answers), length).cpu()
        expected = torch.tensor(answers)
        right += (predicted == expected).all(1).tolist()
        first_digit += (predicted[:, 0] == expected[:, 0]).tolist()
        if run.selections:
            density.append(torch.stack([s.density() for s in run.selections], 1).cpu())
            jsd.append(torch.stack([s.jsd_sqrt for s in run.selections], 1).cpu())
            aware.append(torch.stack([s.query_aware for s in run.selections], 1).float().cpu())
    result = {"accuracy": sum(right) / len(right), "first_digit": sum(first_digit) / len(right)}
    middle = [r for r, (_, _, depth) in zip(right, prompts, strict=True) if 0.1 < depth < 0.4]
    result["accuracy_depth_10_to_40"] = sum(middle) / max(1, len(middle))
    if density:
        heads = {"density": density, "jsd_sqrt": jsd, "query_aware": aware}
        per_head = {name: torch.cat(values).mean(0) for name, values in heads.items()}
        result["density"] = per_head["density"].mean().item()
        result["heads"] = {
            name: [[round(x, 4) for x in layer] for layer in value.tolist()]
            for name, value in per_head.items()
        }
    return result


def patterns(flex: list[str]) -> dict:
    """The patterns to compare, by name; flex holds gamma:min_budget."""
    result = {"dense": None}
    for text in flex:
        gamma, budget = text.split(":")
        name = f"flex_prefill gamma {gamma} min_budget {budget}"
        result[name] = sparse.FlexPrefill(float(gamma), 0.1, int(budget))
    result["streaming_llm 1024 + 8192"] = sparse.StreamingLLM(1024, 8192)
    result["streaming_llm 1024 + 2048"] = sparse.StreamingLLM(1024, 2048)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "needle-7m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16_384])
    parser.add_argument("--kinds", nargs="+", default=list(retrieval.KINDS))
    parser.add_argument(
        "--flex", nargs="+", default=["0.9:1024", "0.95:1024", "0.9:512"], help="gamma:min_budget"
    )
    parser.add_argument("--samples", type=int, default=100, help="prompts of each kind and length")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()

    start = time.monotonic()
    model = Llama().cuda()
    restore(model, options.model)
    head = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    results = {
        "machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "commit": head.stdout.strip() or "unknown",
        "command": " ".join(["python", "experiments/builtin_model/evaluate_gpu.py", *sys.argv[1:]]),
        "samples": options.samples,
        "results": [],
    }
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            (kind, length): [
                pool.submit(tokenized_prompt, str(options.model), kind, length, seed)
                for seed in range(options.samples)
            ]
            for length in options.lengths
            for kind in options.kinds
        }
        for (kind, length), futures in jobs.items():
            prompts = [future.result() for future in futures]
            for name, pattern in patterns(options.flex).items():
                result = evaluate(model, prompts, length, pattern)
                print(
                    f"{time.monotonic() - start:6.1f} s  {length:5d}  {kind:10s} {name:36s}"
                    f"  right {result['accuracy']:.3f}  first digit {result['first_digit']:.3f}"
                    f"  depth .1 to .4 {result['accuracy_depth_10_to_40']:.3f}"
                    f"  density {result.get('density', 1.0):.3f}",
                    flush=True,
                )
                labels = {"length": length, "kind": kind, "pattern": name}
                results["results"].append(labels | result)
                if options.json:
                    options.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
