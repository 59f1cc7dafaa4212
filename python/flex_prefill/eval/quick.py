"""The built-in model's quick suite: a few minutes on two cores, and what must come out.

The reference is the table of models/needle-7m/README.md (experiments/builtin_model/results,
100 prompts of each of the three kinds).
"""

from __future__ import annotations

from typing import Any

# Length: prompts of each kind. Long ones cost most; short ones give the count.
SAMPLES = {4096: 3, 8192: 2, 16384: 1}
PATTERNS: dict[str, dict[str, Any]] = {
    "default": {},
    "flex_prefill": {"flex_prefill_gamma": 0.9},
    "streaming_llm": {"global_window": 1024, "local_window": 2048},
}
# Pattern: length: (right of 300, density).
REFERENCE: dict[str, dict[int, tuple[int, float]]] = {
    "default": {4096: (300, 1.0), 8192: (300, 1.0), 16384: (300, 1.0)},
    "flex_prefill": {4096: (300, 0.443), 8192: (300, 0.26), 16384: (300, 0.16)},
    "streaming_llm": {4096: (248, 0.93), 8192: (123, 0.61), 16384: (73, 0.34)},
}
_REFERENCE_PROMPTS = 300
NOISE = 0.001  # chance of refusing, on either side, a model that is as good as the reference
DENSITY_TOLERANCE = 0.03


def deviations(rows: list[dict[str, Any]]) -> list[str]:
    """What in the rows of results.json is not what the reference says, beyond chance."""
    found = []
    for pattern, lengths in REFERENCE.items():
        chances: list[float] = []
        right = 0
        for length, (reference, density) in lengths.items():
            cells = [row for row in rows if (row["pattern"], row["length"]) == (pattern, length)]
            if not cells:
                continue
            mean = sum(cell["density"] for cell in cells) / len(cells)
            if abs(mean - density) > DENSITY_TOLERANCE:
                found.append(f"{pattern} at {length} tokens: density {mean:.3f}, not {density}")
            for cell in cells:
                # Laplace's rule: 300 of 300 right is not certainty.
                chances += [(reference + 1) / (_REFERENCE_PROMPTS + 2)] * cell["samples"]
                right += round(cell["score"] * cell["samples"])
        fewer, more = tails(chances, right)
        if min(fewer, more) < NOISE:
            expected = sum(chances)
            found.append(
                f"{pattern}: {right} of {len(chances)} right, expected {expected:.1f}; by chance "
                f"that happens with probability {min(fewer, more):.1e}"
            )
    return found


def tails(chances: list[float], right: int) -> tuple[float, float]:
    """P(at most `right`) and P(at least `right`) of independent trials with these chances."""
    distribution = [1.0]
    for chance in chances:
        distribution = [
            (distribution[i] if i < len(distribution) else 0.0) * (1 - chance)
            + (distribution[i - 1] if i else 0.0) * chance
            for i in range(len(distribution) + 1)
        ]
    return sum(distribution[: right + 1]), sum(distribution[right:])
