"""Puts the figures of bench/results into README.md and docs, between their marks.

results/gpu.json, once there is one, needs the marks of `gpu` in README.md, and is drawn as well. So
is results/eval_needle.json: the results.json of `flexprefill eval` with the built-in model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
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
        ("dense, float32, of torch's GEMM rate", share, None,
         measured("dense_share_of_gemm_rate", "float32"), True),
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
        if aim is None:
            aim_text, verdict = "none", ""
        else:
            met = worst >= aim if more else worst <= aim
            aim_text = f"{'at least' if more else 'at most'} {form.format(aim)}"
            verdict = "met" if met else "missed"
        if form is share and worst > 5:
            verdict = "says nothing"  # a product without vector code
        lines.append(
            f"| {what} | {aim_text} | {form.format(worst)} | {form.format(best)} | {verdict} |"
        )
    return "\n".join([*lines, "", origin(report)])


def gpu_plot(report: dict[str, Any], path: Path) -> None:
    """Time against length, both logarithmic, ours and every peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("prefill", "structured input"),
        ("dense", "every block"),
        ("attend", "20 % of blocks"),
    )
    ours = {"prefill", "select", "dense", "attend"}
    figure, all_axes = plt.subplots(1, len(panels), figsize=(13, 4.4), layout="constrained")
    for axes, (section, title) in zip(all_axes, panels, strict=True):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in report["rows"]:
            if row["section"] == section and not (section == "prefill" and row["what"] == "attend"):
                series.setdefault(row["what"], []).append((row["tokens"], row["ms"]))
        for i, (name, points) in enumerate(series.items()):
            own = name.split()[0] in ours
            style = {"linewidth": 2.5, "marker": "o"} if own else {"linewidth": 1.2, "marker": "."}
            label = f"flexprefill: {name}" if own else name
            axes.plot(*zip(*sorted(points), strict=True), label=label, color=f"C{i}", **style)
        lengths = sorted({n for points in series.values() for n, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{section}: {title}, ms", loc="left", fontsize=11)
        if series:
            axes.legend(frameon=False, fontsize=8)
    settings = report["settings"]
    heads = f"{settings['heads']} query and {settings['kv_heads']} K/V heads"
    figure.suptitle(
        f"{report['card']['card']}: {heads}, d {settings['head_dim']}, {settings['dtype']}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def gpu() -> str:
    """What the GPU benchmark found: ours, and how many times as long each peer takes."""
    report = load("gpu")
    rows = []
    for case in report["ratios"]:
        if case["section"] not in ("attend", "dense", "prefill"):
            continue
        others = {k: x for k, x in case["times_as_long"].items() if k not in ("select", "attend")}
        peers = ", ".join(f"{name} {x:.2f}x" for name, x in others.items())
        rows.append(f"| {case['section']} | {case['tokens']} | {case['ms']:.3f} | {peers} |")
    card = report["card"]
    return (
        "| | tokens | ms | how many times as long others take |\n| --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + f"\n\nMeasured on {report['date'][:10]} at commit {report['commit']}: {card['card']}, "
        f"driver {card['driver_version']}, CUDA {card['cuda']}, "
        f"torch {report['versions']['torch']}; `{report['command']}`."
    )


def select_times() -> str:
    """What each pattern's selection takes on a GPU, and how much of the input it kept."""
    report = load("gpu")
    times: dict[str, dict[int, str]] = {}
    for row in report["rows"]:
        if row["section"] == "patterns" and row["what"].startswith("select "):
            name = row["what"].removeprefix("select ")
            times.setdefault(name, {})[row["tokens"]] = f"{row['ms']:.3f} ({row['density']:.2f})"
    lengths = sorted({tokens for of_pattern in times.values() for tokens in of_pattern})
    lines = [
        "| `select`, ms (density) | " + " | ".join(f"{n // 1024}k" for n in lengths) + " |",
        "| --- |" + " --- |" * len(lengths),
        *(
            f"| {name} | " + " | ".join(found.get(n, "") for n in lengths) + " |"
            for name, found in times.items()
        ),
    ]
    settings = report["settings"]
    return "\n".join(lines) + (
        f"\n\n{report['card']['card']}, {settings['heads']} query and {settings['kv_heads']} K/V "
        f"heads of {settings['head_dim']}, {settings['dtype']}, structured input; "
        f"{report['date'][:10]}, commit {report['commit']}, `{report['command']}`."
    )


def eval_needle() -> str:
    """The built-in model under every pattern: right answers and density by length, and pictures."""
    from flex_prefill.eval.report import means, name_of, plot, short

    if not (RESULTS / "eval_needle.json").is_file():
        return "Not measured yet."
    report = load("eval_needle")
    rows = report["results"]
    with tempfile.TemporaryDirectory() as folder:
        for picture in plot(rows, Path(folder)):
            shutil.move(picture, ROOT / "docs" / "images" / f"eval_{picture.name}")
    found = means(rows)
    lengths = sorted({row["length"] for row in found})
    cells = {
        (row["label"], row["length"]): f"{100 * row['score']:.1f} ({row['density']:.2f})"
        for row in found
    }
    lines = [
        "| right answers, % (density) | " + " | ".join(map(short, lengths)) + " |",
        "| --- |" + " --- |" * len(lengths),
        *(
            f"| {name_of(label)} | " + " | ".join(cells.get((label, n), "") for n in lengths) + " |"
            for label in dict.fromkeys(row["label"] for row in found)
        ),
    ]
    samples = sorted({row["samples"] for row in found})
    return "\n".join(lines) + (
        f"\n\n{' or '.join(map(str, samples))} prompts of each length, of three kinds. "
        f"{report['machine']['device']}, {report['date'][:10]}, commit {report['commit']}, "
        f"`{report['command']}`.\n\n"
        "![Right answers against length, a line for each pattern](images/eval_accuracy.png)\n\n"
        "![Right answers against density](images/eval_pareto.png)"
    )


BLOCKS: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (attention, demo),
    "docs/notes.md": (aims,),
    "docs/block_cover.md": (select_times,),
    "docs/eval.md": (eval_needle,),
}


def main() -> None:
    if (RESULTS / "gpu.json").is_file():
        gpu_plot(load("gpu"), ROOT / "docs" / "images" / "gpu.png")
        BLOCKS["README.md"] = (*BLOCKS["README.md"], gpu)
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
