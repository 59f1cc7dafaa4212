"""Pictures and tables of results/, into docs/images and docs/block_cover.md: python plots.py"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "block_cover.md"

Row = dict[str, Any]

# Family of a variant: what it is called, how it is drawn. The first that matches.
FAMILIES = [
    (r"dense", "dense", "#000000", "x"),
    (r"block_cover:column_share=0", "block_cover without columns", "#56b4e9", "v"),
    (r"block_cover|map:decide=row(?!.*(sq=|mc=|cols=))", "block_cover", "#0072b2", "o"),
    (r"flex", "flex_prefill (the published rule)", "#d55e00", "s"),
    (r"xatt", "xattention", "#009e73", "^"),
    (r"flash(?!.*mean_correction=0)(?!:alpha=\.08$)", "flash_prefill, corrected", "#cc79a7", "D"),
    (r"flash", "flash_prefill", "#8a6d9b", "d"),
    (r"vertical", "vertical_slash", "#e69f00", "P"),
    (r"stream", "streaming_llm", "#999999", "p"),
]


def load(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return report


def family(variant: str) -> tuple[str, str, str] | None:
    for pattern, *style in FAMILIES:
        if re.match(pattern, variant):
            return style[0], style[1], style[2]
    return None  # what was tried beside the pattern


def scatter(axes: Any, rows: list[Row], value: Any) -> None:
    """Density against value(row); points of one family joined."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        style = family(row["variant"])
        if style is not None and style[0] != "dense":
            groups.setdefault(style, []).append(row)
    for (name, colour, marker), members in groups.items():
        members.sort(key=lambda row: row["density"])
        x, y = [row["density"] for row in members], [value(row) for row in members]
        axes.plot(x, y, marker=marker, color=colour, label=name, linewidth=1, markersize=5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def legend(figure: Any, axes: Any, columns: int) -> None:
    seen: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=columns, frameon=False
    )


