"""Time to first token of a transformers model on a GPU, dense and sparse, and attention's share.

A prefill is what `generate` does before its first token: one forward pass over the prompt that
fills a cache and computes the logits of the last token alone. Each length is read with torch's
attention (cuDNN's kernel and FlashAttention-2's) and with FlexPrefill patched in, in turn and in
one process; medians. Attention's share comes from CUDA events around every layer's attention
function; it counts what the function does, selection included. Up to 32k tokens a prefill that is
not timed comes first.

--shape builds a model with random weights in the shape of a known one: nothing is downloaded. Time
outside attention does not depend on the weights, but which blocks are kept does. Random weights
attend to everything, so that FlexPrefill keeps nearly all blocks of them; --pattern vertical_slash
with sizes of its own shows what a density that real models have gives. The density that was
measured is printed and written beside each time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flex_prefill
import torch
from flex_prefill.cli.common import (
    CommandError,
    add_pattern_arguments,
    format_table,
    load_model,
    pattern_config,
    run_description,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

K = 1024
EXAMPLE = """examples:
  python experiments/gpu/time_to_first_token.py --model models/needle-7m --tokens 8192 16384
  python experiments/gpu/time_to_first_token.py --shape llama-3.1-8b --layers 8 \\
      --tokens 8192 32768 131072 --json ttft.json
  python experiments/gpu/time_to_first_token.py --shape llama-3.1-8b --pattern vertical_slash \\
      --cfg vertical_size=4096 slash_size=8192"""

# Sizes of published models, for random weights.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
}
LONG = 32 * K  # beyond that, the first prefill is timed
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def random_model(shape: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """A Llama of that shape on the device, its weights never on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**sizes, attn_implementation="sdpa")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The first token; the cache is made and dropped."""
    logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1)


class Clock:
    """Milliseconds of calls, on the GPU or (to try the script out) on the CPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def mark(self) -> Any:
        if not self.on_gpu:
            import time

            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if not self.on_gpu:
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)


@contextmanager
def attention_marks(model: Any, clock: Clock) -> Iterator[list[tuple[Any, Any]]]:
    """Collects (start, end) of every call of the model's attention function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    marks: list[tuple[Any, Any]] = []
    name = model.config.get_text_config()._attn_implementation
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = clock.mark()
        result = function(*args, **kwargs)
        marks.append((start, clock.mark()))
        return result

    ALL_ATTENTION_FUNCTIONS[name] = timed
    try:
        yield marks
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = function


def measure(model: Any, ids: torch.Tensor, clock: Clock, repeat: int) -> dict[str, Any]:
    """Times of whole prefills and of the attention in them."""
    if ids.shape[1] <= LONG:
        prefill(model, ids)
    if clock.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times, shares = [], []
    for _ in range(repeat):
        with attention_marks(model, clock) as marks:
            start = clock.mark()
            token = prefill(model, ids)
            times.append(clock.between(start, clock.mark()))
        shares.append(sum(clock.between(*pair) for pair in marks) / times[-1])
    ms, share = statistics.median(times), statistics.median(shares)
    return {
        "ms": ms,
        "times_ms": times,
        "attention_ms": ms * share,
        "attention_share": share,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if clock.on_gpu else None,
        "token": token.tolist(),
    }


def measure_length(
    model: Any, ids: torch.Tensor, args: argparse.Namespace, cfg: dict[str, Any]
) -> dict[str, Any]:
    """All ways to read one prompt."""
    clock = Clock(args.device)
    found: dict[str, Any] = {}
    for name in args.dense:
        backend = DENSE[name]
        try:
            with sdpa_kernel(backend if args.device == "cuda" else SDPBackend.MATH):
                found[name] = measure(model, ids, clock, args.repeat)
        except RuntimeError as error:  # a kernel that this card or shape has not; out of memory
            print(f"  {name}: left out: {str(error).splitlines()[0]}", file=sys.stderr)
        if args.device != "cuda":
            break
    flex_prefill.patch_model(model, args.pattern, cfg)
    try:
        found["sparse"] = measure(model, ids, clock, args.repeat)
        with flex_prefill.collect_audits() as audits:
            prefill(model, ids)
    finally:
        flex_prefill.unpatch_model(model)
    if not audits:
        raise CommandError("no layer was computed by FlexPrefill: see docs/transformers.md")
    found["sparse"]["density"] = statistics.mean(audit.mean_density for _, audit in audits)
    found["sparse"]["layers_computed"] = len(audits)
    for name in DENSE:
        if name in found:
            found["sparse"][f"speedup_over_{name}"] = found[name]["ms"] / found["sparse"]["ms"]
    return {"tokens": ids.shape[1], **found}


def prompt(args: argparse.Namespace, tokenizer: Any, vocabulary: int, n: int) -> torch.Tensor:
    """[1, n] tokens: a document of retrieval.py for a model that can read, otherwise random."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (1, n), generator=generator).to(args.device)
    from flex_prefill.retrieval import make_prompt

    text, _ = make_prompt("single", n, 0, lambda text: len(tokenizer.encode(text)))
    return tokenizer(text, return_tensors="pt").input_ids[:, :n].to(args.device)


