"""The table and the plots of a results folder."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

from flex_prefill.cli.common import format_table, require
from flex_prefill.eval.data import write_atomically

Rows = list[dict[str, Any]]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def labels(rows: Rows) -> list[str]:
    """The patterns, the model's own attention first."""
    found = {row["label"]: row["pattern"] for row in rows}
    return sorted(found, key=lambda label: (found[label] != "default", label))


def name_of(label: str) -> str:
    return "own attention" if label == "default" else label


def mean(rows: Rows, key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def means(rows: Rows) -> list[dict[str, Any]]:
    """Score and density, mean over tasks, of each suite, pattern and length."""
    found = []
    for suite in sorted({row["suite"] for row in rows}):
        for label in labels(rows):
            for length in sorted({row["length"] for row in rows}):
                cells = [
                    row
                    for row in rows
                    if (row["suite"], row["label"], row["length"]) == (suite, label, length)
                ]
                if not cells:
                    continue
                found.append(
                    {
                        "suite": suite,
                        "label": label,
                        "length": length,
                        "tasks": len(cells),
                        "samples": sum(cell["samples"] for cell in cells),
                        "score": mean(cells, "score"),
                        "density": mean(cells, "density"),
                    }
                )
    return found


def text_table(rows: Rows) -> str:
    """What the command prints: a line for each suite, pattern and length."""
    return format_table(
        ["suite", "pattern", "tokens", "tasks", "prompts", "score", "density"],
        [
            [
                row["suite"],
                name_of(row["label"]),
                short(row["length"]),
                str(row["tasks"]),
                str(row["samples"]),
                f"{100 * row['score']:.1f}",
                f"{row['density']:.2f}",
            ]
            for row in means(rows)
        ],
    )


def markdown(rows: Rows) -> str:
    """Tables of scores in per cent with densities in brackets, a suite's tasks as rows."""
    parts = []
    for suite in sorted({row["suite"] for row in rows}):
        of_suite = [row for row in rows if row["suite"] == suite]
        for length in sorted({row["length"] for row in of_suite}):
            cells = [row for row in of_suite if row["length"] == length]
            columns = labels(cells)
            lines = [
                f"| {suite}, {short(length)} tokens | " + " | ".join(map(name_of, columns)) + " |",
                "| --- |" + " --- |" * len(columns),
            ]
            by_cell = {(row["task"], row["label"]): row for row in cells}
            for task in dict.fromkeys(row["task"] for row in cells):
                shown = [_cell(by_cell.get((task, label))) for label in columns]
                lines.append(f"| {task} | " + " | ".join(shown) + " |")
            if len({row["task"] for row in cells}) > 1:
                shown = []
                for label in columns:
                    own = [row for row in cells if row["label"] == label]
                    shown.append(f"{100 * mean(own, 'score'):.1f} ({mean(own, 'density'):.2f})")
                lines.append("| mean | " + " | ".join(shown) + " |")
            parts.append("\n".join(lines))
    note = "Scores in per cent, mean ± standard error over prompts; in brackets the density."
    return "\n\n".join([*parts, note]) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    error = "" if row["standard_error"] is None else f" ± {100 * row['standard_error']:.1f}"
    return f"{100 * row['score']:.1f}{error} ({row['density']:.2f})"


def plot(rows: Rows, folder: Path) -> list[Path]:
    """accuracy.png (score against length) and pareto.png (score against density), a panel for
    each suite."""
    require("matplotlib", "plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    suites = sorted({row["suite"] for row in rows})
    names = labels(rows)
    lengths = sorted({row["length"] for row in rows})
    paths = []
    for kind in ("accuracy", "pareto"):
        figure, panels = plt.subplots(
            1,
            len(suites),
            figsize=(5.4 * len(suites) + 4.0, 4.0),
            layout="constrained",
            squeeze=False,
        )
        for axes, suite in zip(panels[0], suites, strict=True):
            for i, label in enumerate(names):
                points = [r for r in means(rows) if (r["suite"], r["label"]) == (suite, label)]
                if not points:
                    continue
                x = [p["length" if kind == "accuracy" else "density"] for p in points]
                y = [100 * p["score"] for p in points]
                axes.plot(
                    x,
                    y,
                    label=name_of(label),
                    color=_COLOURS[i % len(_COLOURS)],
                    marker=_MARKERS[i % len(_MARKERS)],
                    markersize=6,
                    # Beyond the last colour again from the first, hollow.
                    fillstyle="full" if i < len(_COLOURS) else "none",
                    linestyle="-" if kind == "accuracy" else ":",
                    linewidth=1.6 if kind == "accuracy" else 0.8,
                )
                if kind == "pareto":
                    ends = {p["length"] for p in (points[0], points[-1])}
                    for point, px, py in zip(points, x, y, strict=True):
                        if point["length"] not in ends:
                            continue
                        axes.annotate(
                            short(point["length"]),
                            (px, py),
                            textcoords="offset points",
                            xytext=(5, 4),
                            fontsize=7,
                            color="#555555",
                        )
            if kind == "accuracy":
                axes.set_xscale("log", base=2)
                axes.set_xticks(lengths, [short(n) for n in lengths])
                axes.minorticks_off()
                axes.set_xlabel("tokens")
            else:
                axes.set_xlabel("density (computed blocks / causal blocks)")
                axes.set_xlim(0, 1.06)
            axes.set_ylim(-3, 106)
            axes.set_title(f"{suite}: score, per cent", loc="left", fontsize=11)
            axes.grid(color="#dddddd", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        lines = dict(
            pair[::-1]
            for axes in panels[0]
            for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        )
        figure.legend(
            lines.values(), lines.keys(), loc="outside right center", frameon=False, fontsize=8
        )
        paths.append(folder / f"{kind}.png")
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110)
        plt.close(figure)
        write_atomically(paths[-1], picture.getvalue())
    return paths