def draw_scores(report: dict[str, Any], path: Path) -> None:
    """Perplexity, retrieval and answer log-prob against density, a column for each length."""
    lengths = sorted({row["length"] for row in report["rows"]})
    figure, grid = plt.subplots(
        3, len(lengths), figsize=(11, 7), sharex="col", sharey="row", layout="constrained"
    )
    figure.suptitle(f"{report['model']}, {report['split']} split, {report['machine']}", fontsize=10)
    values = [
        ("perplexity over dense, %", lambda row: 100 * (row["ppl_over_dense"] - 1)),
        ("right answers, %", lambda row: row["right"]),
        ("answer log-prob less dense's", lambda row: row["logprob6_minus_dense"]),
    ]
    for column, length in enumerate(lengths):
        rows = [row for row in report["rows"] if row["length"] == length]
        dense = next(row for row in rows if row["variant"] == "dense")
        for (name, value), axes in zip(values, grid[:, column], strict=True):
            scatter(axes, rows, value)
            axes.axhline(value(dense), color="#000000", linewidth=0.8, linestyle=":")
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
        grid[0, column].set_title(
            f"{length // 1024}k tokens, {dense['prompts']} prompts", fontsize=9
        )
        grid[2, column].set_xlabel("density", fontsize=9)
    grid[0, 0].set_yscale("symlog", linthresh=1)
    grid[0, 0].set_yticks([0, 1, 3, 10, 30], ["0", "1", "3", "10", "30"])
    grid[0, 0].set_ylim(0, 45)
    grid[2, 0].set_ylim(-1.6, 1)
    legend(figure, grid[0], 4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_summary(report: dict[str, Any], path: Path) -> None:
    """README's: perplexity against density, a line for each pattern from 4k to 32k tokens."""
    shown = [
        "flex_prefill:min_budget=512",
        "vertical_slash:vertical_size=1024,slash_size=1024",
        "xattention:threshold=.9",
        "flash_prefill:alpha=.08",
        "block_cover",
    ]
    names = ["flex_prefill", "vertical_slash", "xattention", "flash_prefill", "block_cover"]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for variant, name in zip(shown, names, strict=True):
        style = family(variant)
        assert style is not None
        rows = [row for row in report["rows"] if row["variant"] == variant]
        x, y = [row["density"] for row in rows], [100 * (row["ppl_over_dense"] - 1) for row in rows]
        axes.plot(x, y, marker=style[2], color=style[1], label=name, linewidth=1.2)
        for row, at in zip(rows, zip(x, y, strict=True), strict=True):
            text = f"{row['length'] // 1024}k"
            axes.annotate(text, at, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_yscale("log")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 40], ["0.5", "1", "2", "5", "10", "20", "40"])
    axes.minorticks_off()
    axes.set_xlabel("density: kept blocks / causal blocks", fontsize=9)
    axes.set_ylabel("perplexity over dense, %", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_offline(reports: list[dict[str, Any]], path: Path) -> None:
    """Kept mass and output error against density, a column for each model."""
    figure, grid = plt.subplots(
        2, len(reports), figsize=(9, 6.4), sharex=True, sharey="row", layout="constrained"
    )
    for column, report in enumerate(reports):
        for row, (key, name) in enumerate(
            [("kept", "mean kept mass"), ("error", "relative error of the output")]
        ):
            scatter(grid[row, column], report["rows"], lambda r, key=key: r[key])
            if column == 0:
                grid[row, column].set_ylabel(name, fontsize=9)
        length = report["rows"][0]["length"]
        grid[0, column].set_title(f"{report['model']}, {length // 1024}k tokens", fontsize=9)
        grid[1, column].set_xlabel("density", fontsize=9)
    grid[0, 0].set_xlim(0, 0.75)
    grid[0, 0].set_ylim(0.7, 1)
    grid[1, 0].set_ylim(0, 0.4)
    legend(figure, grid[0], 3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- Tables -------------------------------------------------------------------------------------


def score_table(report: dict[str, Any], variants: dict[str, str]) -> str:
    lines = [
        "| tokens | | density | perplexity | over dense | right % | log-prob | less dense's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for length in sorted({row["length"] for row in report["rows"]}):
        first = f"{length // 1024}k"
        for row in report["rows"]:
            if row["length"] != length or row["variant"] not in variants:
                continue
            difference = f"{row['logprob6_minus_dense']:+.2f} ± {row['logprob6_error']:.2f}"
            over = f"{100 * (row['ppl_over_dense'] - 1):+.2f} %"
            if row["variant"] == "dense":
                difference = over = ""
            lines.append(
                f"| {first} | {variants[row['variant']]} | {row['density']:.3f} | {row['ppl']:.3f} "
                f"| {over} | {row['right']:.1f} | {row['logprob6']:.2f} | {difference} |"
            )
            first = ""
    lines.append("")
    lines.append(
        f"{report['model']}, {report['split']} split; {report['machine']}, {report['date']}."
    )
    return "\n".join(lines)


def offline_table(reports: list[dict[str, Any]], variants: dict[str, str]) -> str:
    header = "| | " + " | ".join(
        f"{r['model']}: density, kept, least head, error, error of the last" for r in reports
    )
    lines = [header + " |", "| --- |" + " --- |" * len(reports)]
    for variant, name in variants.items():
        cells = []
        for report in reports:
            row = next(row for row in report["rows"] if row["variant"] == variant)
            figures = (row[k] for k in ("density", "kept", "least_kept", "error", "error_last"))
            cells.append(" ".join(f"{x:.3f}".lstrip("0") for x in figures))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put(page: Path, mark: str, text: str) -> None:
    """Replaces what stands between a page's marks."""
    begin, end = f"<!-- figures: {mark} -->\n", "<!-- end -->"
    before, _, rest = page.read_text().partition(begin)
    if not rest:
        raise SystemExit(f"{page}: expected the mark {begin.strip()}")
    page.write_text(f"{before}{begin}{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    test, dev = load("qwen2.5-coder-0.5b_test"), load("qwen2.5-coder-0.5b_dev")
    draw_scores(test, IMAGES / "block_cover_test.png")
    draw_summary(test, IMAGES / "block_cover.png")
    offline = [load("offline_qwen2.5-coder-0.5b"), load("offline_smollm2-135m")]
    draw_offline(offline, IMAGES / "block_cover_offline.png")
    names = {
        "dense": "dense",
        "flex_prefill:min_budget=512": "flex_prefill, .9, budget 512",
        "flex_prefill:min_budget=1024": "flex_prefill, .9, budget 1024",
        "vertical_slash:vertical_size=1024,slash_size=1024": "vertical_slash, 1024 + 1024",
        "streaming_llm:global_window=1024,local_window=4096": "streaming_llm, 1024 + 4096",
        "xattention:threshold=.9": "xattention, .9",
        "flash_prefill:alpha=.08,mean_correction=0": "flash_prefill, .08, no correction",
        "flash_prefill:alpha=.08": "flash_prefill, .08",
        "block_cover:gamma=.8": "block_cover, .8",
        "block_cover:gamma=.85": "block_cover, .85",
        "block_cover": "**block_cover, .9 (default)**",
        "block_cover:gamma=.93": "block_cover, .93",
        "block_cover:gamma=.95": "block_cover, .95",
        "block_cover:gamma=.97": "block_cover, .97",
        "block_cover:column_share=0": "block_cover, .9, no columns",
    }
    put(PAGE, "test", score_table(test, names))
    put(PAGE, "smollm2", score_table(load("smollm2-135m_test"), names))
    small = load("qwen2.5-coder-0.5b_blocks64")
    names |= {
        "block_cover": "block_cover, .9",
        "block_cover:gamma=.86,block_size=64": "**block_cover, .86, blocks of 64**",
        "block_cover:gamma=.87,block_size=64": ".87, blocks of 64",
        "block_cover:gamma=.88,block_size=64": ".88, blocks of 64",
        "block_cover:gamma=.93,block_size=64": ".93, blocks of 64",
        "block_cover:gamma=.95,block_size=64": ".95, blocks of 64",
    }
    put(PAGE, "smollm2 blocks64", score_table(load("smollm2-135m_blocks64"), names))
    put(PAGE, "blocks64", score_table(small, names))
    put(PAGE, "blocks64 more", score_table(small | {"rows": small["rows_more"]}, names))
    put(PAGE, "blocks64 dev", score_table(load("qwen2.5-coder-0.5b_dev_blocks64"), names))
    share = load("qwen2.5-coder-0.5b_column_share")
    names |= {
        "block_cover:column_share=.9": "**block_cover, .9, column_share .9**",
        "block_cover:column_share=.95": "column_share .95",
        "block_cover:gamma=.9,block_size=64": ".9, blocks of 64",
        "block_cover:gamma=.92,block_size=64": ".92, blocks of 64",
        "block_cover:gamma=.92,block_size=64,column_share=.9": ".92, blocks of 64, column_share .9",
    }
    put(PAGE, "32k", score_table(share, names))
    dev_32k = [row for row in share["rows_dev"] if row["length"] == 32768]
    put(PAGE, "32k dev", score_table(share | {"rows": dev_32k, "split": "dev"}, names))
    means_of = "map:decide=row,use=last,mbf=1,local=3,g=.92,sq={},sk={},block_size=64"
    exact = "map:decide=row,exact=1,g={},use=last,local=3,block_size=64"
    put(
        PAGE,
        "smollm2 exact",
        score_table(
            load("smollm2-135m_exact"),
            {
                "dense": "dense",
                "flex_prefill:min_budget=512": "flex_prefill, .9, budget 512",
                means_of.format(16, 16): "map of means of 16, .92",
                means_of.format(8, 8): "of 8, .92",
                means_of.format(4, 4): "of 4, .92",
                exact.format(".86"): "exact masses, .86",
                exact.format(".9"): "exact masses, .9",
                exact.format(".92"): "exact masses, .92",
            },
        ),
    )
    of_64 = "map:decide=row,g={},use=last,mbf=1{},block_size=64"
    tried = {
        "flex_prefill:min_budget=512": "published, gamma .9, budget 512",
        "block_cover": "blocks of 128, .9",
        of_64.format(".9", ""): "blocks of 64, .9: means of 32, one neighbour",
        of_64.format(".85", ""): ".85",
        of_64.format(".9", ",local=3"): ".9, two neighbours",
        of_64.format(".88", ",local=3"): ".88, two neighbours",
        of_64.format(".85", ",local=3"): ".85, two neighbours",
        of_64.format(".85", ",local=4"): ".85, three neighbours",
        "map:decide=row,use=last,mbf=1,g=.87,local=3,sq=16,sk=16,block_size=64":
            ".87, two neighbours, means of 16",
        "block_cover:gamma=.86,block_size=64":
            "**.86, two neighbours, means of 16** (the rule, through the library)",
    }  # fmt: skip
    put(ROOT / "docs" / "notes.md", "blocks64", score_table(small, tried))
    base = "map:decide=cal,g=.85,crows=64,rows=64,use=last"
    tried = {
        "dense": "dense",
        "flex:g=.9,budget=512": "published, gamma .9, budget 512",
        "map": "flat cover .85, columns for all rows (the start)",
        "map:use=last,g=.87": "flat cover .87",
        "map:decide=row,g=.83,use=last": "cover by row .83",
        "map:decide=max,g=.03,use=last": "share .03 of the row's best",
        "map:decide=cal,g=.8,crows=64,rows=64,use=last": "C at .8",
        base: "C: threshold calibrated to .85, 64 asking rows",
        "map:decide=cal,g=.9,crows=64,rows=64,use=last": "C at .9",
        base.replace("rows=64,use", "rows=128,use"): "C, 128 asking rows",
        base.replace("use=last", "use=all"): "C, columns for all rows",
        base + ",cols=each,c=.9": "C, each asking row its own cover of .9",
        base + ",sq=128,sk=64": "C, map of 128 queries by 64 keys",
        base + ",mc=1": "C, mean correction",
    }
    put(ROOT / "docs" / "notes.md", "block_cover dev", score_table(dev, tried))
    chosen = {
        "flex_prefill:min_budget=512": "flex_prefill, .9, budget 512",
        "flex_prefill:min_budget=1024": "flex_prefill, .9, budget 1024",
        "vertical_slash:vertical_size=1024,slash_size=1024": "vertical_slash, 1024 + 1024",
        "streaming_llm:global_window=1024,local_window=2048": "streaming_llm, 1024 + 2048",
        "xattention:threshold=.9": "xattention, .9",
        "flash_prefill:alpha=.1,mean_correction=0": "flash_prefill, .1, no correction",
        "flash_prefill:alpha=.1": "flash_prefill, .1",
        "block_cover:gamma=.8": "block_cover, .8",
        "block_cover": "block_cover, .9",
        "block_cover:column_share=0": "block_cover, .9, no columns",
        "block_cover:gamma=.95": "block_cover, .95",
    }
    put(PAGE, "offline", offline_table(offline, chosen))


if __name__ == "__main__":
    main()
