"""Measures the CUDA backends beside other kernels, all in one process, on one GPU.

    python bench/gpu_bench.py --json bench/results/gpu.json
    python bench/gpu_bench.py --quick --json quick.json         # a minute: ours and cuDNN alone

Sections (--sections):
  attend    20 % of the causal blocks, at random: ours, FlashAttention-4, flex_attention, one index
  dense     every causal block: ours, FlashAttention-3 and -2, cuDNN, flex_attention
  prefill   structured input: select, attend, both; cuDNN, the published code, FlashPrefill V2
  patterns  select and prefill of every pattern; what the mean correction costs
  shapes    prefill against dense: as many K/V as query heads; d 64; fp16; four mixed lengths
  chunks    a 128k prompt in chunks of 2k, 8k, 16k: prefill of each against dense of each
  rule      prefill as asked against dense mode over lengths, chunks, heads, head dims, batches
            and both inputs, for bench/fit_dense_rule.py (left out where no section is named)

Times are medians of single calls in CUDA graphs (in eager mode where a peer cannot be captured;
"captured" says so), milliseconds. TFLOP/s count what is computed: 4 d s^2 / 2 a head, times the
density.
Peers that are not installed are left out with a line that says why.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flex_prefill as fp
import gpu_peers as peers
import torch
from flex_prefill.cli.common import format_table, run_description
from flex_prefill.cli.inputs import INPUTS

K = 1024
LENGTHS = [4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K]
PATTERN = fp.FlexPrefill(gamma=0.9, tau=0.1, min_budget=512)
PUBLISHED = {"gamma": 0.9, "tau": 0.1, "min_budget": 512}
FLASH_PREFILL_ALPHA = 0.18  # its paper's for Llama-3.1-8B
RANDOM_DENSITY = 0.2


class Bench:
    """Runs cases, keeps their rows and what was left out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    def time(self, call: peers.Call, capture: bool) -> tuple[list[float], bool]:
        """Milliseconds of single calls, and whether they ran in a CUDA graph."""
        replay, captured = call, False
        torch.cuda.synchronize()
        if capture:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    call()
                replay, captured = graph.replay, True
            except Exception:  # what cannot be captured is timed as it is
                torch.cuda.synchronize()
        spent = self._events(replay, 2)[-1]
        repeats = min(100, max(3, math.ceil(1e3 * self.args.seconds / max(spent, 1e-3))))
        return self._events(replay, repeats), captured

    @staticmethod
    def _events(call: peers.Call, repeats: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    def add(
        self,
        name: str,
        make: Callable[[], peers.Call],
        *,
        flops: float | None = None,
        like: torch.Tensor | None = None,
        capture: bool = True,
        **labels: Any,
    ) -> Any:
        """One row. ``make`` prepares and returns the call; returns the result of the call.

        flops: what the call computes; like: the result that it should have, for the difference;
        capture: False for what is known to wait for the GPU.
        """
        result = None
        try:
            call = make()
            result = call()
            times, captured = self.time(call, capture)
        except Exception as error:  # a peer of whatever make must not end the run
            text = str(error).strip().splitlines()
            known = isinstance(error, peers.Unavailable)
            reason = ("" if known else f"{type(error).__name__}: ") + (text[0] if text else "")
            if self.left_out.setdefault(name, reason) == reason:
                print(f"  {name}: left out: {reason}", file=sys.stderr)
            torch.cuda.empty_cache()
            return None
        row = labels | {"what": name, "ms": statistics.median(times), "captured": captured}
        row |= {"fastest_ms": min(times), "calls": len(times)}
        if flops is not None:
            row["tflops"] = flops / row["ms"] / 1e9
        if like is not None and isinstance(result, torch.Tensor):
            # Of a few rows: a whole one in fp32 has no room beside a long prompt's.
            part = slice(None, None, max(1, like.shape[1] // 512))
            difference = result[:, part].float() - like[:, part].float()
            row["largest_difference"] = difference.abs().max().item()
        self.rows.append(row)
        rate = f", {row['tflops']:.0f} TFLOP/s" if flops is not None else ""
        print(f"  {name}: {row['ms']:.3f} ms{rate}", file=sys.stderr)
        return result


def dense_flops(s_q: int, s_kv: int, h_q: int, d: int) -> float:
    return 4 * d * h_q * s_q * (s_kv - s_q / 2)


def random_blocks(n: int, h_q: int) -> torch.Tensor:
    """bool [h_q, n, n]: each causal block with probability .2, diagonal and column 0 always."""
    generator = torch.Generator("cuda").manual_seed(0)
    kept = torch.rand(h_q, n, n, device="cuda", generator=generator) < RANDOM_DENSITY
    kept |= torch.eye(n, dtype=torch.bool, device="cuda")
    kept[:, :, 0] = True
    return kept.tril()


def device_index(kept: torch.Tensor, tokens: int) -> tuple[fp.BlockIndex, float]:
    """The index of kept [h_q, n, n] on the GPU, and its density."""
    h_q, n, _ = kept.shape
    indptr = torch.zeros(h_q * n + 1, dtype=torch.int64, device="cuda")
    indptr[1:] = kept.sum(-1).flatten().cumsum(0)
    indices = kept.nonzero()[:, 2].to(torch.int32)
    density = indices.numel() / (h_q * n * (n + 1) / 2)
    return fp.BlockIndex(indptr, indices, [(tokens, tokens)], h_q), density


def tensors(args: argparse.Namespace, kind: str, n: int, **changes: Any) -> list[torch.Tensor]:
    shape = {"h_q": args.heads, "h_kv": args.kv_heads, "d": args.head_dim} | changes
    dtype = shape.pop("dtype", torch.bfloat16)
    return list(INPUTS[kind](n, **shape, seed=0, dtype=dtype, device="cuda"))


def attend(bench: Bench, n: int) -> None:
    q, k, v = tensors(bench.args, "random", n)
    kept = random_blocks(n // peers.BLOCK, bench.args.heads)
    index, density = device_index(kept, n)
    flops = density * dense_flops(n, n, q.shape[2], q.shape[3])
    labels = {"section": "attend", "input": "random", "tokens": n, "density": density}
    ours = bench.add("attend", lambda: lambda: fp.attend(q, k, v, index), flops=flops, **labels)
    if bench.args.backends:
        for name in ("sm80", "sm90"):
            bench.add(
                f"attend {name}", lambda name=name: lambda: fp.attend(q, k, v, index, backend=name),
                flops=flops, like=ours, **labels,
            )  # fmt: skip
    if bench.args.quick:
        return
    others = [("FlashAttention-4 block-sparse", peers.flash_attention_4_sparse)]
    if n in bench.args.flex_tokens:
        others.append(("flex_attention block-sparse", peers.flex_attention_blocks))
    for name, peer in others:
        bench.add(name, lambda peer=peer: peer(q, k, v, kept), flops=flops, like=ours, **labels)


def dense(bench: Bench, n: int) -> None:
    q, k, v = tensors(bench.args, "random", n)
    flops = dense_flops(n, n, q.shape[2], q.shape[3])
    labels = {"section": "dense", "input": "random", "tokens": n, "density": 1.0}
    ours = bench.add("dense", lambda: lambda: fp.attend(q, k, v), flops=flops, **labels)
    others = [
        ("cuDNN", peers.cudnn),
        ("FlashAttention-3", peers.flash_attention_3),
        ("FlashAttention-2", peers.flash_attention_2),
    ]
    if n in bench.args.flex_tokens:
        others.append(("flex_attention", peers.flex_attention_blocks))
    for name, peer in others[:1] if bench.args.quick else others:
        bench.add(name, lambda peer=peer: peer(q, k, v), flops=flops, like=ours, **labels)


def prefill(bench: Bench, n: int) -> None:
    q, k, v = tensors(bench.args, "structured", n)
    index = fp.select(q, k, PATTERN)
    density = index.density
    flops = density * dense_flops(n, n, q.shape[2], q.shape[3])
    labels = {"section": "prefill", "input": "structured", "tokens": n, "density": density}
    bench.add("select", lambda: lambda: fp.select(q, k, PATTERN), **labels)
    bench.add("attend", lambda: lambda: fp.attend(q, k, v, index), flops=flops, **labels)
    ours = bench.add("prefill", lambda: lambda: fp.prefill(q, k, v, PATTERN), **labels)
    bench.add("cuDNN", lambda: peers.cudnn(q, k, v), **labels)
    if bench.args.quick:
        return
    bench.add(
        "published Triton code",
        lambda: peers.published(bench.args.published, **PUBLISHED)(q, k, v),
        like=ours,
        capture=False,
        **labels,
    )
    folder = bench.args.flash_prefill
    for i, name in enumerate(("FlashPrefill V2 index", "FlashPrefill V2 attention")):
        bench.add(
            name,
            lambda i=i: peers.flash_prefill_v2(folder, q, k, v, FLASH_PREFILL_ALPHA)[i],
            capture=False,
            **labels,
        )


def named_backend() -> str:
    """The card's, by the name under which prefill never takes dense mode instead."""
    return "sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm80"


def patterns(bench: Bench, n: int) -> None:
    q, k, v = tensors(bench.args, "structured", n)
    by = {"backend": named_backend()}
    one = {"section": "patterns", "input": "structured", "tokens": n}
    head = fp.MInferenceHead
    kinds = [
        head("a_shape", 1024, 4096), head("vertical_slash", 1024, 4096), head("block_sparse", 4096),
    ]  # fmt: skip
    heads = bench.args.heads
    for name, pattern in {
        "flex_prefill": PATTERN,
        "vertical_slash": fp.VerticalSlash(1024, 4096),
        "xattention 16": fp.XAttention(16, 0.9),
        "xattention 8": fp.XAttention(8, 0.9),
        "flash_prefill": fp.FlashPrefill(alpha=FLASH_PREFILL_ALPHA),
        "block_cover": fp.BlockCover(),
        "minference": fp.MInference([kinds[h % 3] for h in range(heads)]),
        "minference, block-sparse": fp.MInference([kinds[2]] * heads),
    }.items():
        index = fp.select(q, k, pattern)
        labels = one | {"density": index.density}
        for stage, call in (
            ("select", functools.partial(fp.select, q, k, pattern, **by)),
            ("prefill", functools.partial(fp.prefill, q, k, v, pattern, **by)),
        ):
            bench.add(f"{stage} {name}", lambda call=call: call, **labels)
        if not index.mean_correction:
            continue
        rows = (index.indptr, index.indices, index.sequences, index.h_q)
        for label, flag in (("", False), (" with means", True)):
            same = fp.BlockIndex(*rows, mean_correction=flag)
            call = functools.partial(fp.attend, q, k, v, same)
            bench.add(f"attend{label}", lambda call=call: call, **labels)
    bench.add("cuDNN", lambda: peers.cudnn(q, k, v), **one)


def shapes(bench: Bench, n: int) -> None:
    heads = bench.args.heads
    for label, changes in (
        (f"{heads} K/V heads", {"h_kv": heads}),
        ("d 64", {"d": 64}),
        ("fp16", {"dtype": torch.float16}),
    ):
        q, k, v = tensors(bench.args, "structured", n, **changes)
        density = fp.select(q, k, PATTERN).density
        labels = {"section": "shapes", "shape": label, "tokens": n, "density": density}
        bench.add("prefill", lambda: lambda: fp.prefill(q, k, v, PATTERN), **labels)  # noqa: B023
        bench.add("dense", lambda: lambda: fp.attend(q, k, v), **labels)  # noqa: B023
        bench.add("cuDNN", lambda: peers.cudnn(q, k, v), **labels)  # noqa: B023
    lengths = [n // 2, n // 4, n // 8 + 77, n // 16 + 1]
    parts = [tensors(bench.args, "structured", length) for length in lengths]
    q, k, v = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts}
    density = fp.select(q, k, PATTERN, **packed).density
    labels = {"section": "shapes", "shape": "four lengths", "tokens": sum(lengths)}
    labels |= {"lengths": lengths, "density": density}
    bench.add("prefill", lambda: lambda: fp.prefill(q, k, v, PATTERN, **packed), **labels)
    bench.add("dense", lambda: lambda: fp.attend(q, k, v, **packed), **labels)
    calls: list[peers.Call] = []

    def one_by_one() -> peers.Call:
        calls.extend(peers.cudnn(*part) for part in parts)
        return lambda: [call() for call in calls]

    bench.add("cuDNN, one by one", one_by_one, **labels)


def chunks(bench: Bench, n: int) -> None:
    """The whole prompt chunk by chunk, the keys of earlier chunks in place."""
    q, k, v = tensors(bench.args, "structured", n)

    def passes(size: int, one: Callable[..., Any]) -> peers.Call:
        ends = range(size, n + 1, size)
        return lambda: [one(q[:, end - size : end], k[:, :end], v[:, :end]) for end in ends]

    def flash_attention_3(size: int) -> peers.Call:
        calls = [
            peers.flash_attention_3(q[:, end - size : end], k[:, :end], v[:, :end])
            for end in range(size, n + 1, size)
        ]
        return lambda: [call() for call in calls]

    for size in (2 * K, 8 * K, 16 * K):
        labels = {"section": "chunks", "input": "structured", "tokens": n, "chunk": size}
        bench.add(
            "prefill",
            lambda size=size: passes(size, lambda *x: fp.prefill(*x, PATTERN)), **labels,
        )  # fmt: skip
        bench.add("dense", lambda size=size: passes(size, fp.attend), **labels)
        if not bench.args.quick:
            bench.add("FlashAttention-3", lambda size=size: flash_attention_3(size), **labels)


# Changes of the shape, and chunks: rows of the end of a prompt.
RULE_SHAPES: list[dict[str, Any]] = [
    {},
    {"h_q": 8, "h_kv": 2},
    {"h_q": 1, "h_kv": 1},
    {"d": 64},
    {"chunk": 512},
    {"chunk": 2 * K},
    {"batch": 4},
]


def rule(bench: Bench, n: int) -> None:
    """Prefill as asked, and its parts."""
    backend = named_backend()
    by = {"backend": backend}
    for kind in ("structured", "random"):
        for changes in RULE_SHAPES:
            shape = dict(changes)
            chunk, batch = shape.pop("chunk", n), shape.pop("batch", 1)
            if chunk > n or batch * n > 64 * K:
                continue
            q, k, v = tensors(bench.args, kind, n, **shape)
            q, k, v = (x.expand(batch, -1, -1, -1).contiguous() for x in (q[:, -chunk:], k, v))
            index = fp.select(q, k, PATTERN)
            labels = {"section": "rule", "input": kind, "tokens": n, "s_q": chunk, "batch": batch}
            labels |= {"h_q": q.shape[2], "h_kv": k.shape[2], "d": q.shape[3], "backend": backend}
            labels |= {"density": index.density, "min_budget": PATTERN.min_budget}
            labels["shape"] = ", ".join(f"{name} {x}" for name, x in changes.items()) or "plain"
            for name, call in (
                ("dense", lambda q, k, v: fp.attend(q, k, v, **by)),
                ("select", lambda q, k, v: fp.select(q, k, PATTERN, **by)),
                ("prefill", lambda q, k, v: fp.prefill(q, k, v, PATTERN, **by)),
                ("automatic", lambda q, k, v: fp.prefill(q, k, v, PATTERN)),
            ):
                make = functools.partial(functools.partial, call, q, k, v)
                bench.add(name, make, **labels)


SECTIONS = {
    "attend": attend, "dense": dense, "prefill": prefill, "patterns": patterns, "shapes": shapes,
    "chunks": chunks, "rule": rule,
}  # fmt: skip
RULE_LENGTHS = [2 * K, 4 * K, 8 * K, 16 * K]


def lengths_of(section: str, args: argparse.Namespace) -> list[int]:
    """The lengths that a section measures."""
    if section == "chunks":
        return [max(args.tokens)]
    if section == "shapes":
        return [n for n in (32 * K,) if n <= max(args.tokens)]
    if section == "rule":
        return [n for n in RULE_LENGTHS if n <= max(args.tokens)]
    return sorted(args.tokens)


# Of each length: kernels that are measured, their work in dense calls (at 500 TFLOP/s), and
# seconds in which others compile (FlashAttention-4 once, flex_attention and Triton's each time).
_WORK = {
    "attend": (3, 1.0), "dense": (4, 5.0), "prefill": (7, 3.0), "patterns": (20, 5.0),
    "shapes": (13, 16.0), "chunks": (9, 7.0), "rule": (40, 20.0),
}  # fmt: skip


def estimated_seconds(args: argparse.Namespace) -> float:
    """What a run will take, roughly: each measurement its seconds or three calls, and the start."""
    total = 20.0
    for section in args.sections:
        for n in lengths_of(section, args):
            kernels, work = _WORK[section]
            call = dense_flops(n, n, args.heads, args.head_dim) / 500e12 * work / kernels
            total += kernels * (max(args.seconds, 3 * call) + 4 * call + 0.05) + 0.3
            if args.quick or section not in ("attend", "dense", "prefill"):
                continue
            total += 12 * (section != "prefill" and n in args.flex_tokens)
            total += 0.4 if section == "prefill" else 0
        total += 40 * (section == "attend" and not args.quick)
        total += 15 * (section == "prefill" and args.published is not None)
    return total


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case: how many times as long a peer takes as ours."""
    ours = {"attend": "attend", "dense": "dense", "patterns": "select flex_prefill"}
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["section"] == "rule":
            continue
        key = tuple(row.get(name) for name in ("section", "tokens", "shape", "chunk"))
        cases.setdefault(key, {})[row["what"]] = row["ms"]
    found = []
    for (section, tokens, shape, chunk), ms in cases.items():
        base = ours.get(section, "prefill")
        if base not in ms:
            continue
        over = {name: value / ms[base] for name, value in ms.items() if name != base}
        case = {"section": section, "tokens": tokens, "shape": shape, "chunk": chunk}
        found.append(case | {"ours": base, "ms": ms[base], "times_as_long": over})
    return found


def card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    report = {
        "card": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    query = ["driver_version", "clocks.max.sm", "power.limit"]
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        report |= dict(zip(query, found.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError):
        report["driver_version"] = None
    return report


def print_table(report: dict[str, Any]) -> None:
    for section in SECTIONS:
        rows = [row for row in report["rows"] if row["section"] == section]
        if not rows:
            continue
        table = [
            [
                row["what"] + (f" ({row['shape']})" if "shape" in row else ""),
                f"{row['tokens'] // K}k" + (f"/{row['chunk'] // K}k" if "chunk" in row else ""),
                f"{row['density']:.2f}" if "density" in row else "",
                f"{row['ms']:.3f}",
                f"{row['tflops']:.0f}" if "tflops" in row else "",
                f"{row['largest_difference']:.1e}" if "largest_difference" in row else "",
            ]
            for row in rows
        ]
        header = [section, "tokens", "density", "ms", "TFLOP/s", "difference"]
        print(f"\n{format_table(header, table)}")
    print()
    for case in report["ratios"]:
        what = " ".join(str(x) for x in (case["section"], case["shape"] or "") if x)
        chunk = f", chunks of {case['chunk']}" if case["chunk"] else ""
        over = ", ".join(f"{name} {x:.2f}x" for name, x in case["times_as_long"].items())
        print(f"{what}, {case['tokens']} tokens{chunk}: {case['ours']} {case['ms']:.3f} ms; {over}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="multiples of 128")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS),
                        default=[name for name in SECTIONS if name != "rule"])  # fmt: skip
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--flex-tokens", type=int, nargs="*", default=[8 * K, 32 * K, 128 * K],
                        help="lengths of flex_attention, which compiles for each")  # fmt: skip
    parser.add_argument("--backends", action="store_true", help="attend: sm80 and sm90 apart too")
    parser.add_argument("--quick", action="store_true", help="ours and cuDNN alone, briefly")
    folders = {
        "--published": "a checkout of the published code (bytedance/FlexPrefill)",
        "--flash-prefill": "a built checkout of qhfan/FlashPrefillv2",
    }
    for name, text in folders.items():
        parser.add_argument(name, type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--commit", help="for the JSON, where the tree is no checkout of git")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if any(n % peers.BLOCK for n in args.tokens):
        parser.error(f"--tokens: expected multiples of {peers.BLOCK}, got {args.tokens}")
    if args.quick:
        args.seconds = min(args.seconds, 0.15)
    return args


def main() -> None:
    args = arguments()
    if not (fp.info()["cuda"]["devices"] and torch.cuda.is_available()):
        raise SystemExit("gpu_bench.py: needs a CUDA build of flex_prefill and torch, and a GPU")
    command = shlex.join(["python", *sys.argv])
    print(f"about {estimated_seconds(args):.0f} s", file=sys.stderr)
    start = time.perf_counter()
    bench = Bench(args)
    report = run_description(torch, command) | {"card": card()}
    report["commit"] = args.commit or report["commit"]
    report["settings"] = {
        "heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim,
        "dtype": "bfloat16", "pattern": PATTERN.name, "cfg": PUBLISHED,
    }  # fmt: skip

    def save() -> None:  # what was measured is kept, whatever ends the rest
        report.update(rows=bench.rows, left_out=bench.left_out, ratios=ratios(bench.rows))
        report["seconds"] = time.perf_counter() - start
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    with torch.inference_mode():
        for section in args.sections:
            if section in ("shapes", "chunks") and args.quick:
                continue
            for n in lengths_of(section, args):
                spent = time.perf_counter() - start
                print(f"{section}, {n} tokens ({spent:.0f} s)", file=sys.stderr)
                try:
                    SECTIONS[section](bench, n)
                except torch.OutOfMemoryError as error:
                    bench.left_out[f"{section}, {n} tokens"] = str(error).splitlines()[0]
                torch.cuda.empty_cache()
                save()
    print_table(report)


if __name__ == "__main__":
    main()
