"""Measures select, attend and dense mode on your shapes, beside torch in the same process.

Every repeat runs all of them once, one after the other; medians are compared. What is printed are
ratios: seconds of one machine say nothing about another (they are in the JSON). With --device cuda
the calls run on the GPU, on torch's stream, and are timed there.

  density       kept blocks / causal blocks
  select        select's time as a share of dense mode's
  attend        density x dense mode's time / attend's time: 1 is a speed-up of exactly 1 / density
  vs dense      dense mode's time / prefill's (select and attend)
  vs torch      torch's time / prefill's, torch being scaled_dot_product_attention (is_causal)
  dense/torch   torch's time / dense mode's
  dense/gemm    dense mode's FLOP/s as a share of those of torch's matrix product
  auto          dense mode's time / prefill's as the library calls it on a GPU, where it takes
                dense mode by itself if sparse cannot pay (the other columns: never)
  memory        workspace as a share of the bytes of q, k and v
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flex_prefill
import flex_prefill.cli.kernel_bench as kernel_bench
from flex_prefill.cli.common import (
    DTYPES,
    CommandError,
    add_pattern_arguments,
    choose_dtype,
    describe_pattern,
    format_table,
    gemm_rate,
    load_torch,
    new_file,
    new_picture,
    pattern_config,
    pattern_from,
    positive,
    require,
    run_description,
    write_json,
    write_picture,
)
from flex_prefill.cli.inputs import INPUTS

SUMMARY = "measure sparse against dense on your own shapes"
EXAMPLE = """examples:
  flexprefill bench --tokens 4096 8192 16384 --heads 32 --kv-heads 8 --head-dim 128 \\
      --dtype float32 --gamma 0.95 --json bench.json --plot bench.png
  flexprefill bench --kernel --tokens 4096 8192 16384 --plot kernel.png"""

PEERS = ("torch", "gemm")
_ENOUGH_SECONDS = 60  # of one case; calls that long need no repeats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=positive, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=positive, default=8, help="query heads (default 8)")
    parser.add_argument("--kv-heads", type=positive, default=2, help="K/V heads (default 2)")
    parser.add_argument("--head-dim", type=positive, nargs="+", default=[128])
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("auto", *DTYPES),
        default=["auto"],
        help="auto: the faster of bfloat16 and float32 in torch's matrix product on this machine; "
        "bfloat16 on a GPU",
    )
    parser.add_argument("--input", nargs="+", choices=tuple(INPUTS), default=["structured"])
    add_pattern_arguments(parser)
    parser.add_argument(
        "--repeat",
        type=positive,
        default=3,
        help=f"runs of each (default 3); fewer once a case has taken {_ENOUGH_SECONDS} s",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: on the GPU, against torch's attention there (cuDNN or flash) (default cpu)",
    )
    parser.add_argument("--threads", type=positive, default=0, help="default: all there are")
    parser.add_argument(
        "--peers", default="torch,gemm", help="of torch, gemm; none (default torch,gemm)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="- is standard output")
    parser.add_argument("--plot", type=new_picture, metavar="FILE.png")
    group = parser.add_argument_group("kernel")
    group.add_argument(
        "--kernel", action="store_true", help="attend alone, on random blocks, against dense mode"
    )
    group.add_argument(
        "--density",
        type=kernel_bench.density,
        nargs="+",
        default=list(kernel_bench.DENSITIES),
        help="of those blocks (default .25 .05: 75 %% and 95 %% sparsity)",
    )


def run(args: argparse.Namespace) -> None:
    peers = _peers(args.peers)
    if args.heads % args.kv_heads:
        raise CommandError(
            f"argument --heads: expected a multiple of --kv-heads {args.kv_heads}, "
            f"got {args.heads}",
            usage=True,
        )
    if args.kernel:
        kernel_bench.check(args)
    pattern_from(args)  # refuses bad settings before torch is loaded
    if args.plot is not None:
        require("matplotlib", "plot")
    torch = load_torch(args.threads)
    if args.device == "cuda":
        _check_gpu(torch)
    if args.kernel:
        kernel_bench.run(args, torch)
        return
    description = run_description(torch, args.command_line)  # before there is load of our own
    # "auto" may name a dtype that was asked for as well.
    dtypes = dict.fromkeys(
        torch.bfloat16 if args.device == "cuda" and name == "auto" else choose_dtype(torch, name)[0]
        for name in args.dtype
    )
    combinations = [
        (kind, dtype, d, n)
        for kind in args.input
        for dtype in dtypes
        for d in args.head_dim
        for n in sorted(args.tokens)
    ]
    rates: dict[Any, tuple[float, int]] = {}
    if "gemm" in peers:
        on_gpu = args.device == "cuda"
        rates = {d: (0.0, 8192) if on_gpu else gemm_rate(torch, d) for d in dtypes}
    cases: list[dict[str, Any]] = []
    for number, (kind, dtype, d, n) in enumerate(combinations, 1):
        print(
            f"[{number}/{len(combinations)}] {n} tokens, d {d}, {_name(dtype)}, {kind}",
            file=sys.stderr,
        )
        with torch.inference_mode():
            cases.append(_measure(torch, args, kind, dtype, d, n, peers, rates.get(dtype)))
    if args.device == "cuda":
        description["machine"]["gpu"] = torch.cuda.get_device_name()
    report = {
        **description,
        "settings": {
            "heads": args.heads,
            "kv_heads": args.kv_heads,
            "pattern": args.pattern,
            "cfg": pattern_config(args),
            "device": args.device,
            "repeat": args.repeat,
            "seed": args.seed,
        },
        "cases": cases,
        "crossover": _crossovers(cases),
    }
    write_json(args.json, report)
    if str(args.json) != "-":
        _print(report)
    if args.plot is not None:
        plot(report, args.plot)


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name and name != "none")
    for name in names:
        if name not in PEERS:
            raise CommandError(
                f"argument --peers: expected of {', '.join(PEERS)}, or none; got {name!r}",
                usage=True,
            )
    return names


def _check_gpu(torch: Any) -> None:
    cuda = flex_prefill.info()["cuda"]
    if not cuda["built"]:
        raise CommandError(
            "argument --device: this build has no CUDA backend: install where nvcc is"
        )
    if not (cuda["devices"] and torch.cuda.is_available()):
        raise CommandError(
            "argument --device: no GPU that both this build and torch can use "
            f"({cuda['error'] or 'torch is built without CUDA, or finds no GPU'})"
        )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _measure(
    torch: Any,
    args: argparse.Namespace,
    kind: str,
    dtype: Any,
    d: int,
    n: int,
    peers: tuple[str, ...],
    gemm: tuple[float, int] | None,
) -> dict[str, Any]:
    """One row of the table."""
    q, k, v = INPUTS[kind](
        n, args.heads, args.kv_heads, d, seed=args.seed, dtype=dtype, device=args.device
    )
    pattern, block_size = pattern_from(args)
    threads = torch.get_num_threads()
    options: dict[str, Any] = {"block_size": block_size, "num_threads": threads}
    named: dict[str, Any] = {}  # a backend that is named computes what was asked for
    if args.device == "cuda":
        hopper = torch.cuda.get_device_capability() == (9, 0)
        named = {"backend": "sm90" if hopper else "sm80"}
    index = flex_prefill.select(q, k, pattern, **options)
    out = torch.empty_like(q)
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: flex_prefill.attend(q, k, v, None, out=out, **options),
        "select": lambda: flex_prefill.select(q, k, pattern, **options),
        "attend": lambda: flex_prefill.attend(q, k, v, index, out=out, **options),
        "prefill": lambda: flex_prefill.prefill(q, k, v, pattern, out=out, **options, **named),
    }
    if named:
        calls["automatic"] = lambda: flex_prefill.prefill(q, k, v, pattern, out=out, **options)
    if "torch" in peers:
        # The layout that torch likes best.
        heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        calls["torch"] = lambda: torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=args.heads != args.kv_heads
        )
    if gemm is not None:
        a, b = (torch.ones(gemm[1], gemm[1], dtype=dtype, device=args.device) for _ in range(2))
        calls["gemm"] = lambda: a @ b
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    timed = _timed_on_gpu(torch) if args.device == "cuda" else _timed
    if args.device == "cuda":
        for call in calls.values():  # loads kernels, lets torch choose its own
            call()
    began = time.perf_counter()
    while len(seconds["dense"]) < args.repeat and time.perf_counter() - began < _ENOUGH_SECONDS:
        for name, call in calls.items():
            seconds[name].append(timed(call))
    median = {name: statistics.median(values) for name, values in seconds.items()}

    dense_flops = 4 * d * args.heads * n * (n + 1) / 2
    qkv_bytes = sum(x.numel() * x.element_size() for x in (q, k, v))
    workspace = flex_prefill.prefill_workspace_size(q, k, v, pattern, **options)
    ratios = {
        "select_share_of_dense": median["select"] / median["dense"],
        "attend_efficiency": index.density * median["dense"] / median["attend"],
        "speedup_over_dense": median["dense"] / median["prefill"],
        "workspace_share_of_qkv": workspace / qkv_bytes,
    }
    if named:
        ratios["automatic_speedup_over_dense"] = median["dense"] / median["automatic"]
    if "torch" in peers:
        ratios["speedup_over_torch"] = median["torch"] / median["prefill"]
        ratios["dense_speedup_over_torch"] = median["torch"] / median["dense"]
    if gemm is not None:
        gemm_flops_per_second = 2 * gemm[1] ** 3 / median["gemm"]
        ratios["dense_share_of_gemm_rate"] = dense_flops / median["dense"] / gemm_flops_per_second
    return {
        "tokens": n,
        "head_dim": d,
        "dtype": _name(dtype),
        "input": kind,
        "density": index.density,
        "ratios": ratios,
        "median_seconds": median,
        "seconds": seconds,
        "gemm_size": None if gemm is None else gemm[1],
    }


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _timed_on_gpu(torch: Any) -> Callable[[Callable[[], Any]], float]:
    """Seconds between the events around a call; the stream is kept busy until both are queued, so
    that the time that Python takes to call is not part of it."""

    def timed(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # clock cycles, about a millisecond
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


def _series(cases: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Cases by (input, dtype, head_dim), shortest first."""
    series: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for case in sorted(cases, key=lambda case: case["tokens"]):
        series.setdefault((case["input"], case["dtype"], case["head_dim"]), []).append(case)
    return series


