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

__all__ = ["Dense", "FlexPrefill", "Pattern", "StreamingLlm", "VerticalSlash"]


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


Pattern: TypeAlias = Dense | FlexPrefill | VerticalSlash | StreamingLlm


def check_pattern(pattern: object) -> None:
    """Raises TypeError for what is no pattern."""
    if not isinstance(pattern, (Dense, FlexPrefill, VerticalSlash, StreamingLlm)):
        raise TypeError(
            f"pattern: expected Dense, FlexPrefill, VerticalSlash or StreamingLlm, got {pattern!r}"
        )


def _flex_prefill_from_values(
    gamma: float, tau: float, min_budget: float, max_budget: float
) -> FlexPrefill:
    most = None if math.isinf(max_budget) else int(max_budget)
    return FlexPrefill(gamma, tau, int(min_budget), most)


_FROM_VALUES: dict[str, Callable[..., Pattern]] = {
    Dense.name: Dense,
    FlexPrefill.name: _flex_prefill_from_values,
    VerticalSlash.name: lambda vertical, slash: VerticalSlash(int(vertical), int(slash)),
    StreamingLlm.name: lambda first, local: StreamingLlm(int(first), int(local)),
}


def from_values(name: str, values: Sequence[float]) -> Pattern:
    """The pattern of ``pattern.name`` and ``pattern.values()``: how it passes through torch."""
    return _FROM_VALUES[name](*values)
