"""bench/fit_dense_rule.py finds the figures that made the times it is given."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "bench" / "fit_dense_rule.py"


@pytest.fixture(scope="module")
def fitting():
    spec = importlib.util.spec_from_file_location("fit_dense_rule", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_dense_rule"] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    return module


def rows(fitting, rule):
    """Rows as gpu_bench.py writes them, of times that follow the rule exactly."""
    out = []
    for tokens in (2048, 4096, 8192, 16384):
        for h_q in (1, 8, 32):
            row = {"section": "rule", "input": "random", "tokens": tokens, "s_q": tokens}
            row |= {"h_q": h_q, "d": 128, "batch": 1, "min_budget": 512, "shape": f"h_q {h_q}"}
            select = rule.select_us + rule.select_tile_us * h_q * tokens / 128 / 132
            dense = rule.attend_tile_us * fitting.tiles(row, 132, 0)
            sparse = rule.attend_tile_us * fitting.tiles(row, 132, 0) * 0.5
            for what, us in (("select", select), ("dense", dense), ("prefill", select + sparse)):
                out.append({**row, "what": what, "ms": us / 1e3})
    return out


def test_the_figures_are_found(fitting):
    rule = fitting.Rule(select_us=60, select_tile_us=3, attend_tile_us=1.5)
    found = fitting.cases({"rows": rows(fitting, rule), "card": {"multiprocessors": 132}})
    assert len(found) == 12
    got = fitting.fit(found)
    assert got.select_us == pytest.approx(60, rel=1e-3)
    assert got.select_tile_us == pytest.approx(3, rel=1e-3)
    assert got.attend_tile_us == pytest.approx(1.5, rel=1e-3)


def test_what_the_rule_says(fitting):
    rule = fitting.Rule(select_us=190, select_tile_us=8.4, attend_tile_us=1.9)
    found = fitting.cases({"rows": rows(fitting, rule), "card": {"multiprocessors": 132}})
    dense = {case.label: fitting.goes_dense(rule, case) for case in found}
    assert dense["random, h_q 32, 4096 tokens"]
    assert not dense["random, h_q 32, 8192 tokens"]
    assert dense["random, h_q 1, 8192 tokens"]
