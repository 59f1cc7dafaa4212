"""Puts the figures of bench/results into README.md and docs/notes.md, between their marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

_HEADER = (
    "| type | d | tokens | density | faster than torch | faster than our dense | "
    "dense over torch | select's share | workspace |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def origin(report: dict[str, Any]) -> str:
    """Where a report comes from."""
    machine, versions = report["machine"], report["versions"]
    return (
        f"Measured on {report['date'][:10]} at commit {report['commit']}: {machine['cpu']} "
        f"({', '.join(machine['cpu_features'])}), {machine['threads']} threads, CPU target "
        f"{machine['cpu_targets'][0]}, torch {versions['torch']}, load average before "
        f"{machine['load_average']:.1f}; `{report['command']}`."
    )


def attention() -> str:
    """The benchmark's table."""
    report = load("attention")
    rows = []
    for case in report["cases"]:
        ratios = case["ratios"]
        rows.append(
            f"| {case['dtype']} | {case['head_dim']} | {case['tokens']} | {case['density']:.2f} "
            f"| {ratios['speedup_over_torch']:.1f}x | {ratios['speedup_over_dense']:.1f}x "
            f"| {ratios['dense_speedup_over_torch']:.2f}x "
            f"| {ratios['select_share_of_dense']:.1%} | {ratios['workspace_share_of_qkv']:.1%} |"
        )
    return f"{_HEADER}{chr(10).join(rows)}\n\n{origin(report)}"


def demo() -> str:
    """What the demo found, in a sentence."""
    report = load("demo")
    own, sparse = report["own"], report["sparse"]
    verdict = {True: "right", False: "wrong"}
    return (
        f"On {report['prompt']['tokens']} tokens, {report['dtype']}: the first token comes "
        f"**{report['speedup']:.1f}x sooner**, the whole model counted; the answer is "
        f"{verdict[own['right']]} with the model's own attention and {verdict[sparse['right']]} "
        f"with FlexPrefill, which computes {sparse['density']:.0%} of the blocks. {origin(report)}"
    )


def aims() -> str:
    """What was aimed at, and the worst that was measured."""
    report, demo_report = load("attention"), load("demo")

    def measured(ratio: str, dtype: str | None = None, tokens: int | None = None) -> list[float]:
        return [
            case["ratios"][ratio]
            for case in report["cases"]
            if dtype in (None, case["dtype"]) and tokens in (None, case["tokens"])
        ]

    times, share = "{:.2f}x", "{:.1%}"
    rows = (
        # what, form, aim, measured, whether more is better
        ("dense, bfloat16, over torch", times, 2.5,
         measured("dense_speedup_over_torch", "bfloat16"), True),
        ("dense, bfloat16, of torch's GEMM rate", share, 0.6,
         measured("dense_share_of_gemm_rate", "bfloat16"), True),
        ("dense, float32, over torch", times, 1.5,
         measured("dense_speedup_over_torch", "float32"), True),
        ("attend: density x speed-up over dense", "{:.2f}", 0.9,
         measured("attend_efficiency"), True),
        ("select at 8192 tokens, of dense", share, 0.08,
         measured("select_share_of_dense", tokens=8192), False),
        ("select at 32768 tokens, of dense", share, 0.04,
         measured("select_share_of_dense", tokens=32768), False),
        ("workspace at 32768 tokens, of q, k and v", share, 0.1,
         measured("workspace_share_of_qkv", tokens=32768), False),
        ("demo: first token sooner than with torch", times, 3,
         [demo_report["speedup"]], True),
    )  # fmt: skip
    lines = ["| what | aim | worst measured | best measured | |", "| --- | --- | --- | --- | --- |"]
    for what, form, aim, values, more in rows:
        if not values:
            continue
        worst, best = (min(values), max(values)) if more else (max(values), min(values))
        met = worst >= aim if more else worst <= aim
        sign = "at least" if more else "at most"
        cells = (form.format(value) for value in (aim, worst, best))
        aim_text, worst_text, best_text = cells
        lines.append(
            f"| {what} | {sign} {aim_text} | {worst_text} | {best_text} "
            f"| {'met' if met else 'missed'} |"
        )
    return "\n".join([*lines, "", origin(report)])


BLOCKS = {"README.md": (attention, demo), "docs/notes.md": (aims,)}


def main() -> None:
    for file, blocks in BLOCKS.items():
        path = ROOT / file
        text = path.read_text()
        for block in blocks:
            start, end = f"<!-- figures: {block.__name__} -->\n", "<!-- end -->"
            before, found_start, rest = text.partition(start)
            _, found_end, after = rest.partition(end)
            if not (found_start and found_end):
                raise SystemExit(f"{file}: expected {start.strip()} and {end} behind it")
            text = f"{before}{start}{block()}\n{end}{after}"
        path.write_text(text)


if __name__ == "__main__":
    main()
