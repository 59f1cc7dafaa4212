"""Which blocks a call keeps: the patterns, as plain values.

The same types as in C++ (``flexprefill/select.h``), with the same names, units and defaults.
Their numbers are checked by the call that uses them, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from flex_prefill import _core

__all__ = [
    "BlockCover",
    "Dense",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "MInferenceHead",
    "Pattern",
    "StreamingLlm",
    "VerticalSlash",
    "XAttention",
]


@dataclass(frozen=True)
class Dense:
    """Every causal block: exact attention."""

    name: ClassVar[str] = "dense"

    def to_core(self) -> _core.Pattern:
        return _core.Pattern.dense()

    def values(self) -> list[float]:
        return []


@dataclass(frozen=True)
class FlexPrefill:
    """FlexPrefill (arXiv 2502.20766, algorithms 1 to 4): decided per head and per input.

    gamma: share of the attention mass to cover, in (0, 1].
    tau: heads whose ``jsd_sqrt`` lies below it are query-aware, in [0, 1].
    min_budget, max_budget: least and most tokens of vertical blocks, and of block distances, that
        a head keeps; ``max_budget=None``: no limit.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None

    name: ClassVar[str] = "flex_prefill"

    def to_core(self) -> _core.Pattern:
        return _core.Pattern.flex_prefill(self.gamma, self.tau, self.min_budget, self.max_budget)

    def values(self) -> list[float]:
        most = math.inf if self.max_budget is None else float(self.max_budget)
        return [float(self.gamma), float(self.tau), float(self.min_budget), most]


@dataclass(frozen=True)
class VerticalSlash:
    """Fixed numbers of vertical blocks and block distances (arXiv 2407.02490, section 3.2), chosen
    by the probe's scores; both in tokens."""

    vertical_size: int = 8192
    slash_size: int = 8192

    name: ClassVar[str] = "vertical_slash"

    def to_core(self) -> _core.Pattern:
        return _core.Pattern.vertical_slash(self.vertical_size, self.slash_size)

    def values(self) -> list[float]:
        return [float(self.vertical_size), float(self.slash_size)]


@dataclass(frozen=True)
class StreamingLlm:
    """StreamingLLM (arXiv 2309.17453): the first ``global_window`` keys and the last
    ``local_window`` keys of each query, exact at the token; both in tokens, the second at least 1.
    """

    global_window: int = 1024
    local_window: int = 8192

    name: ClassVar[str] = "streaming_llm"

    def to_core(self) -> _core.Pattern:
        return _core.Pattern.streaming_llm(self.global_window, self.local_window)

    def values(self) -> list[float]:
        return [float(self.global_window), float(self.local_window)]


@dataclass(frozen=True)
class XAttention:
    """XAttention (arXiv 2503.16428): a block counts as the sum of its antidiagonals, and each query
    block keeps the smallest set of blocks that reaches a share of its sum.

    stride: tokens between the antidiagonals that are looked at, 8 or 16.
    threshold: the share, in (0, 1].
    """

    stride: int = 16
    threshold: float = 0.9

    name: ClassVar[str] = "xattention"

    def to_core(self) -> _core.Pattern:
        return _core.Pattern.xattention(self.stride, self.threshold)

    def values(self) -> list[float]:
        return [float(self.stride), float(self.threshold)]


@dataclass(frozen=True)
class FlashPrefill:
    """FlashPrefill (arXiv 2603.06199; the correction: arXiv 2608.19758): queries score the means of
    the key blocks, and a query block keeps what reaches a share of its best block.

    alpha: that share, in [0, 1]; 0 keeps everything.
    global_window, local_window: the first keys, and the last keys of each query block, that are
        always kept, in tokens and whole blocks; the second at least 1.
    last_queries: the last queries of a call, in tokens, that keep everything.
    mean_correction: blocks that are not kept count through the means of their keys and values.
    """

    alpha: float = 0.1
    global_window: int = 256
    local_window: int = 512
    last_queries: int = 1024
    mean_correction: bool = True

    name: ClassVar[str] = "flash_prefill"

    def to_core(self) -> _core.Pattern:
        return _core.Pattern.flash_prefill(
            self.alpha,
            self.global_window,
            self.local_window,
            self.last_queries,
            self.mean_correction,
        )

    def values(self) -> list[float]:
        windows = (self.global_window, self.local_window, self.last_queries)
        return [float(self.alpha), *map(float, windows), float(self.mean_correction)]


