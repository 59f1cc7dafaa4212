"""Draws where a head attends and which blocks a pattern keeps of it, and lists the layer's heads.

Blue blocks are kept, orange ones left out; the darker, the more of its query block's attention lies
in a block. A good selection leaves nothing dark in orange. The map is the model's exact attention,
pooled over blocks; layers before the drawn one run on the model's own attention.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import flex_prefill
from flex_prefill.audit import Audit
from flex_prefill.block_index import BlockIndex
from flex_prefill.cli.common import (
    DTYPES,
    CommandError,
    add_pattern_arguments,
    check_context,
    choose_dtype,
    describe_pattern,
    find_model,
    format_table,
    load_model,
    load_torch,
    new_file,
    new_picture,
    pattern_config,
    pattern_from,
    positive,
    require,
    write_json,
    write_picture,
)
from flex_prefill.cli.layers import compare_layers, draw_layers
from flex_prefill.cli.prompts import (
    Prompt,
    add_prompt_arguments,
    check_prompt_arguments,
    make_prompt,
)
from flex_prefill.patch import pattern_of

SUMMARY = "draw a head's attention and the blocks that a pattern keeps"
EXAMPLE = """examples:
  flexprefill inspect --layer 3 --out heads.png
  flexprefill inspect --model ~/models/Qwen2.5-0.5B-Instruct --prompt-file book.txt \\
      --layer 12 --head 0 5 --gamma 0.95 --out heads.png"""

_MOST_PANELS = 4
_LEAST_MASS = 1e-4  # of a query block's attention, where the colours begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="Hugging Face folder (default: the built-in)"
    )
    add_prompt_arguments(parser)
    add_pattern_arguments(parser)
    parser.add_argument("--layer", type=int, help="default: the one in the middle")
    parser.add_argument(
        "--head",
        type=int,
        nargs="+",
        help=f"up to {_MOST_PANELS} (default: from the sparsest to the densest of the layer)",
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--threads", type=positive, default=0, help="default: all there are")
    parser.add_argument("--out", type=new_picture, default=Path("heads.png"), metavar="FILE.png")
    parser.add_argument(
        "--all-layers",
        type=new_picture,
        metavar="FILE.png",
        help="also compares every layer with dense attention and draws kept mass, error and "
        "density by layer and head",
    )
    parser.add_argument(
        "--json", type=new_file, metavar="FILE", help="the table; - is standard output"
    )


@dataclass(frozen=True)
class Layer:
    """What a layer's attention was given: q ``[1, s, h_q, d]``, k ``[1, s, h_kv, d]``."""

    q: Any
    k: Any
    scale: float


def run(args: argparse.Namespace) -> None:
    check_prompt_arguments(args)
    pattern, block_size = pattern_from(args)
    if args.head is not None and len(args.head) > _MOST_PANELS:
        raise CommandError(f"argument --head: expected at most {_MOST_PANELS}", usage=True)
    folder = find_model(args.model)
    require("matplotlib", "plot")
    torch = load_torch(args.threads, "transformers")
    require("transformers", "transformers")
    dtype, _ = choose_dtype(torch, args.dtype)
    model, tokenizer = load_model(folder, dtype)
    config = model.config.get_text_config()
    layer = config.num_hidden_layers // 2 if args.layer is None else args.layer
    _check_range("--layer", layer, config.num_hidden_layers)
    args.layer = layer
    pattern = pattern_from(args)[0]  # minfer has another for each layer
    for head in args.head or ():
        _check_range("--head", head, config.num_attention_heads)
    prompt = make_prompt(args, tokenizer)
    check_context(model, len(prompt.token_ids))

    print(f"reading {len(prompt.token_ids)} tokens up to layer {layer}", file=sys.stderr)
    with torch.inference_mode():
        given = capture(torch, model, prompt.token_ids, layer)
        index, audit = flex_prefill.select(
            given.q,
            given.k,
            pattern,
            softmax_scale=given.scale,
            block_size=block_size,
            num_threads=torch.get_num_threads(),
            audit=True,
        )
        heads = args.head or _spread(audit.density[0])
        maps = {head: pooled_attention(torch, given, head, block_size) for head in heads}
    kept = {
        head: float((maps[head] * index.to_mask(0, head)).sum() / len(maps[head])) for head in heads
    }
    report = {
        "model": str(folder),
        "tokens": len(prompt.token_ids),
        "layer": layer,
        "pattern": {"name": args.pattern, **pattern_config(args)},
        "density": audit.mean_density,
        "heads": _table(audit, kept),
    }
    title = (
        f"{folder.name}, layer {layer}, {len(prompt.token_ids)} tokens: "
        f"{describe_pattern(args.pattern, pattern_config(args))}"
    )
    draw(args.out, title, index, maps, kept, audit, prompt)
    if args.all_layers is not None:
        every = pattern_of(args.pattern, pattern_config(args))[0]
        costs = compare_layers(torch, model, prompt.token_ids, every, block_size)
        names = ("kept_mass", "error", "density")
        report["layers"] = dict(zip(names, costs.tolist(), strict=True))
        draw_layers(
            args.all_layers,
            f"{folder.name}, {len(prompt.token_ids)} tokens: "
            f"{describe_pattern(args.pattern, pattern_config(args))}",
            costs,
        )
    write_json(args.json, report)
    if str(args.json) != "-":
        _print(report)
        print(f"\nwrote {args.out}")


