"""``flexprefill bench --kernel``: attend alone, on blocks drawn at random, against dense mode.

What the published code's kernel benchmark measures at 75 % and 95 % sparsity: densities .25 and
.05. Every row keeps its diagonal block, block 0 and further ones at random, so that a row of n
blocks has its share of n to the nearest block; the density that came out is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import flex_prefill
from flex_prefill.cli.common import (
    CommandError,
    choose_dtype,
    format_table,
    run_description,
    write_json,
    write_picture,
)
from flex_prefill.cli.inputs import INPUTS

DENSITIES = (0.25, 0.05)
_ENOUGH_SECONDS = 60  # of one case
_BLOCK_SIZE = 128


def density(text: str) -> float:
    """An argument in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a density in (0, 1], got {text}")
    return value


def random_index(
    tokens: int, heads: int, share: float, seed: int, block_size: int = _BLOCK_SIZE
) -> flex_prefill.BlockIndex:
    """An index that keeps `share` of the causal blocks of every head."""
    rng = np.random.default_rng(seed)
    n = -(-tokens // block_size)
    rows, lengths = [], []
    for _ in range(heads):
        owed = 0.0
        for i in range(n):
            owed += share * (i + 1)
            count = min(max(round(owed), 1 if i == 0 else 2), i + 1)
            owed -= count
            inner = rng.choice(max(i - 1, 0), max(count - 2, 0), replace=False) + 1
            row = np.unique([0, i, *inner])
            rows.append(row)
            lengths.append(len(row))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return flex_prefill.BlockIndex(
        indptr, np.concatenate(rows), [(tokens, tokens)], heads, block_size
    )


def run(args: argparse.Namespace, torch: Any) -> None:
    """What the arguments of ``bench`` ask for, on their device."""
    device = torch.device(args.device)
    description = run_description(torch, args.command_line)
    on_cpu = device.type == "cpu"
    dtypes = dict.fromkeys(
        choose_dtype(torch, name)[0] if on_cpu or name != "auto" else torch.bfloat16
        for name in args.dtype
    )
    cases = []
    for dtype in dtypes:
        for d in args.head_dim:
            for n in sorted(args.tokens):
                print(f"{n} tokens, d {d}, {_name(dtype)}", file=sys.stderr)
                with torch.inference_mode():
                    cases.append(_measure(torch, args, device, dtype, d, n))
    report = {
        **description,
        "device": str(device) if on_cpu else torch.cuda.get_device_name(device),
        "settings": {
            "heads": args.heads,
            "kv_heads": args.kv_heads,
            "block_size": _BLOCK_SIZE,
            "repeat": args.repeat,
            "seed": args.seed,
        },
        "cases": cases,
    }
    write_json(args.json, report)
    if str(args.json) != "-":
        print(format_cases(cases))
    if args.plot is not None:
        plot(report, args.plot)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _measure(
    torch: Any, args: argparse.Namespace, device: Any, dtype: Any, d: int, n: int
) -> dict[str, Any]:
    """Medians of dense mode, torch's attention and attend at each density, in turn."""
    q, k, v = INPUTS["random"](
        n, args.heads, args.kv_heads, d, seed=args.seed, dtype=dtype, device=device
    )
    out = torch.empty_like(q)
    options: dict[str, Any] = {"block_size": _BLOCK_SIZE}
    if device.type == "cpu":
        options["num_threads"] = torch.get_num_threads()
    indices = {
        share: _on(device, random_index(n, args.heads, share, args.seed)) for share in args.density
    }
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: flex_prefill.attend(q, k, v, None, out=out, **options),
        "torch": lambda: torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=args.heads != args.kv_heads
        ),
    }
    for share, index in indices.items():
        calls[f"attend {share:g}"] = partial(
            flex_prefill.attend, q, k, v, index, out=out, **options
        )
    for call in calls.values():
        call()  # threads are awake, kernels loaded, workspaces there
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(seconds["dense"]) < args.repeat and time.perf_counter() - began < _ENOUGH_SECONDS:
        for name, call in calls.items():
            seconds[name].append(_time(torch, device, call))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = 4 * d * args.heads * n * (n + 1) / 2
    rows = []
    for share, index in indices.items():
        time_of = median[f"attend {share:g}"]
        rows.append(
            {
                "asked_density": share,
                "density": index.density,
                "speedup_over_dense": median["dense"] / time_of,
                "speedup_over_torch": median["torch"] / time_of,
                "efficiency": index.density * median["dense"] / time_of,
                "tflops_per_second": flops * index.density / time_of / 1e12,
            }
        )
    return {
        "tokens": n,
        "head_dim": d,
        "dtype": _name(dtype),
        "densities": rows,
        "dense_speedup_over_torch": median["torch"] / median["dense"],
        "dense_tflops_per_second": flops / median["dense"] / 1e12,
        "median_seconds": median,
        "seconds": seconds,
    }


