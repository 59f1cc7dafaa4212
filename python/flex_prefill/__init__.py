"""FlexPrefill (arXiv 2502.20766): sparse attention for long prompts.

    out = flex_prefill.prefill(q, k, v, flex_prefill.FlexPrefill(gamma=0.9))

takes torch, NumPy or JAX tensors ``[b, s, h, d]``; ``flex_prefill.attention`` says all that a call
can take. ``patch_model`` puts it into a transformers model. Importing this imports neither torch
nor transformers.
"""

from __future__ import annotations

import os
from typing import Any

from flex_prefill import _core
from flex_prefill._core import UnsupportedError
from flex_prefill.attention import (
    attend,
    flex_prefill_attention,
    prefill,
    prefill_workspace_size,
    select,
)
from flex_prefill.audit import Audit
from flex_prefill.block_index import BlockIndex
from flex_prefill.compare import DenseComparison, compare_with_dense
from flex_prefill.patterns import (
    BlockCover,
    Dense,
    FlashPrefill,
    FlexPrefill,
    MInference,
    MInferenceHead,
    Pattern,
    StreamingLlm,
    VerticalSlash,
    XAttention,
)

__all__ = [
    "Audit",
    "BlockCover",
    "BlockIndex",
    "Dense",
    "DenseComparison",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "MInferenceHead",
    "Pattern",
    "StreamingLlm",
    "UnsupportedError",
    "VerticalSlash",
    "XAttention",
    "__version__",
    "attend",
    "collect_audits",
    "compare_with_dense",
    "disable_hf_flash_attention_check",
    "flex_prefill_attention",
    "get_config_example",
    "info",
    "patch_model",
    "prefill",
    "prefill_workspace_size",
    "select",
    "split_mlp",
    "unpatch_model",
]

__version__ = _core.version()

_FROM_PATCH = (
    "disable_hf_flash_attention_check",
    "get_config_example",
    "patch_model",
    "unpatch_model",
)


def __getattr__(name: str) -> Any:
    if name in _FROM_PATCH:
        from flex_prefill import patch

        return getattr(patch, name)
    if name == "split_mlp":
        from flex_prefill import split

        return split.split_mlp
    if name == "collect_audits":
        from flex_prefill import hf  # imports transformers

        return hf.collect_audits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def info() -> dict[str, Any]:
    """What this build has and this machine runs.

    version; cpu_targets: names for ``cpu_target``, best first; threads: as many as the process may
    use; cuda: whether this build has the CUDA backends (``built``), its CUDA version (``runtime``)
    and the newest that the driver runs (``driver``), as 13000 for 13.0, 0 for none; ``devices``:
    the GPUs, each with ``name``, ``compute_capability`` (major, minor), ``multiprocessors`` and
    ``memory_bytes``; ``error``: why there are none, if the runtime said so.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "version": __version__,
        "cpu_targets": _core.supported_cpu_targets(),
        "threads": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "cuda": _core.cuda_info(),
    }
