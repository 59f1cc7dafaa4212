"""The picture of ``inspect --all-layers``: what the pattern costs, by layer and head."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import flex_prefill
from flex_prefill.cli.common import CommandError, require, write_picture
from flex_prefill.minference import LayerPatterns
from flex_prefill.patterns import Pattern

_NAME = "flex_prefill_layers"


def compare_layers(
    torch: Any,
    model: Any,
    token_ids: list[int],
    pattern: Pattern | LayerPatterns,
    block_size: int,
    rows: int = 64,
) -> npt.NDArray[np.float64]:
    """Kept mass, error of the output and density, ``[3, layers, heads]``, against dense attention.

    Every layer gets the input that dense attention gives it, so a layer's error is its own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config.get_text_config()
    figures = np.full((3, config.num_hidden_layers, config.num_attention_heads), np.nan)
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        result: tuple[Any, Any] = own(module, query, key, value, mask, **kwargs)
        layer = module.layer_idx
        window = kwargs.get("sliding_window")
        if window is not None and window < query.shape[2]:
            return result  # left to the model's own attention
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        chosen = pattern.of(layer, q.shape[2]) if isinstance(pattern, LayerPatterns) else pattern
        options: dict[str, Any] = {
            "softmax_scale": kwargs.get("scaling"),
            "block_size": block_size,
            "num_threads": torch.get_num_threads(),
        }
        index, audit = flex_prefill.select(q, k, chosen, audit=True, **options)
        out = flex_prefill.attend(q, k, v, index, **options)
        cost = flex_prefill.compare_with_dense(q, k, v, out, index, rows=rows, **options)
        figures[:, layer] = cost.kept_mass[0], cost.error[0], audit.density[0]
        print(f"layer {layer + 1} of {figures.shape[1]}", file=sys.stderr)
        return result

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        with torch.inference_mode():
            model(torch.tensor([token_ids]), use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    if np.isnan(figures[0]).all():
        raise CommandError(f"{type(model).__name__} has no attention that can be looked at")
    return figures


def draw_layers(path: Path, title: str, figures: npt.NDArray[np.float64]) -> None:
    """Three maps side by side; layers that were not looked at stay white."""
    matplotlib = require("matplotlib", "plot")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ("kept attention mass", "error of the output", "density")
    maps = ("viridis", "magma_r", "viridis")
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    figure.suptitle(f"{title}, against dense attention", fontsize=11)
    for axis, name, colours, values in zip(axes, names, maps, figures, strict=True):
        top = 1.0 if name != names[1] else max(float(np.nanmax(values)), 1e-6)
        image = axis.imshow(values, cmap=colours, vmin=0, vmax=top, aspect="auto")
        axis.set_title(f"{name} (mean {np.nanmean(values):.3f})", fontsize=10)
        axis.set_xlabel("head", fontsize=9)
        axis.tick_params(labelsize=8)
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("layer", fontsize=9)
    write_picture(path, figure, dpi=110)
