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
from typing import TYPE_CHECKING, Any

from flex_prefill.patterns import Dense, FlexPrefill, StreamingLlm, VerticalSlash

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
}
_BLOCK_SIZES = (32, 64, 128)
_DEFAULT_BLOCK_SIZE = 128


def get_config_example(pattern: str = "flex_prefill") -> dict[str, Any]:
    """The keys that `patch_model(model, pattern, cfg)` takes, with their defaults, as a new dict.

    Raises ValueError for an unknown pattern, UnsupportedError for `minfer`.
    """
    _check_pattern(pattern)
    return dict(_DEFAULTS[pattern])


def patch_model(
    model: PreTrainedModel, pattern: str = "flex_prefill", cfg: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Gives the decoder layers of a transformers model a sparse prefill, in place.

    pattern: `flex_prefill`, `vertical_slash`, `streaming_llm`, `flash` (every block, computed by
        this library) or `default` (the model's own attention again).
    cfg: keys of `get_config_example(pattern)`; what is not given has its default. Sizes, windows
        and budgets count tokens.

    Decoding, and whatever this library does not compute (sliding windows, soft capping, attention
    sinks, masks of the caller's own, gradients; docs/transformers.md has the list), stays on the
    attention that the model had. Patching again replaces the pattern. Returns the model.

    Raises ValueError for an unknown pattern or key, for a value out of range and for a model that
    is not a causal decoder of transformers with exchangeable attention; UnsupportedError for
    `minfer`. The model is unchanged then.
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
    return checked


def pattern_of(pattern: str, checked: Mapping[str, Any]) -> tuple[Any, int]:
    """The pattern object and the block size that `check_config`'s dict stands for."""
    block_size = checked.get("block_size", _DEFAULT_BLOCK_SIZE)
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
    }
    return kinds[pattern](**values), block_size


def _check_pattern(pattern: str) -> None:
    if pattern == "minfer":
        from flex_prefill import UnsupportedError

        raise UnsupportedError(
            "pattern: 'minfer' is not available yet; available are " + ", ".join(_DEFAULTS)
        )
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
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if key in ("flex_prefill_gamma", "flex_prefill_tau"):
        zero_allowed = key == "flex_prefill_tau"
        if not (0 < number <= 1 or (zero_allowed and number == 0)):
            interval = "[0, 1]" if zero_allowed else "(0, 1]"
            raise ValueError(f"{key}: expected a number in {interval}, got {value!r}")
        return float(number)
    if key == "flex_prefill_max_budget" and value is None:
        return None
    least = 1 if key == "local_window" else 0
    if not (least <= number < math.inf and number == int(number)):
        raise ValueError(f"{key}: expected a number of tokens, at least {least}, got {value!r}")
    return int(number)


def _suggestion(name: Any, known: Iterable[str], what: str) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{hint}; {what}: {', '.join(known) or 'none'}"
