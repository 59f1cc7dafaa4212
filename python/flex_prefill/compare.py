"""What a selection has cost, against dense attention on a sample of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flex_prefill import _core
from flex_prefill._call import Call
from flex_prefill.audit import DenseComparison
from flex_prefill.block_index import BlockIndex

if TYPE_CHECKING:
    from flex_prefill._tensors import Tensor

__all__ = ["DenseComparison", "compare_with_dense"]


def compare_with_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    index: BlockIndex,
    *,
    rows: int = 64,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    page_table: Tensor | None = None,
    seqlens_kv: Any = None,
    softmax_scale: float | None = None,
    gqa_interleave: bool = False,
    block_size: int = 128,
    num_threads: int = 0,
) -> DenseComparison:
    """Compares ``out``, which ``attend`` made of ``index``, with dense attention.

    ``rows`` query rows of every head, spread evenly over each sequence with its last one among
    them, are computed in double precision: ``rows / s_q`` of a slow dense attention. Tensors in CPU
    memory; the other keywords, layouts and errors are ``attend``'s.
    """
    if not isinstance(index, BlockIndex):
        raise TypeError(f"index: expected a BlockIndex, got {type(index)}")
    call = Call(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        page_table=page_table,
        seqlens_kv=seqlens_kv,
        softmax_scale=softmax_scale,
        gqa_interleave=gqa_interleave,
        block_size=block_size,
        backend="auto",
        cpu_target="auto",
        num_threads=num_threads,
    )
    if call.device.kind != "cpu":
        raise _core.UnsupportedError(
            f"q: compare_with_dense expects tensors in CPU memory, got {call.device}"
        )
    figures = np.empty((len(index.sequences), index.h_q, 4), np.float32)
    _core.compare_with_dense(call.core, index._core, call.borrow(out, "out"), rows, figures)
    return DenseComparison.from_rows(figures)
