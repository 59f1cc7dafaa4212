"""Patterns by their published names, and patching of Hugging Face models with them.

    model = AutoModelForCausalLM.from_pretrained(path)
    patch_model(model, "flex_prefill", {"flex_prefill_gamma": 0.9})
    model.generate(...)     # long prompts sparse, decoding on the model's own attention
    unpatch_model(model)

Names, meanings and defaults are those of the method's published code. Nothing here needs torch or
transformers until a model is patched.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flex_prefill import minference
from flex_prefill.patterns import (
    BlockCover,
    Dense,
    FlashPrefill,
    FlexPrefill,
    StreamingLlm,
    VerticalSlash,
    XAttention,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What each pattern can be configured with, and the defaults.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "default": {},
    "flash": {},
    "streaming_llm": {"global_window": 1024, "local_window": 8192},
    "vertical_slash": {"block_size": 128, "vertical_size": 8192, "slash_size": 8192},
    "flex_prefill": {
        "block_size": 128,
        "flex_prefill_gamma": 0.9,
        "flex_prefill_tau": 0.1,
        "flex_prefill_min_budget": 1024,
        "flex_prefill_max_budget": None,
    },
    "xattention": {"block_size": 128, "stride": 16, "threshold": 0.9},
    "flash_prefill": {
        "block_size": 128,
        "alpha": 0.1,
        "global_window": 256,
        "local_window": 512,
        "last_queries": 1024,
        "mean_correction": True,
    },
    "block_cover": {"block_size": 128, "gamma": 0.9, "column_share": 0.8, "max_budget": None},
    "minfer": {"block_size": 128, "model_type": None, "path": None},
}
_BLOCK_SIZES = (32, 64, 128)
# Options that are shares of something, and whether 0 is allowed.
_SHARES = {
    "flex_prefill_gamma": False,
    "flex_prefill_tau": True,
    "threshold": False,
    "alpha": True,
    "gamma": False,
    "column_share": True,
}
_DEFAULT_BLOCK_SIZE = 128


def get_config_example(pattern: str = "flex_prefill") -> dict[str, Any]:
    """The keys that `patch_model(model, pattern, cfg)` takes, with their defaults, as a new dict.

    `minfer` needs one of `model_type` and `path` set. Raises ValueError for an unknown pattern.
    """
    _check_pattern(pattern)
    return dict(_DEFAULTS[pattern])


def patch_model(
    model: PreTrainedModel, pattern: str = "flex_prefill", cfg: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Gives the decoder layers of a transformers model a sparse prefill, in place.

    pattern: `flex_prefill`, `vertical_slash`, `streaming_llm`, `xattention`, `flash_prefill`,
        `block_cover`, `minfer` (per-head patterns of a file in MInference's format), `flash` (every
        block, computed by this library) or `default` (the model's own attention again).
    cfg: keys of `get_config_example(pattern)`; what is not given has its default. Sizes, windows
        and budgets count tokens.

    Decoding, and whatever this library does not compute (sliding windows, soft capping, attention
    sinks, masks of the caller's own, gradients; docs/transformers.md has the list), stays on the
    attention that the model had. Patching again replaces the pattern. Returns the model.

    Raises ValueError for an unknown pattern or key, for a value out of range, for a model that is
    not a causal decoder of transformers with exchangeable attention, and for `minfer` without a
    file or with one of another model. The model is unchanged then.
    """
    checked = check_config(pattern, cfg)
    from flex_prefill import hf

    if pattern == "default":
        hf.restore_own_attention(model)
    else:
        hf.register_on_model(model, pattern, checked)
    return model


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a patched model its own attention back, as `patch_model(model, "default")` does."""
    return patch_model(model, "default")


def disable_hf_flash_attention_check() -> None:
    """Lets models that ask for `flash_attention_2` load where it is not installed.

    A model whose class or caller asks for flash attention then gets transformers' default
    attention, with a warning, instead of an ImportError; a patched model's prefill is this
    library's anyway. For the whole process; calling it again changes nothing.
    """
    from flex_prefill import hf

    hf.tolerate_missing_flash_attention()


def check_config(pattern: str, cfg: Mapping[str, Any] | None) -> dict[str, Any]:
    """`cfg` checked and filled up with the defaults of `pattern`."""
    _check_pattern(pattern)
    if cfg is not None and not isinstance(cfg, Mapping):
        raise ValueError(f"cfg: expected a dict, got {type(cfg).__name__}")
    checked = dict(_DEFAULTS[pattern])
    for key, value in (cfg or {}).items():
        if key not in checked:
            raise ValueError(
                f"cfg: expected keys of pattern {pattern!r}, got {key!r}"
                + _suggestion(key, checked, "keys")
            )
        checked[key] = _check_value(key, value)
    least, most = (checked.get(f"flex_prefill_{end}_budget") for end in ("min", "max"))
    if most is not None and most < least:
        raise ValueError(
            f"flex_prefill_max_budget: expected at least flex_prefill_min_budget = {least}, "
            f"got {most}"
        )
    if pattern == "minfer":
        minference.resolve(checked["model_type"], checked["path"])
    return checked


def pattern_of(pattern: str, checked: Mapping[str, Any]) -> tuple[Any, int]:
    """The pattern object and the block size that `check_config`'s dict stands for; of `minfer` the
    LayerPatterns."""
    block_size = checked.get("block_size", _DEFAULT_BLOCK_SIZE)
    if pattern == "minfer":
        return minference.resolve(checked["model_type"], checked["path"]), block_size
    values = {
        key.removeprefix("flex_prefill_"): value
        for key, value in checked.items()
        if key != "block_size"
    }
    kinds = {
        "flash": Dense,
        "streaming_llm": StreamingLlm,
        "vertical_slash": VerticalSlash,
        "flex_prefill": FlexPrefill,
        "xattention": XAttention,
        "flash_prefill": FlashPrefill,
        "block_cover": BlockCover,
    }
    return kinds[pattern](**values), block_size


def _check_pattern(pattern: str) -> None:
    if pattern not in _DEFAULTS:
        raise ValueError(
            f"pattern: expected the name of a pattern, got {pattern!r}"
            + _suggestion(pattern, _DEFAULTS, "patterns")
        )


def _check_value(key: str, value: Any) -> Any:
    if key == "block_size":
        if isinstance(value, bool) or value not in _BLOCK_SIZES:
            raise ValueError(f"block_size: expected 32, 64 or 128, got {value!r}")
        return int(value)
    if key in ("model_type", "path"):
        if value is not None and not (isinstance(value, (str, Path)) and str(value)):
            raise ValueError(f"{key}: expected a name or None, got {value!r}")
        return None if value is None else str(value)
    if key == "mean_correction":
        if not isinstance(value, bool):
            raise ValueError(f"mean_correction: expected True or False, got {value!r}")
        return value
    if key == "stride":
        if isinstance(value, bool) or value not in (8, 16):
            raise ValueError(f"stride: expected 8 or 16, got {value!r}")
        return int(value)
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if key in _SHARES:
        zero_allowed = _SHARES[key]
        if not (0 < number <= 1 or (zero_allowed and number == 0)):
            interval = "[0, 1]" if zero_allowed else "(0, 1]"
            raise ValueError(f"{key}: expected a number in {interval}, got {value!r}")
        return float(number)
    if key in ("flex_prefill_max_budget", "max_budget") and value is None:
        return None
    least = 1 if key == "local_window" else 0
    if not (least <= number < math.inf and number == int(number)):
        raise ValueError(f"{key}: expected a number of tokens, at least {least}, got {value!r}")
    return int(number)


def _suggestion(name: Any, known: Iterable[str], what: str) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{hint}; {what}: {', '.join(known) or 'none'}"
