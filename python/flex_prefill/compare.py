"""What a selection has cost: against dense attention on a sample of rows, and a floor for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flex_prefill import _core
from flex_prefill._call import Call
from flex_prefill.audit import Audit
from flex_prefill.block_index import BlockIndex
from flex_prefill.patterns import BlockCover, Dense, FlexPrefill, Pattern

if TYPE_CHECKING:
    from flex_prefill._tensors import Tensor

__all__ = ["DenseComparison", "compare_with_dense"]

_MOST_RAISES = 3


@dataclass(frozen=True)
class DenseComparison:
    """Figures of every query head of every sequence, over its sampled rows: arrays ``[b, h_q]``.

    kept_mass: mean share of the dense attention on keys that the row keeps.
    least_kept_mass: of the worst row.
    error: root mean square of the output's difference from dense attention's, over that of dense.
    rows: how many rows were sampled.
    """

    kept_mass: npt.NDArray[np.float32]
    least_kept_mass: npt.NDArray[np.float32]
    error: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int32]


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
    return DenseComparison(
        figures[..., 0], figures[..., 1], figures[..., 2], figures[..., 3].astype(np.int32)
    )


def guarded_select(
    select: Callable[[Pattern], tuple[BlockIndex, Audit]], pattern: Pattern, min_kept_mass: float
) -> tuple[BlockIndex, Audit]:
    """select, until every head keeps the floor of the probe's mass: FlexPrefill and BlockCover with
    gamma raised half way to 1, up to three times; then, and for other patterns at once, dense."""
    if not 0 <= min_kept_mass <= 1:
        raise ValueError(f"min_kept_mass: expected a number in [0, 1], got {min_kept_mass!r}")
    index, audit = select(pattern)
    done = None
    for _ in range(_MOST_RAISES):
        if _keeps(audit, min_kept_mass) or not isinstance(pattern, (FlexPrefill, BlockCover)):
            break
        pattern = replace(pattern, gamma=(1 + pattern.gamma) / 2)
        index, audit = select(pattern)
        done = f"gamma {pattern.gamma:g}"
    if not _keeps(audit, min_kept_mass):
        index, audit = select(Dense())
        done = "dense"
    return index, replace(audit, guard=done)


def _keeps(audit: Audit, floor: float) -> bool:
    # Sums of rounded masses: what keeps everything must pass a floor of 1. A NaN does not.
    return bool((audit.kept_mass >= floor - 1e-5).all())
