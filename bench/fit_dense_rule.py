"""Finds the figures of src/attend/dense_rule.h and says how well that rule decides.

python bench/gpu_bench.py --sections rule --seconds 0.05 --json rule.json
python bench/fit_dense_rule.py rule.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 128
SAVED_SHARE = 0.7  # kSavedShare


@dataclass(frozen=True)
class Rule:
    """As DenseRule: microseconds."""

    select_us: float
    select_tile_us: float
    attend_tile_us: float


@dataclass(frozen=True)
class Case:
    """One shape and input, milliseconds as measured, and its tiles on one multiprocessor."""

    label: str
    dense: float
    select: float
    prefill: float
    probe: float  # tiles of the probe, in units of d 128
    every: float  # tiles of dense mode
    saved: float  # tiles that the least budget leaves out


def tiles(case: dict[str, Any], multiprocessors: int, least: int) -> float:
    """Tiles of 128 x 128 at d 128 that a multiprocessor computes, a row's first `least` apart."""
    n_kv = -(-case["tokens"] // BLOCK)
    n_q = -(-case["s_q"] // BLOCK)
    rows = [max(i + 1 - least, 0) for i in range(n_kv - n_q, n_kv)]
    total = sum(rows) * case["h_q"] * case["batch"]
    return max(total / multiprocessors, max(rows)) * case["d"] / 128


def cases(report: dict[str, Any]) -> list[Case]:
    """The rows of the section `rule`, those of one shape and input together."""
    multiprocessors = report["card"]["multiprocessors"]
    found: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        if row["section"] == "rule":
            label = f"{row['input']}, {row['shape']}, {row['tokens']} tokens"
            found.setdefault(label, dict(row))[row["what"]] = row["ms"]
    out = []
    for label, case in found.items():
        if not {"dense", "select", "prefill"} <= case.keys():
            continue
        n_kv = -(-case["tokens"] // BLOCK)
        probe = case["h_q"] * case["batch"] * n_kv * case["d"] / 128 / multiprocessors
        least = max(2 * -(-case["min_budget"] // BLOCK) - 1, 1)
        parts = (tiles(case, multiprocessors, count) for count in (0, least))
        out.append(Case(label, case["dense"], case["select"], case["prefill"], probe, *parts))
    return out


def fit(found: list[Case]) -> Rule:
    """select's two figures by least squares of the relative error; attend's by the median."""
    weights = [1 / case.select**2 for case in found]

    def mean(values: Iterable[float]) -> float:
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)

    x, y = mean(c.probe for c in found), mean(1e3 * c.select for c in found)
    spread = mean((c.probe - x) ** 2 for c in found)
    slope = mean((c.probe - x) * (1e3 * c.select - y) for c in found) / spread
    slope = max(slope, 0.0)
    attend = statistics.median(1e3 * case.dense / case.every for case in found)
    return Rule(max(y - slope * x, 0.0), slope, attend)


def goes_dense(rule: Rule, case: Case) -> bool:
    """As prefill_is_dense."""
    cost = rule.select_us + rule.select_tile_us * case.probe
    return cost >= SAVED_SHARE * rule.attend_tile_us * case.saved


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="JSON of gpu_bench.py")
    report = json.loads(parser.parse_args().report.read_text())
    found = cases(report)
    if not found:
        raise SystemExit("no rows of the section rule")
    rule = fit(found)
    backend = {row.get("backend") for row in report["rows"] if row["section"] == "rule"}
    print(f"{report['card']['card']}, commit {report['commit']}, {', '.join(map(str, backend))}")
    print(f"{{{rule.select_us:.0f}, {rule.select_tile_us:.2f}, {rule.attend_tile_us:.2f}}}\n")
    print(f"{'prefill / dense':>16} {'rule':>7} {'loss':>6}  case")
    for case in sorted(found, key=lambda case: case.prefill / case.dense):
        ratio = case.prefill / case.dense
        dense = goes_dense(rule, case)
        loss = max(1 / ratio - 1, 0) if dense else max(ratio - 1, 0)
        print(f"{ratio:>16.2f} {'dense' if dense else 'sparse':>7} {loss:>6.0%}  {case.label}")


if __name__ == "__main__":
    main()
