"""What a call decided, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Audit", "DenseComparison"]

_HEAD_PATTERNS = np.array(
    ["dense", "vertical_slash", "query_aware", "streaming", "block_sparse", "block_cover"]
)


class AuditRows(NamedTuple):
    """What the extension writes for an Audit, in float32."""

    heads: npt.NDArray[Any]  # [b, h_q, 8]: the fields of an Audit, in order
    guard: npt.NDArray[Any] = np.zeros(2, np.float32)  # Guard of the C++ API, the raised gamma
    comparison: npt.NDArray[Any] | None = None  # [b, h_q, 4]: the fields of a DenseComparison


@dataclass(frozen=True)
class DenseComparison:
    """A call against dense attention on a sample of rows, for every query head of every sequence:
    arrays ``[b, h_q]``.

    kept_mass: mean share of the dense attention on keys that the row keeps.
    least_kept_mass: of the worst row.
    error: root mean square of the output's difference from dense attention's, over that of dense.
    rows: how many rows were sampled.
    """

    kept_mass: npt.NDArray[np.float32]
    least_kept_mass: npt.NDArray[np.float32]
    error: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int32]

    @classmethod
    def from_rows(cls, rows: npt.NDArray[Any]) -> DenseComparison:
        """From the extension's ``[b, h_q, 4]`` float32: the fields above, in order."""
        return cls(rows[..., 0], rows[..., 1], rows[..., 2], rows[..., 3].astype(np.int32))


@dataclass(frozen=True)
class Audit:
    """What was decided for every query head of every sequence: arrays ``[b, h_q]``.

    pattern: "dense", "vertical_slash", "query_aware", "streaming", "block_sparse" (by a score for
        each block: XAttention, FlashPrefill, MInference) or "block_cover".
    jsd_sqrt: distance between the two estimates of the block scores; 0 where not computed.
    vertical_blocks, slash_blocks: how many vertical blocks (of BlockCover: columns of the last
        queries) and block distances were chosen.
    kept_mass: share of the probe's attention mass, or of that of BlockCover's asking rows, that
        lies in kept blocks.
    density: kept causal blocks / causal blocks.
    least_row_mass: BlockCover: the least share of its map that a query block keeps; otherwise 1.
    rows_below_gamma: BlockCover: query blocks that keep less than gamma of their map, because of
        ``max_budget``; otherwise 0.
    guard: what ``prefill``'s min_kept_mass did for the call: None, "gamma 0.95" or "dense".
    comparison: with ``prefill``'s compared_rows: the call against dense attention.
    """

    pattern: npt.NDArray[np.str_]
    jsd_sqrt: npt.NDArray[np.float32]
    vertical_blocks: npt.NDArray[np.int32]
    slash_blocks: npt.NDArray[np.int32]
    kept_mass: npt.NDArray[np.float32]
    density: npt.NDArray[np.float32]
    least_row_mass: npt.NDArray[np.float32]
    rows_below_gamma: npt.NDArray[np.int32]
    guard: str | None = None
    comparison: DenseComparison | None = None

    @classmethod
    def from_rows(cls, written: AuditRows) -> Audit:
        rows, (guard, gamma), comparison = written
        return cls(
            pattern=_HEAD_PATTERNS[rows[..., 0].astype(np.intp)],
            jsd_sqrt=rows[..., 1],
            vertical_blocks=rows[..., 2].astype(np.int32),
            slash_blocks=rows[..., 3].astype(np.int32),
            kept_mass=rows[..., 4],
            density=rows[..., 5],
            least_row_mass=rows[..., 6],
            rows_below_gamma=rows[..., 7].astype(np.int32),
            guard=(None, f"gamma {gamma:g}", "dense")[int(guard)],
            comparison=None if comparison is None else DenseComparison.from_rows(comparison),
        )

    @property
    def mean_density(self) -> float:
        """Mean over heads and sequences; 1 for an empty batch."""
        return float(self.density.mean(dtype=np.float64)) if self.density.size else 1.0