@dataclass(frozen=True)
class BlockCover:
    """A cover of blocks for each query block, from a map of the head that means of 32 queries and
    of 32 keys make (of 16 where blocks have at most 64 tokens and the sequence at most 16384 keys),
    and columns that the last queries ask for; docs/block_cover.md. Block 0, a query block's own and
    the blocks that hold the 128 tokens before it are always kept.

    gamma: share of its map that each query block keeps, in (0, 1]; 1 is dense, whatever
        max_budget says. With blocks of 64 and up to 16k tokens .86 was enough for what the default
        gives with blocks of 128; with flatter heads .93.
    column_share: share of what 128 of the last 512 queries ask for that is kept for the last query
        blocks, in [0, 1]; 0 keeps no such columns. At 32k tokens .9 answered better, for .003 of
        density.
    max_budget: most tokens that a query block keeps, in whole blocks; at least what is always kept,
        128 tokens and two blocks. Gamma may be missed then, which an Audit says
        (``rows_below_gamma``). None: no limit.
    """

    gamma: float = 0.9
    column_share: float = 0.8
    max_budget: int | None = None

    name: ClassVar[str] = "block_cover"

    def to_core(self) -> _core.Pattern:
        return _core.Pattern.block_cover(self.gamma, self.column_share, self.max_budget)

    def values(self) -> list[float]:
        most = math.inf if self.max_budget is None else float(self.max_budget)
        return [float(self.gamma), float(self.column_share), most]


@dataclass(frozen=True)
class MInferenceHead:
    """What one query head keeps under MInference; sizes are tokens, spent on whole blocks.

    kind: "a_shape": the first ``vertical_size`` keys and the last ``slash_size`` of each query;
        "vertical_slash": the best ``vertical_size`` keys and ``slash_size`` distances, by the
        probe; "block_sparse": of each query block the best ``vertical_size`` keys, by block means.
    """

    kind: str
    vertical_size: int
    slash_size: int = 1

    def to_values(self) -> tuple[int, int, int]:
        if self.kind not in HEAD_KINDS:
            raise ValueError(f"kind: expected one of {', '.join(HEAD_KINDS)}, got {self.kind!r}")
        return HEAD_KINDS.index(self.kind), self.vertical_size, self.slash_size


HEAD_KINDS = ("a_shape", "vertical_slash", "block_sparse")


@dataclass(frozen=True)
class MInference:
    """MInference (arXiv 2407.02490): a pattern for each query head, ``[h_q]``, found beforehand for
    each layer of a model (``flexprefill calibrate``)."""

    heads: tuple[MInferenceHead, ...]

    name: ClassVar[str] = "minference"

    def to_core(self) -> _core.Pattern:
        return _core.MInferencePattern([head.to_values() for head in self.heads])

    def values(self) -> list[float]:
        return [float(value) for head in self.heads for value in head.to_values()]


Pattern: TypeAlias = (
    Dense
    | FlexPrefill
    | VerticalSlash
    | StreamingLlm
    | XAttention
    | FlashPrefill
    | MInference
    | BlockCover
)
_KINDS = (
    Dense,
    FlexPrefill,
    VerticalSlash,
    StreamingLlm,
    XAttention,
    FlashPrefill,
    MInference,
    BlockCover,
)


def check_pattern(pattern: object) -> None:
    """Raises TypeError for what is no pattern."""
    if not isinstance(pattern, _KINDS):
        names = ", ".join(kind.__name__ for kind in _KINDS)
        raise TypeError(f"pattern: expected one of {names}, got {pattern!r}")


def _minference_from_values(*values: float) -> MInference:
    numbers = [int(value) for value in values]
    return MInference(
        tuple(
            MInferenceHead(HEAD_KINDS[kind], vertical, slash)
            for kind, vertical, slash in zip(
                numbers[::3], numbers[1::3], numbers[2::3], strict=True
            )
        )
    )


def _flex_prefill_from_values(
    gamma: float, tau: float, min_budget: float, max_budget: float
) -> FlexPrefill:
    most = None if math.isinf(max_budget) else int(max_budget)
    return FlexPrefill(gamma, tau, int(min_budget), most)


def _block_cover_from_values(gamma: float, column_share: float, max_budget: float) -> BlockCover:
    return BlockCover(gamma, column_share, None if math.isinf(max_budget) else int(max_budget))


_FROM_VALUES: dict[str, Callable[..., Pattern]] = {
    Dense.name: Dense,
    FlexPrefill.name: _flex_prefill_from_values,
    VerticalSlash.name: lambda vertical, slash: VerticalSlash(int(vertical), int(slash)),
    StreamingLlm.name: lambda first, local: StreamingLlm(int(first), int(local)),
    XAttention.name: lambda stride, threshold: XAttention(int(stride), threshold),
    FlashPrefill.name: lambda alpha, first, local, last, mean: FlashPrefill(
        alpha, int(first), int(local), int(last), bool(mean)
    ),
    MInference.name: _minference_from_values,
    BlockCover.name: _block_cover_from_values,
}


def from_values(name: str, values: Sequence[float]) -> Pattern:
    """The pattern of ``pattern.name`` and ``pattern.values()``: how it passes through torch."""
    return _FROM_VALUES[name](*values)
