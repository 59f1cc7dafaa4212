"""The MLP of a transformers model in pieces of a prompt, for its memory."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARK = "_flex_prefill_split_tokens"


def split_mlp(model: PreTrainedModel, tokens: int | None = 16384) -> PreTrainedModel:
    """Lets every MLP of the model compute at most ``tokens`` tokens at once, in place.

    An MLP looks at each token alone, so its results stay the same but for the rounding of
    matrix products of another size; the memory inside it is that of ``tokens`` tokens instead of
    the whole prompt's. Shorter inputs, decoding among them, run as before. What is replaced
    is the ``forward`` of the modules that models call ``mlp``; a mixture of experts, which routes
    by itself, is left alone. None: as the model was. Returns the model.

    Raises ValueError for fewer than 1 token and for a model without such modules.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens: expected at least 1 or None, got {tokens}")
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    modules = [module for module in modules if not hasattr(module, "experts")]
    if not modules:
        raise ValueError(f"model: {type(model).__name__} has no modules called mlp")
    for module in modules:
        if hasattr(module, _MARK):  # before another size, the forward that was there
            delattr(module, "forward")
            vars(module).update(getattr(module, _MARK))
            delattr(module, _MARK)
        if tokens is not None:
            # Of the module itself, where something like accelerate put one.
            before = {name: f for name, f in vars(module).items() if name == "forward"}
            module.forward = functools.partial(_in_pieces, module.forward, tokens)
            setattr(module, _MARK, before)
    return model


def _in_pieces(forward: Any, tokens: int, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """hidden [..., s, width]."""
    import torch

    if hidden.ndim < 2 or hidden.shape[-2] <= tokens or args or kwargs or torch.is_grad_enabled():
        return forward(hidden, *args, **kwargs)
    out = torch.empty_like(hidden)
    for start in range(0, hidden.shape[-2], tokens):
        out[..., start : start + tokens, :] = forward(hidden[..., start : start + tokens, :])
    return out
