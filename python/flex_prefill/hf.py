"""FlexPrefill as an attention implementation of Hugging Face transformers 5.

Importing this module registers "flex_prefill" with transformers' attention and mask registries, so
that `AutoModelForCausalLM.from_pretrained(..., attn_implementation="flex_prefill")` works; the
pattern is then read from `model.config.flex_prefill`, a plain dict that is saved with the config:

    {"pattern": "flex_prefill", "flex_prefill_gamma": 0.95, ...}     # see get_config_example

Only what is known to be causal self-attention is computed here. The mask function vouches for it:
where a mask is plainly causal, with or without padding, it returns a `CausalMask` in place of the
mask, and only where the attention function receives one does it compute. Everything else reaches
the model's own attention with the very mask which that asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing

from flex_prefill import _core
from flex_prefill.attention import prefill
from flex_prefill.minference import LayerPatterns
from flex_prefill.patch import check_config, pattern_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from flex_prefill.attention import Audit

NAME = "flex_prefill"

logger = logging.get_logger(__name__)

_DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}
# Arguments of attention functions that ask for more than softmax(scale * q k^T) v.
_EXTENSIONS = (
    "block_indices",
    "cache",
    "indices",
    "position_bias",
    "s_aux",
    "sinks",
    "sliding_window",
    "softcap",
)

_audits: ContextVar[list[tuple[int | None, Audit]] | None] = ContextVar("audits", default=None)


@contextmanager
def collect_audits() -> Iterator[list[tuple[int | None, Audit]]]:
    """Collects (layer index, Audit) of every prefill that patched models compute inside.

    The list fills in the order of the layers' calls; layers and calls that are left to the model's
    own attention do not appear in it. Of a padded batch, an Audit has the sequences that had
    tokens in the call.
    """
    audits: list[tuple[int | None, Audit]] = []
    token = _audits.set(audits)
    try:
        yield audits
    finally:
        _audits.reset(token)


class CausalMask(torch.Tensor):
    """Stands for a causal mask [b, 1, s_q, s_kv] without its memory.

    `own()` is what the model's own attention would have been given, None included. Any tensor
    operation on this one builds that mask and works on it, so model code that slices or adds masks
    gets what it expects.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    own_mask: Callable[..., torch.Tensor | None]
    query_offset: int
    padding: torch.Tensor | None  # bool [b, query_offset + s_q], False: padding; None: no padding

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        own_mask: Callable[..., torch.Tensor | None],
        query_offset: int,
        padding: torch.Tensor | None,
    ) -> CausalMask:
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.own_mask = lru_cache(own_mask)
        mask.query_offset = query_offset
        mask.padding = padding
        return mask

    def own(self) -> torch.Tensor | None:
        return self.own_mask(allow_is_causal_skip=True)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CausalMask({tuple(self.shape)}, query_offset={self.query_offset})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def built(value: Any) -> Any:
            if isinstance(value, CausalMask):
                return value.own_mask(allow_is_causal_skip=False)
            return value

        return func(*tree_map(built, args), **tree_map(built, kwargs or {}))


