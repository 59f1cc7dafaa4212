"""Measures select on one GPU: its time in a CUDA graph by length, and the time of each kernel.

    python bench/gpu_select.py
    python bench/gpu_select.py --tokens 8192 --tau 0 --json select.json
    python bench/gpu_select.py --pattern xattention
    ncu --metrics gpu__time_duration.sum python bench/gpu_select.py --tokens 8192 --once

The times of kernels are torch's profiler's, of calls outside a graph. Where kernels overlap
(compute capability 9.0) a kernel's time begins with its first CTA, which may wait for the
kernel before to end: a column adds up to more than a call takes. ncu runs one kernel after the
other; --once calls select once for each length, for it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flex_prefill as fp
import torch
from flex_prefill.cli.common import format_table
from flex_prefill.cli.inputs import INPUTS

K = 1024
KINDS = [
    fp.MInferenceHead("a_shape", 1024, 4096),
    fp.MInferenceHead("vertical_slash", 1024, 4096),
    fp.MInferenceHead("block_sparse", 4096),
]
LENGTHS = [4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K]
OTHERS: dict[str, Callable[[int], Any]] = {  # of so many query heads
    "vertical_slash": lambda _: fp.VerticalSlash(1024, 4096),
    "xattention": lambda _: fp.XAttention(16, 0.9),
    "flash_prefill": lambda _: fp.FlashPrefill(alpha=0.18),
    "block_cover": lambda _: fp.BlockCover(),
    "minference": lambda heads: fp.MInference([KINDS[h % 3] for h in range(heads)]),
    "block_sparse": lambda heads: fp.MInference([KINDS[2]] * heads),
}
AIMS_MS = {4 * K: 0.08, 8 * K: 0.10, 16 * K: 0.15, 32 * K: 0.30, 64 * K: 0.60, 128 * K: 1.2}


def graph_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of single replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(5):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def kernel_us(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Microseconds of each kernel in one call, in the order of their first launch."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.events():
        match = re.search(r"flexprefill::(?:\(anonymous namespace\)::)?(\w+)", event.name)
        if match is not None:
            name = match[1].removesuffix("_kernel")
            found[name] = found.get(name, 0.0) + event.device_time / repeats
    return found


def print_tables(report: list[dict[str, Any]]) -> None:
    lengths = [f"{row['tokens'] // K}k" for row in report]
    kernels: dict[str, list[str]] = {}
    for i, row in enumerate(report):
        for name, spent in row["kernels_us"].items():
            kernels.setdefault(name, [""] * len(report))[i] = f"{spent:.1f}"
    aims = [AIMS_MS.get(row["tokens"]) for row in report]
    lines = [
        ["in a graph, ms", *(f"{row['ms']:.3f}" for row in report)],
        ["fastest, ms", *(f"{row['fastest_ms']:.3f}" for row in report)],
        ["aim, ms", *("" if aim is None else f"{aim:.2f}" for aim in aims)],
        ["query-aware heads", *(str(row["query_aware"]) for row in report)],
        ["density", *(f"{row['density']:.2f}" for row in report)],
    ]
    print(format_table(["select", *lengths], lines))
    print()
    print(format_table(["kernel, us", *lengths], [[name, *us] for name, us in kernels.items()]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument(
        "--pattern", choices=["flex_prefill", *OTHERS], default="flex_prefill",
        help="minference: a third of the heads each kind; block_sparse: MInference's, all heads",
    )  # fmt: skip
    parser.add_argument("--tau", type=float, default=0.1, help="of flex_prefill")
    parser.add_argument("--input", choices=sorted(INPUTS), default="structured")
    parser.add_argument("--backend", default="cuda", help="sm80: the kernels of older cards")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--once", action="store_true", help="one call a length, nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not (fp.info()["cuda"]["devices"] and torch.cuda.is_available()):
        raise SystemExit("gpu_select.py: needs a CUDA build of flex_prefill and torch, and a GPU")
    pattern = fp.FlexPrefill(gamma=0.9, tau=args.tau, min_budget=512)
    if args.pattern != "flex_prefill":
        pattern = OTHERS[args.pattern](args.heads)
    options: dict[str, Any] = {"backend": args.backend, "block_size": args.block_size}
    report: list[dict[str, Any]] = []
    with torch.inference_mode():
        for n in args.tokens:
            shape = {"h_q": args.heads, "h_kv": args.kv_heads, "d": args.head_dim}
            q, k, _ = INPUTS[args.input](n, **shape, seed=0, dtype=torch.bfloat16, device="cuda")

            def call(q: torch.Tensor = q, k: torch.Tensor = k) -> object:
                return fp.select(q, k, pattern, **options)

            if args.once:
                call()
                torch.cuda.synchronize()
                continue
            times = graph_ms(call, args.repeats)
            index, audit = fp.select(q, k, pattern, audit=True, **options)
            report.append({
                "tokens": n,
                "ms": statistics.median(times),
                "fastest_ms": min(times),
                "query_aware": sum(name == "query_aware" for name in audit.pattern.flatten()),
                "density": index.density,
                "kernels_us": kernel_us(call, 20),
            })  # fmt: skip
    if args.json is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        card = torch.cuda.get_device_name()
        args.json.write_text(
            json.dumps({"card": card, "settings": settings, "rows": report}, indent=1) + "\n"
        )
    if not args.once:
        print_tables(report)


if __name__ == "__main__":
    main()