def _on(device: Any, index: flex_prefill.BlockIndex) -> flex_prefill.BlockIndex:
    """The index where the call runs, so that no call waits for it."""
    if device.type == "cpu":
        return index
    import torch

    indptr, indices = (
        torch.from_numpy(np.array(rows)).to(device) for rows in (index.indptr, index.indices)
    )
    return flex_prefill.BlockIndex(indptr, indices, index.sequences, index.h_q, index.block_size)


def _time(torch: Any, device: Any, call: Callable[[], Any]) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def format_cases(cases: list[dict[str, Any]]) -> str:
    """The table of the ratios."""
    return format_table(
        ["case", "tokens", "density", "attend", "vs dense", "vs torch", "TFLOP/s", "dense TFLOP/s"],
        [
            [
                f"{case['dtype']} d {case['head_dim']}",
                str(case["tokens"]),
                f"{row['density']:.3f}",
                f"{row['efficiency']:.2f}",
                f"{row['speedup_over_dense']:.2f}x",
                f"{row['speedup_over_torch']:.2f}x",
                f"{row['tflops_per_second']:.3g}",
                f"{case['dense_tflops_per_second']:.3g}",
            ]
            for case in cases
            for row in case["densities"]
        ],
    )


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-up over dense mode against the length; dotted: 1 / density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = report["cases"]
    combinations = sorted({(case["dtype"], case["head_dim"]) for case in cases})
    figure, panels = plt.subplots(
        1,
        len(combinations),
        figsize=(4.8 * len(combinations) + 0.6, 4.0),
        layout="constrained",
        squeeze=False,
    )
    for axes, (dtype, d) in zip(panels[0], combinations, strict=True):
        of_panel = [c for c in cases if (c["dtype"], c["head_dim"]) == (dtype, d)]
        lengths = [case["tokens"] for case in of_panel]
        for i, share in enumerate(r["asked_density"] for r in of_panel[0]["densities"]):
            rows = [case["densities"][i] for case in of_panel]
            colour = _COLOURS[i % len(_COLOURS)]
            speedups = [row["speedup_over_dense"] for row in rows]
            axes.plot(lengths, speedups, marker="o", color=colour, label=f"density {share:g}")
            ideal = [1 / row["density"] for row in rows]
            axes.plot(lengths, ideal, linestyle=":", color=colour, alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.axhline(1, color="#555555", linewidth=1)
        axes.set_title(f"{dtype}, d {d}: over dense mode", loc="left", fontsize=11)
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, title="dotted: 1 / density", title_fontsize=8)
    write_picture(path, figure, dpi=110)


def check(args: argparse.Namespace) -> None:
    """Refuses what belongs to the other benchmark."""
    if args.cfg or args.gamma is not None or args.pattern != "flex_prefill":
        raise CommandError("argument --kernel: blocks are random, no pattern chooses", usage=True)
