"""What a call decided, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Audit"]

_HEAD_PATTERNS = np.array(
    ["dense", "vertical_slash", "query_aware", "streaming", "block_sparse", "block_cover"]
)


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

    @classmethod
    def from_rows(cls, rows: npt.NDArray[Any]) -> Audit:
        """From the extension's ``[b, h_q, 8]`` float32: the fields above, in order."""
        return cls(
            pattern=_HEAD_PATTERNS[rows[..., 0].astype(np.intp)],
            jsd_sqrt=rows[..., 1],
            vertical_blocks=rows[..., 2].astype(np.int32),
            slash_blocks=rows[..., 3].astype(np.int32),
            kept_mass=rows[..., 4],
            density=rows[..., 5],
            least_row_mass=rows[..., 6],
            rows_below_gamma=rows[..., 7].astype(np.int32),
        )

    @property
    def mean_density(self) -> float:
        """Mean over heads and sequences; 1 for an empty batch."""
        return float(self.density.mean(dtype=np.float64)) if self.density.size else 1.0