def _crossovers(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each series the shortest measured length from which prefill wins at every length."""
    found = []
    for (kind, dtype, d), series in _series(cases).items():
        row: dict[str, Any] = {"input": kind, "dtype": dtype, "head_dim": d}
        for peer in ("dense", "torch"):
            if f"speedup_over_{peer}" not in series[0]["ratios"]:
                continue
            tokens = None
            for case in reversed(series):
                if case["ratios"][f"speedup_over_{peer}"] <= 1:
                    break
                tokens = case["tokens"]
            row[f"faster_than_{peer}_from"] = tokens
        found.append(row)
    return found


_COLUMNS = {
    "select": ("select_share_of_dense", "{:.1%}"),
    "attend": ("attend_efficiency", "{:.2f}"),
    "vs dense": ("speedup_over_dense", "{:.2f}x"),
    "auto": ("automatic_speedup_over_dense", "{:.2f}x"),
    "vs torch": ("speedup_over_torch", "{:.2f}x"),
    "dense/torch": ("dense_speedup_over_torch", "{:.2f}x"),
    "dense/gemm": ("dense_share_of_gemm_rate", "{:.0%}"),
    "memory": ("workspace_share_of_qkv", "{:.1%}"),
}


def format_cases(cases: list[dict[str, Any]]) -> str:
    """The table of the ratios."""
    columns = {name: column for name, column in _COLUMNS.items() if column[0] in cases[0]["ratios"]}
    header = ["case", "tokens", "density", *columns]
    rows = [
        [
            f"{case['input']} {case['dtype']} d {case['head_dim']}",
            str(case["tokens"]),
            f"{case['density']:.2f}",
            *(form.format(case["ratios"][key]) for key, form in columns.values()),
        ]
        for series in _series(cases).values()
        for case in series
    ]
    return format_table(header, rows)


def _print(report: dict[str, Any]) -> None:
    settings, machine = report["settings"], report["machine"]
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, CPU target {machine['cpu_targets'][0]}"
    )
    if settings["device"] == "cuda":
        where = machine["gpu"]
    print(
        f"{where}\n"
        f"{settings['heads']} query heads, {settings['kv_heads']} K/V heads, "
        f"{describe_pattern(settings['pattern'], settings['cfg'])}; "
        f"medians of up to {settings['repeat']} runs\n"
    )
    print(format_cases(report["cases"]))
    print()
    for row in report["crossover"]:
        for peer in ("dense", "torch"):
            if f"faster_than_{peer}_from" not in row:
                continue
            tokens = row[f"faster_than_{peer}_from"]
            where = "at no measured length" if tokens is None else f"from {tokens} tokens on"
            name = "dense mode" if peer == "dense" else "torch"
            print(f"{row['input']} {row['dtype']} d {row['head_dim']}: faster than {name} {where}")


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by the colour-blind too
_MARKERS = ("o", "s", "^", "D")


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-ups over torch (or dense mode), and select's share, against the length."""
    require("matplotlib", "plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    peer = "torch" if "speedup_over_torch" in report["cases"][0]["ratios"] else "dense"
    figure, (speed, share) = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    for i, ((kind, dtype, d), series) in enumerate(_series(report["cases"]).items()):
        tokens = [case["tokens"] for case in series]
        style = {"color": _COLOURS[i % 4], "marker": _MARKERS[i % 4], "markersize": 5}
        label = f"{dtype}, d {d}" + ("" if kind == "structured" else f", {kind}")

        def values(key: str, of: list[dict[str, Any]] = series) -> list[float]:
            return [case["ratios"][key] for case in of]

        speed.plot(tokens, values(f"speedup_over_{peer}"), label=label, **style)
        if peer == "torch":
            dense = values("dense_speedup_over_torch")
            speed.plot(tokens, dense, linestyle=":", alpha=0.8, **style)
        share.plot(tokens, values("select_share_of_dense"), label=label, **style)
    lengths = sorted({case["tokens"] for case in report["cases"]})
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    speed.axhline(1, color="#555555", linewidth=1)
    name = "torch's attention" if peer == "torch" else "dense mode"
    note = "  (dotted: dense mode)" if peer == "torch" else ""
    speed.set_title(f"speed-up over {name}{note}", loc="left", fontsize=11)
    share.set_title("select, share of dense mode's time", loc="left", fontsize=11)
    share.yaxis.set_major_formatter(PercentFormatter(1))
    speed.legend(frameon=False, fontsize=9)
    write_picture(path, figure, dpi=120)
