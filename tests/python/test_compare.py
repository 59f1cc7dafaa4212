"""compare_with_dense against NumPy, and the floor of the kept mass."""

from __future__ import annotations

import flex_prefill
import numpy as np
import pytest
import reference
from flex_prefill import (
    BlockCover,
    Dense,
    FlexPrefill,
    StreamingLlm,
    VerticalSlash,
    compare_with_dense,
)


def inputs(s_q=600, s_kv=900, h_q=4, h_kv=2, d=16):
    random = np.random.default_rng(1)
    return tuple(
        2 * random.standard_normal((1, s, h, d)).astype(np.float32)
        for s, h in ((s_q, h_q), (s_kv, h_kv), (s_kv, h_kv))
    )


@pytest.mark.parametrize("pattern", [VerticalSlash(128, 64), StreamingLlm(20, 200)])
def test_figures_are_those_of_whole_matrices(pattern):
    q, k, v = inputs()
    index = flex_prefill.select(q, k, pattern, block_size=64)
    out = flex_prefill.attend(q, k, v, index, block_size=64)
    got = compare_with_dense(q, k, v, out, index, rows=600, block_size=64)
    windows = (index.global_window, index.local_window) if index.local_window else None
    for h in range(4):
        one_q, one_k, one_v = q[0, :, h], k[0, :, h // 2], v[0, :, h // 2]
        causal = reference.visible(600, 900, 64)
        kept = reference.visible(600, 900, 64, index.to_mask(0, h), windows)
        p, _ = reference._probabilities(one_q, one_k, causal, None)
        mass = (p * kept).sum(axis=1)
        dense = p @ one_v.astype(np.float64)
        assert got.kept_mass[0, h] == pytest.approx(mass.mean(), abs=1e-5)
        assert got.least_kept_mass[0, h] == pytest.approx(mass.min(), abs=1e-5)
        error = np.sqrt(((out[0, :, h] - dense) ** 2).mean() / (dense**2).mean())
        assert got.error[0, h] == pytest.approx(error, abs=1e-5)
    assert (got.rows == 600).all()


def test_dense_has_no_error():
    q, k, v = inputs()
    index = flex_prefill.select(q, k, Dense())
    got = compare_with_dense(q, k, v, flex_prefill.attend(q, k, v, index), index, rows=9)
    assert got.kept_mass == pytest.approx(1)
    assert (got.error < 1e-5).all()
    assert (got.rows == 9).all()


def test_errors():
    q, k, v = inputs()
    index = flex_prefill.select(q, k, Dense())
    with pytest.raises(ValueError, match="rows: expected at least 1"):
        compare_with_dense(q, k, v, q.copy(), index, rows=0)
    with pytest.raises(TypeError, match="index: expected a BlockIndex"):
        compare_with_dense(q, k, v, q.copy(), None)
    for floor in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"min_kept_mass: expected a number in \[0, 1\]"):
            flex_prefill.prefill(q, k, v, min_kept_mass=floor)
    with pytest.raises(ValueError, match="compared_rows: expected audit=True"):
        flex_prefill.prefill(q, k, v, compared_rows=8)
    with pytest.raises(ValueError, match="compared_rows: expected at least 0, got -3"):
        flex_prefill.prefill(q, k, v, audit=True, compared_rows=-3)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_an_audit_compares(framework):
    tensors = inputs()
    if framework == "torch":
        torch = pytest.importorskip("torch")
        tensors = tuple(torch.from_numpy(x) for x in tensors)
    pattern = VerticalSlash(128, 64)
    out, audit = flex_prefill.prefill(
        *tensors, pattern, block_size=64, audit=True, compared_rows=30
    )
    index = flex_prefill.select(*tensors[:2], pattern, block_size=64)
    wanted = compare_with_dense(*tensors, out, index, rows=30, block_size=64)
    for name in ("kept_mass", "least_kept_mass", "error", "rows"):
        np.testing.assert_array_equal(getattr(audit.comparison, name), getattr(wanted, name))
    assert (audit.comparison.error > 0.01).any()
    # Of what the floor made of the call.
    _, audit = flex_prefill.prefill(
        *tensors, pattern, block_size=64, audit=True, compared_rows=30, min_kept_mass=1
    )
    assert audit.guard == "dense"
    assert (audit.comparison.error < 1e-5).all()
    _, audit = flex_prefill.prefill(*tensors, pattern, block_size=64, audit=True)
    assert audit.comparison is None


class TestFloor:
    PATTERN = FlexPrefill(0.5, 0, 64)

    def test_leaves_what_keeps_enough(self):
        q, k, v = inputs()
        plain, before = flex_prefill.prefill(q, k, v, self.PATTERN, block_size=64, audit=True)
        out, audit = flex_prefill.prefill(
            q, k, v, self.PATTERN, block_size=64, audit=True, min_kept_mass=0.01
        )
        assert audit.guard is None
        assert before.guard is None
        np.testing.assert_array_equal(out, plain)

    def test_raises_gamma(self):
        q, k, v = inputs()
        least = min(
            flex_prefill.select(q, k, FlexPrefill(g, 0, 64), block_size=64, audit=True)[
                1
            ].kept_mass.min()
            for g in (0.75,)
        )
        _, audit = flex_prefill.prefill(
            q, k, v, self.PATTERN, block_size=64, audit=True, min_kept_mass=float(least)
        )
        assert audit.guard == "gamma 0.75"
        assert audit.kept_mass.min() >= least - 1e-5

    def test_raises_the_gamma_of_a_cover(self):
        q, k, v = inputs()
        least = [
            flex_prefill.select(q, k, pattern, block_size=64, audit=True)[1].kept_mass.min()
            for pattern in (BlockCover(0.2, 0), BlockCover(0.6, 0))
        ]
        assert least[0] < least[1]
        floor = float(sum(least) / 2)
        _, audit = flex_prefill.prefill(
            q, k, v, BlockCover(0.2, 0), block_size=64, audit=True, min_kept_mass=floor
        )
        assert audit.guard == "gamma 0.6"

    def test_falls_back_to_dense(self):
        q, k, v = inputs()
        exact = flex_prefill.prefill(q, k, v, Dense(), block_size=64)
        for pattern in (self.PATTERN, VerticalSlash(64, 64)):
            out, lse, audit = flex_prefill.prefill(
                q, k, v, pattern, block_size=64, audit=True, return_lse=True, min_kept_mass=1.0
            )
            assert audit.guard == "dense"
            assert lse.shape == (1, 4, 600)
            np.testing.assert_array_equal(out, exact)

    def test_without_an_audit(self):
        q, k, v = inputs()
        out = flex_prefill.prefill(q, k, v, VerticalSlash(64, 64), block_size=64, min_kept_mass=1)
        np.testing.assert_array_equal(out, flex_prefill.prefill(q, k, v, Dense(), block_size=64))