def _check_range(option: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise CommandError(
            f"argument {option}: expected 0 to {count - 1} for this model, got {value}", usage=True
        )


class _CapturedError(Exception):
    """Ends the forward pass once the layer's input is known."""


def capture(torch: Any, model: Any, token_ids: list[int], layer: int) -> Layer:
    """Runs the model up to the attention of `layer` and returns what that was given."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    captured: list[Layer] = []
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> tuple[Any, None]:
        if module.layer_idx != layer:
            result: tuple[Any, None] = own(module, query, key, value, mask, **kwargs)
            return result
        window = kwargs.get("sliding_window")
        if window is not None and window < query.shape[2]:
            raise CommandError(f"layer {layer} sees a sliding window of {window} tokens only")
        scale = kwargs.get("scaling") or query.shape[3] ** -0.5
        captured.append(Layer(query.transpose(1, 2), key.transpose(1, 2), scale))
        raise _CapturedError

    name = "flex_prefill_inspect"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        model(torch.tensor([token_ids]), use_cache=False)
    except _CapturedError:
        pass
    finally:
        model.set_attn_implementation(before)
    if not captured:
        raise CommandError(
            f"layer {layer} of {type(model).__name__} has no attention that can be looked at"
        )
    return captured[0]


def pooled_attention(
    torch: Any, layer: Layer, head: int, block_size: int
) -> npt.NDArray[np.float32]:
    """Exact causal attention of one head: ``[n, n]``, a row the mean over its queries, sum 1."""
    group = layer.q.shape[2] // layer.k.shape[2]
    q, k = layer.q[0, :, head].float(), layer.k[0, :, head // group].float()
    tokens = len(q)
    n = -(-tokens // block_size)
    pooled = torch.zeros(n, n)
    for i in range(n):
        start, stop = i * block_size, min((i + 1) * block_size, tokens)
        scores = q[start:stop] @ k[:stop].T * layer.scale
        scores[:, start:].masked_fill_(
            torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1), -torch.inf
        )
        mass = scores.softmax(-1).mean(0)
        pooled[i].scatter_add_(0, torch.arange(stop) // block_size, mass)
    result: npt.NDArray[np.float32] = pooled.numpy()
    return result


def _spread(density: npt.NDArray[np.float32]) -> list[int]:
    """Heads from the sparsest to the densest."""
    order = np.argsort(density, kind="stable")
    places = np.linspace(0, len(order) - 1, min(_MOST_PANELS, len(order))).round().astype(int)
    return [int(head) for head in order[places]]


def _table(audit: Audit, kept: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {
            "head": head,
            "pattern": str(audit.pattern[0, head]),
            "jsd_sqrt": float(audit.jsd_sqrt[0, head]),
            "vertical_blocks": int(audit.vertical_blocks[0, head]),
            "slash_blocks": int(audit.slash_blocks[0, head]),
            "density": float(audit.density[0, head]),
            "kept_mass_probe": float(audit.kept_mass[0, head]),
            "kept_mass_all_queries": kept.get(head),
            "least_row_mass": float(audit.least_row_mass[0, head]),
            "rows_below_gamma": int(audit.rows_below_gamma[0, head]),
        }
        for head in range(audit.density.shape[1])
    ]


def _print(report: dict[str, Any]) -> None:
    header = ["head", "pattern", "jsd_sqrt", "vertical", "slash", "density", "kept", "kept by all"]
    rows = [
        [
            str(row["head"]),
            row["pattern"],
            f"{row['jsd_sqrt']:.3f}",
            str(row["vertical_blocks"]),
            str(row["slash_blocks"]),
            f"{row['density']:.3f}",
            f"{row['kept_mass_probe']:.3f}",
            "" if (kept := row["kept_mass_all_queries"]) is None else f"{kept:.3f}",
        ]
        for row in report["heads"]
    ]
    print(format_table(header, rows))
    print(
        f"\nmean density of layer {report['layer']}: {report['density']:.3f}\n"
        "kept: share of the attention of the last queries, which the pattern looks at, in kept "
        "blocks; kept by all: of all queries, for the drawn heads"
    )
    below = [row for row in report["heads"] if row["rows_below_gamma"]]
    if below:
        print(
            f"max_budget: {sum(row['rows_below_gamma'] for row in below)} query blocks of "
            f"{len(below)} heads keep less than gamma of their map, the least "
            f"{min(row['least_row_mass'] for row in below):.3f}"
        )


def draw(
    path: Path,
    title: str,
    index: BlockIndex,
    maps: dict[int, npt.NDArray[np.float32]],
    kept: dict[int, float],
    audit: Audit,
    prompt: Prompt,
) -> None:
    """The drawn heads' maps in a row, all heads of the layer below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    norm = LogNorm(_LEAST_MASS, 1, clip=True)
    kept_colours, other_colours = plt.get_cmap("Blues"), plt.get_cmap("Oranges")
    columns = max(len(maps), 2)
    figure = plt.figure(figsize=(3.2 * columns + 0.9, 5.6), layout="constrained")
    grid = figure.add_gridspec(
        2, columns + 1, width_ratios=[*[1] * columns, 0.1], height_ratios=[3.2, 1.2]
    )
    figure.suptitle(title, fontsize=11)
    tokens = len(prompt.token_ids)
    for column, (head, mass) in enumerate(maps.items()):
        axes = figure.add_subplot(grid[0, column])
        shade = norm(mass)
        mask = index.to_mask(0, head)
        image = np.where(mask[..., None], kept_colours(shade), other_colours(shade))
        image[np.triu_indices(len(mass), 1)] = 1
        axes.imshow(image, extent=(0, tokens, tokens, 0), interpolation="nearest")
        density = audit.density[0, head]
        axes.set_title(
            f"head {head}\n{density:.0%} of the blocks hold {kept[head]:.1%} of the attention",
            fontsize=9,
        )
        axes.set_xlabel("key", fontsize=9)
        axes.set_ylabel("query" if column == 0 else "", fontsize=9)
        ticks, names = _ticks(tokens)
        axes.set_xticks(ticks, names, fontsize=8)
        axes.set_yticks(ticks, names if column == 0 else [""] * len(names), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if prompt.answer_depth is not None:
            place = (prompt.answer_depth, prompt.answer_depth)
            axes.plot(*place, marker="x", color="black", markersize=6)
            axes.annotate(
                "answer stated here" if column == 0 else "",
                place,
                xytext=(5, 2) if place[0] < 0.6 * tokens else (2, 5),
                textcoords="offset points",
                horizontalalignment="left" if place[0] < 0.6 * tokens else "right",
                verticalalignment="bottom",
                fontsize=8,
            )

    # One scale for both colours: the left half of the bar is for blocks left out.
    bar = figure.add_subplot(grid[0, columns])
    scale = np.linspace(0, 1, 256)[:, None]
    halves = np.concatenate([other_colours(scale), kept_colours(scale)], axis=1)
    bar.imshow(halves, origin="lower", aspect="auto", extent=(0, 2, 0, 1))
    bar.set_xticks([0.5, 1.5], ["left out", "kept"], fontsize=8, rotation=90)
    powers = [0, -1, -2, -3, -4]
    bar.set_yticks([norm(10.0**p) for p in powers], [f"{10.0**p:.4g}" for p in powers], fontsize=8)
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.set_ylabel("share of a query block's attention", fontsize=8)

    axes = figure.add_subplot(grid[1, :])
    heads = np.arange(audit.density.shape[1])
    axes.bar(
        heads,
        audit.density[0],
        width=0.6,
        color=["#2171b5" if head in maps else "#9ecae1" for head in heads],
        label="density (drawn heads darker)",
    )
    axes.plot(
        heads,
        audit.kept_mass[0],
        "D",
        color="#d55e00",
        markersize=5,
        clip_on=False,
        label="share of the last queries' attention in kept blocks",
    )
    axes.set_ylim(0, 1)
    axes.set_xticks(heads[:: -(-len(heads) // 32)])
    axes.set_xlabel("head", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    write_picture(path, figure, dpi=110)


def _ticks(tokens: int) -> tuple[list[int], list[str]]:
    """About four round places on an axis of tokens, and their names."""
    step = 1 << max((tokens // 4).bit_length() - 1, 0)
    ticks = list(range(0, tokens + 1, step))
    return ticks, [f"{tick // 1024}k" if step >= 1024 and tick else str(tick) for tick in ticks]