def print_table(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        for name in (*DENSE, "sparse"):
            if name not in row:
                continue
            case = row[name]
            peak = case["peak_memory_bytes"]
            over = [
                f"{case[f'speedup_over_{d}']:.2f}x" for d in DENSE if d in row and "density" in case
            ]
            table.append([
                name, str(row["tokens"]), f"{case['ms']:.1f}", f"{case['attention_share']:.0%}",
                f"{case['density']:.2f}" if "density" in case else "", " ".join(over),
                f"{peak / 2**30:.1f}" if peak else "",
            ])  # fmt: skip
    header = ["attention", "tokens", "ms", "its share", "density", "faster than dense", "peak GiB"]
    print(format_table(header, table))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face model")
    model.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape")
    parser.add_argument("--dense", nargs="*", choices=list(DENSE), default=list(DENSE),
                        help="torch's kernels to compare with")  # fmt: skip
    parser.add_argument("--split-mlp", type=int, metavar="TOKENS",
                        help="the MLP in pieces of so many tokens: less memory")  # fmt: skip
    parser.add_argument("--layers", type=int, help="of --shape; fewer fit less time")
    lengths = [8 * K, 16 * K, 32 * K, 64 * K, 128 * K]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: to try the script out")  # fmt: skip
    add_pattern_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    cfg = pattern_config(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("torch finds no GPU (--device cpu tries the script out)")
    dtype = getattr(torch, args.dtype)
    tokenizer = None
    if args.shape:
        model = random_model(args.shape, args.layers, dtype, args.device)
    else:
        model, tokenizer = load_model(args.model, dtype)
        model.to(args.device)
    if args.split_mlp is not None:
        flex_prefill.split_mlp(model, args.split_mlp)
    config = model.config.get_text_config()
    report = run_description(torch, shlex.join(["python", *sys.argv]))
    report["card"] = torch.cuda.get_device_name() if args.device == "cuda" else None
    report["model"] = {
        "name": args.shape or str(args.model),
        "random_weights": bool(args.shape),
        "layers": config.num_hidden_layers,
        "pattern": args.pattern,
        "cfg": cfg,
        "dtype": args.dtype,
        "split_mlp": args.split_mlp,
    }
    report["rows"] = rows = []
    with torch.inference_mode():
        for n in sorted(args.tokens):
            print(f"{n} tokens", file=sys.stderr)
            rows.append(
                measure_length(model, prompt(args, tokenizer, config.vocab_size, n), args, cfg)
            )
            if args.json is not None:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    print_table(rows)


def main() -> None:
    try:
        run(arguments())
    except CommandError as error:
        raise SystemExit(f"time_to_first_token.py: {error}") from None


if __name__ == "__main__":
    main()