def causal_mask_or_own(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype = torch.float32,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function: a CausalMask where attention is plainly causal and worth it, otherwise
    the mask of the model's own attention. `attention_mask` is bool [b, seen tokens] or None."""
    own_name = own_attention(config)
    own_function = ALL_MASK_ATTENTION_FUNCTIONS.get(own_name, lambda **_: None)
    own_mask = partial(
        own_function,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        dtype=dtype,
        config=config,
        device=device,
        **kwargs,
    )
    device = torch.device(device)
    if (
        mask_function is not causal_mask_function
        or kv_offset != 0
        or not allow_is_causal_skip
        or not _computes_on(device)
        or is_tracing(attention_mask)
        or q_length <= _settings(config)[1]  # few rows: dense anyway
    ):
        return own_mask(q_offset=q_offset, allow_is_causal_skip=allow_is_causal_skip)
    # A static cache hands out the tensor that it counts in, and counts on before the mask is read.
    q_offset = int(q_offset)
    length = q_offset + q_length
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, :length]
        # Tokens beyond the mask count as padding, as in transformers' own masks.
        padding = torch.nn.functional.pad(padding, (0, length - padding.shape[1]))
        padding = None if bool(padding.all()) else padding
    return CausalMask(
        (batch_size, 1, q_length, kv_length),
        dtype if own_name == "eager" else torch.bool,
        device,
        partial(own_mask, q_offset=q_offset),
        q_offset,
        padding,
    )


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function: query [b, h_q, s_q, d_qk], key and value [b, h_kv, s_kv, d_qk | d_v]
    -> [b, s_q, h_q, d_v] and the attention weights, None unless the own attention gives them."""
    mask = attention_mask
    if isinstance(mask, CausalMask):
        if dropout == 0 and _is_plain(module, query, key, value, mask, kwargs):
            return _prefill(module, query, key, value, mask, scaling), None
        mask = mask.own()
    own_function = _own_attention_function(module)
    return own_function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _is_plain(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: CausalMask,
    kwargs: dict[str, Any],
) -> bool:
    """Whether the call asks for nothing but what `prefill` computes."""
    tensors = (query, key, value)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if needs_grad and not module.training:
        logger.warning_once(
            "flex_prefill computes no gradients: the model's own attention runs instead. For a "
            "sparse prefill call the model under torch.inference_mode() or torch.no_grad()."
        )
    return (
        not needs_grad
        and getattr(module, "is_causal", False) is True
        and kwargs.get("is_causal") is not False
        and all(kwargs.get(name) is None for name in _EXTENSIONS)
        and not kwargs.get("output_attentions")
        and not getattr(module.config, "output_attentions", False)
        and _supports_sdpa(type(module.config))
        and all(t.device == query.device and t.dtype == query.dtype for t in tensors)
        and _computes_on(query.device)
        and query.dtype in _DTYPES[query.device.type]
        and all(16 <= t.shape[3] <= 256 and t.shape[3] % 8 == 0 for t in tensors)
        and query.shape[2] == mask.shape[2]
        and key.shape[2] == value.shape[2] == mask.shape[3]
        and query.shape[0] == key.shape[0] == mask.shape[0]
        and query.shape[1] % key.shape[1] == 0
    )


@lru_cache
def _computes_on(device: torch.device) -> bool:
    """Whether prefill takes tensors of the device: the CPU's, and those of a GPU that this build
    has kernels for (compute capability 8.0 and up)."""
    if device.type != "cuda":
        return device.type == "cpu"
    return (
        torch.version.cuda is not None
        and _core.CUDA_BUILT
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _prefill(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: CausalMask,
    scaling: float | None,
) -> torch.Tensor:
    pattern, block_size = _settings(module.config)
    if isinstance(pattern, LayerPatterns):
        pattern = pattern.of(getattr(module, "layer_idx", None), query.shape[1])
    audits = _audits.get()
    call = partial(
        prefill,
        pattern=pattern,
        block_size=block_size,
        softmax_scale=scaling,
        audit=audits is not None,
    )
    s_q = query.shape[2]
    s_kv = mask.query_offset + s_q  # a static cache has room beyond
    q = query.transpose(1, 2)
    k, v = key[:, :, :s_kv].transpose(1, 2), value[:, :, :s_kv].transpose(1, 2)
    if mask.padding is None:
        result = call(q, k, v)
    else:
        # The real tokens of each sequence, packed; a sequence whose rows are all padding is left
        # out. Causality and bottom-right alignment survive, wherever the padding is.
        real_q = mask.padding[:, mask.query_offset :]
        has_rows = real_q.any(dim=1)
        if not has_rows.any():
            return q.new_zeros(*q.shape[:3], v.shape[3])
        real_kv = mask.padding & has_rows[:, None]
        result = call(
            q[real_q],
            k[real_kv],
            v[real_kv],
            cu_seqlens_q=_starts(real_q.sum(dim=1)[has_rows]),
            cu_seqlens_kv=_starts(real_kv.sum(dim=1)[has_rows]),
        )
    if audits is None:
        out = result
    else:
        out, audit = result
        audits.append((getattr(module, "layer_idx", None), audit))
    if mask.padding is None:
        return out
    padded = out.new_zeros(*q.shape[:3], v.shape[3])
    padded[real_q] = out
    return padded


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Lengths [b] -> starts int32 [b + 1], on the CPU, which plans the call."""
    return torch.nn.functional.pad(lengths.cpu().cumsum(dim=0), (1, 0)).to(torch.int32)


def _stored(config: PreTrainedConfig | None) -> dict[str, Any]:
    stored = getattr(config, NAME, None)
    if stored is not None and not isinstance(stored, dict):
        raise ValueError(f"config.{NAME}: expected a dict, got {type(stored).__name__}")
    return stored or {}


def _settings(config: PreTrainedConfig | None) -> tuple[Any, int]:
    """The pattern and the block size that `config` asks for."""
    stored = dict(_stored(config))
    stored.pop("own_attention", None)
    pattern = stored.pop("pattern", NAME)
    if pattern == "default":
        raise ValueError(
            f"config.{NAME}: expected a pattern to compute, got 'default'; set the model's "
            "attn_implementation instead"
        )
    return pattern_of(pattern, check_config(pattern, stored))


def own_attention(config: PreTrainedConfig | None) -> str:
    """Name of the attention implementation that a model has where this one does not compute."""
    recorded = _stored(config).get("own_attention")
    return recorded or ("sdpa" if _supports_sdpa(type(config)) else "eager")


@torch.compiler.assume_constant_result
def _supports_sdpa(config_class: type) -> bool:
    """Whether transformers computes the model's attention by scaled_dot_product_attention too.

    Where it does not (soft capping, sinks), the model's eager attention does more than that."""
    return _look_up_sdpa(config_class)


@lru_cache  # 100 us a look-up, once a layer
def _look_up_sdpa(config_class: type) -> bool:
    found: Any = MODEL_MAPPING.get(config_class, None)
    model_class = found[0] if isinstance(found, tuple) else found
    return model_class is None or bool(model_class._supports_sdpa)


def _own_attention_function(module: Any) -> Callable[..., Any]:
    name = own_attention(module.config)
    # Models may have functions of their own: eager ones always are.
    model_code = sys.modules[type(module).__module__]
    eager: Any = getattr(model_code, "eager_attention_forward", None)
    functions = getattr(model_code, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    if name == "eager" and eager is None:
        raise ValueError(
            f"{type(module).__name__}: expected eager_attention_forward in {model_code.__name__} "
            "for what flex_prefill does not compute; use the model's own attention"
        )
    return functions.get_interface(name, eager)


def register_on_model(model: PreTrainedModel, pattern: str, cfg: dict[str, Any]) -> None:
    """patch_model, once pattern and cfg are checked."""
    config = _decoder_config(model)
    computed = pattern_of(pattern, cfg)[0]
    if isinstance(computed, LayerPatterns):
        computed.check(config.num_hidden_layers, config.num_attention_heads)
    own_name = config._attn_implementation
    if own_name == NAME:
        own_name = own_attention(config)
    _set_attention(model, config, NAME)
    setattr(config, NAME, {"pattern": pattern, "own_attention": own_name, **cfg})


def restore_own_attention(model: PreTrainedModel) -> None:
    """unpatch_model. A model that is not patched stays as it is."""
    config = _decoder_config(model)
    if config._attn_implementation == NAME:
        _set_attention(model, config, own_attention(config))
    if hasattr(config, NAME):
        delattr(config, NAME)


def _decoder_config(model: PreTrainedModel) -> PreTrainedConfig:
    expected = "model: expected a causal language model of transformers (a decoder), got "
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{expected}{type(model).__name__}, which is no PreTrainedModel")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{expected}{type(model).__name__}, which has an encoder")
    if not any(getattr(module, "is_causal", False) is True for module in model.modules()):
        raise ValueError(f"{expected}{type(model).__name__}, which has no causal attention layers")
    return model.config.get_text_config(decoder=True)


def _set_attention(model: PreTrainedModel, config: PreTrainedConfig, name: str) -> None:
    """Sets the implementation of the decoder alone, not of e.g. a vision tower beside it."""
    keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
    model.set_attn_implementation({keys[0] if keys else "": name})
    if config._attn_implementation != name:
        raise ValueError(
            f"model: expected attention by transformers' AttentionInterface, but "
            f"{type(model).__name__} does not let its attention be exchanged"
        )


def tolerate_missing_flash_attention() -> None:
    """disable_hf_flash_attention_check."""
    check = PreTrainedModel._check_and_adjust_attn_implementation
    if hasattr(check, "__wrapped__"):
        return

    @wraps(check)
    def tolerant_check(
        self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        try:
            return check(self, attn_implementation, *args, **kwargs)
        except (ImportError, ValueError):
            if not is_flash_attention_requested(
                requested_attention_implementation=attn_implementation
            ):
                raise
            logger.warning_once(
                f"{attn_implementation} is not available here: using the default attention."
            )
            return check(self, None, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = tolerant_check  # type: ignore[method-assign]


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, causal_mask_or_own)
