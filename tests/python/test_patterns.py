"""XAttention, FlashPrefill, BlockCover and MInference against plain NumPy; MInference's files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import ClassVar

import flex_prefill
import numpy as np
import pytest
import reference
from flex_prefill import (
    BlockCover,
    FlashPrefill,
    MInference,
    MInferenceHead,
    VerticalSlash,
    XAttention,
)
from flex_prefill.minference import load, to_entry

SHAPES = [(1024, 1024, 128), (700, 1111, 64), (333, 900, 32)]  # s_q, s_kv, block size


def inputs(s_q, s_kv, d=32, h_q=4, h_kv=2, seed=0):
    random = np.random.default_rng(seed)
    q, k, v = (
        random.standard_normal((1, s, h, d)).astype(np.float32)
        for s, h in ((s_q, h_q), (s_kv, h_kv), (s_kv, h_kv))
    )
    k[:, ::97] *= 3
    # Blocks that differ, so that there is something to leave out.
    regions = random.standard_normal((1, s_kv // 128 + 1, h_kv, d)).astype(np.float32)
    k += np.repeat(2 * regions, 128, axis=1)[:, :s_kv]
    return q, k, v


def blocks_of(x, size, first=0):
    """Row ranges of x by absolute block, the first row standing at `first`."""
    edges = np.arange(first // size * size, first + len(x) + size, size) - first
    edges = np.clip(edges, 0, len(x))
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def xattention_mask(q, k, block, stride, threshold):
    s_q, s_kv = len(q), len(k)
    first, n_q, n = reference.grid(s_q, s_kv, block)
    padded_kv = -(-s_kv // stride) * stride
    # Strided views of zero-padded tensors, as the published code has them.
    full_q = np.zeros((padded_kv, q.shape[1]))
    full_q[s_kv - s_q : s_kv] = q
    full_k = np.zeros((padded_kv, k.shape[1]))
    full_k[:s_kv] = k
    wide_q = np.concatenate([full_q[stride - 1 - t :: stride] for t in range(stride)], axis=1)
    wide_k = np.concatenate([full_k[t::stride] for t in range(stride)], axis=1)
    logits = wide_q @ wide_k.T / np.sqrt(q.shape[1]) / stride
    logits[np.triu_indices(len(logits), 1)] = -np.inf
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    per_block = block // stride
    mask = np.zeros((n_q, n), bool)
    for r in range(n_q):
        i = first + r
        rows = p[max(i * per_block, (s_kv - s_q) // stride) : (i + 1) * per_block]
        scores = np.add.reduceat(rows.sum(axis=0), np.arange(0, p.shape[1], per_block))[: i + 1]
        kept = {0, i}
        order = [j for j in np.argsort(-scores, kind="stable") if j not in kept]
        while scores[list(kept)].sum() < threshold * scores.sum() and order:
            kept.add(order.pop(0))
        mask[r, list(kept)] = True
    return mask


def flash_prefill_mask(q, k, block, pattern):
    s_q, s_kv = len(q), len(k)
    first, n_q, n = reference.grid(s_q, s_kv, block)
    means = np.array([k[a:b].mean(axis=0) for a, b in blocks_of(k, block)])
    last_key = np.minimum(np.arange(1, n + 1) * block, s_kv) - 1
    mask = np.zeros((n_q, n), bool)
    for r, (a, b) in enumerate(blocks_of(q, block, s_kv - s_q)):
        i = first + r
        position = s_kv - s_q + np.arange(a, b)[:, None]
        logits = np.where(
            last_key[: i + 1] <= position, q[a:b] @ means[: i + 1].T / np.sqrt(q.shape[1]), -np.inf
        )
        scores = np.exp(logits - logits.max()).sum(axis=0)
        j = np.arange(i + 1)
        kept = scores >= pattern.alpha * scores.max()
        kept |= j < -(-pattern.global_window // block)
        kept |= i - j < -(-pattern.local_window // block)
        if pattern.last_queries and (i + 1) * block > s_kv - pattern.last_queries:
            kept[:] = True
        mask[r, : i + 1] = kept
    return mask


def block_sparse_mask(q, k, block, tokens):
    first, n_q, n = reference.grid(len(q), len(k), block)
    means = np.array([k[a:b].mean(axis=0) for a, b in blocks_of(k, block)])
    mask = np.zeros((n_q, n), bool)
    for r, (a, b) in enumerate(blocks_of(q, block, len(k) - len(q))):
        i = first + r
        scores = means[:i] @ q[a:b].mean(axis=0)
        mask[r, np.argsort(-scores, kind="stable")[: max(-(-tokens // block) - 1, 0)]] = True
        mask[r, i] = True
    return mask


def cover_scores(q, k, block):
    """BlockCover's map [n_q, n], and the exact masses [asking rows, n] with their query blocks."""
    s_q, s_kv = len(q), len(k)
    first, n_q, n = reference.grid(s_q, s_kv, block)
    scale = 1 / np.sqrt(q.shape[1])
    pool = 16 if block <= 64 and s_kv <= 16384 else 32
    keys = np.array([k[a:b].mean(axis=0) for a, b in blocks_of(k, pool)], np.float64)
    tokens = np.array([b - a for a, b in blocks_of(k, pool)])
    scores, weights = np.zeros((n_q, n)), np.zeros(n_q)
    for a, b in blocks_of(q, pool, s_kv - s_q):
        own = (s_kv - s_q + a) // pool
        logits = keys[: own + 1] @ q[a:b].mean(axis=0) * scale + np.log(tokens[: own + 1])
        p = np.exp(logits - logits.max())
        row = own * pool // block - first
        np.add.at(scores[row], np.arange(own + 1) * pool // block, (b - a) * p / p.sum())
        weights[row] += b - a
    span = min(512, s_q)
    count = min(128, span)
    asking = s_q - 1 - (count - 1 - np.arange(count)) * span // count
    exact, _ = reference._probabilities(q, k, reference.visible(s_q, s_kv, block), None)
    exact = np.add.reduceat(exact[asking], np.arange(0, s_kv, block), axis=1)
    return scores / weights[:, None], exact, (s_kv - s_q + asking) // block - first


def cover_mask(scores, exact, asking_rows, first, block, pattern):
    """What BlockCover keeps [n_q, n]."""

    def reach(x, share, kept):
        order = [j for j in np.argsort(-x, kind="stable") if j not in kept]
        while x[list(kept)].sum() < share * x.sum() and order:
            kept.add(order.pop(0))
        return kept

    mask = np.zeros(scores.shape, bool)
    most_asked = exact.max(axis=0)
    columns = reach(most_asked, pattern.column_share, set())
    near = 128 // block
    most = np.inf if pattern.max_budget is None else max(pattern.max_budget, near + 2)
    for r, row in enumerate(scores):
        i = first + r
        always = {0, *range(max(i - near, 0), i + 1)}
        kept = reach(row[: i + 1], pattern.gamma, set(always))
        asked = {j for j in columns if j <= i and r >= asking_rows[0]}
        if len(kept | asked) > most:
            by_mass = sorted(asked - always, key=lambda j: (-most_asked[j], j))
            by_score = sorted(kept - asked - always, key=lambda j: (-row[j], j))
            kept = always | set((by_mass + by_score)[: most - len(always)])
            asked = set()
        mask[r, list(kept | asked)] = True
    return mask


@pytest.mark.parametrize(("s_q", "s_kv", "block"), SHAPES)
@pytest.mark.parametrize(
    "pattern",
    [BlockCover(), BlockCover(0.5, 0.3), BlockCover(0.6, 0), BlockCover(0.95, 0.9, 5)],
)
def test_block_cover(s_q, s_kv, block, pattern):
    q, k, _ = inputs(s_q, s_kv)
    budget = None if pattern.max_budget is None else pattern.max_budget * block
    given = BlockCover(pattern.gamma, pattern.column_share, budget)
    index, audit = flex_prefill.select(q, k, given, block_size=block, audit=True)
    assert (audit.pattern == "block_cover").all()
    assert index.density < 1
    first = reference.grid(s_q, s_kv, block)[0]
    for h in range(4):
        scores, exact, asking_rows = cover_scores(q[0, :, h], k[0, :, h // 2], block)
        want = cover_mask(scores, exact, asking_rows, first, block, pattern)
        assert (index.to_mask(0, h) == want).all()
        shares = (scores * want).sum(axis=1)
        assert audit.least_row_mass[0, h] == pytest.approx(shares.min(), abs=1e-5)
        assert audit.rows_below_gamma[0, h] == (shares < pattern.gamma).sum()
        kept = (exact * want[asking_rows]).sum(axis=1).mean()
        assert audit.kept_mass[0, h] == pytest.approx(kept, abs=1e-5)
    assert (audit.rows_below_gamma.sum() > 0) == (pattern.max_budget is not None)


@pytest.mark.parametrize(("s_q", "s_kv", "block"), SHAPES)
@pytest.mark.parametrize("pattern", [XAttention(), XAttention(8, 0.6)])
def test_xattention(s_q, s_kv, block, pattern):
    q, k, _ = inputs(s_q, s_kv)
    index, audit = flex_prefill.select(q, k, pattern, block_size=block, audit=True)
    assert (audit.pattern == "block_sparse").all()
    assert index.density < 1
    for h in range(4):
        want = xattention_mask(
            q[0, :, h], k[0, :, h // 2], block, pattern.stride, pattern.threshold
        )
        assert (index.to_mask(0, h) == want).all()


@pytest.mark.parametrize(("s_q", "s_kv", "block"), SHAPES)
@pytest.mark.parametrize(
    "pattern", [FlashPrefill(0.6, 0, 1, 0), FlashPrefill(0.9, 100, 200, 300, False)]
)
def test_flash_prefill(s_q, s_kv, block, pattern):
    q, k, v = inputs(s_q, s_kv)
    index = flex_prefill.select(q, k, pattern, block_size=block)
    assert index.mean_correction == pattern.mean_correction
    assert index.density < 1
    out, lse = flex_prefill.prefill(q, k, v, pattern, block_size=block, return_lse=True)
    for h in range(4):
        one_q, one_k, one_v = q[0, :, h], k[0, :, h // 2], v[0, :, h // 2]
        mask = flash_prefill_mask(one_q, one_k, block, pattern)
        assert (index.to_mask(0, h) == mask).all()
        want, want_lse = corrected_attention(one_q, one_k, one_v, mask, block, pattern)
        np.testing.assert_allclose(out[0, :, h], want, rtol=0, atol=2e-5)
        np.testing.assert_allclose(lse[0, h], want_lse, rtol=0, atol=2e-5)


def corrected_attention(q, k, v, mask, block, pattern):
    """Dropped blocks before the diagonal replaced by their means, block times each."""
    seen = reference.visible(len(q), len(k), block, mask)
    if not pattern.mean_correction:
        return reference.attention(q, k, v, seen)
    first = reference.grid(len(q), len(k), block)[0]
    whole = len(k) // block
    k_mean = k[: whole * block].reshape(whole, block, -1).mean(axis=1)
    v_mean = v[: whole * block].reshape(whole, block, -1).mean(axis=1)
    row = (len(k) - len(q) + np.arange(len(q))) // block - first
    dropped = ~mask[row, :whole] & (np.arange(whole) < row[:, None] + first)
    logits = np.concatenate([q @ k.T, q @ k_mean.T], axis=1).astype(np.float64)
    logits /= np.sqrt(q.shape[1])
    logits[:, len(k) :] += np.log(block)
    logits[~np.concatenate([seen, dropped], axis=1)] = -np.inf
    top = logits.max(axis=1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(axis=1, keepdims=True)
    return p / total @ np.concatenate([v, v_mean]), (top + np.log(total))[:, 0]


def test_the_correction_brings_the_output_closer():
    q, k, v = inputs(1024, 1024)
    exact = flex_prefill.prefill(q, k, v, flex_prefill.Dense())
    errors = [
        np.abs(
            flex_prefill.prefill(q, k, v, FlashPrefill(0.9, 64, 64, 0, on), block_size=64) - exact
        ).mean()
        for on in (False, True)
    ]
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize(("s_q", "s_kv", "block"), SHAPES)
def test_minference(s_q, s_kv, block):
    q, k, v = inputs(s_q, s_kv)
    pattern = MInference(
        (
            MInferenceHead("block_sparse", 300),
            MInferenceHead("a_shape", 70, 150),
            MInferenceHead("vertical_slash", 200, 300),
            MInferenceHead("block_sparse", 0),
        )
    )
    index, audit = flex_prefill.select(q, k, pattern, block_size=block, audit=True)
    assert audit.pattern[0].tolist() == [
        "block_sparse",
        "streaming",
        "vertical_slash",
        "block_sparse",
    ]
    for h, tokens in ((0, 300), (3, 0)):
        want = block_sparse_mask(q[0, :, h], k[0, :, h // 2], block, tokens)
        assert (index.to_mask(0, h) == want).all()
    seen = reference.visible(s_q, s_kv, block, windows=(70, 150))
    first, n_q, n = reference.grid(s_q, s_kv, block)
    want = np.zeros((n_q, n), bool)
    at = np.argwhere(seen)
    want[(at[:, 0] + s_kv - s_q) // block - first, at[:, 1] // block] = True
    assert (index.to_mask(0, 1) == want).all()
    fixed = flex_prefill.select(q, k, VerticalSlash(200, 300), block_size=block)
    assert (index.to_mask(0, 2) == fixed.to_mask(0, 2)).all()
    with pytest.raises(ValueError, match="heads: expected one for each of h_q = 4"):
        flex_prefill.prefill(q, k, v, MInference(pattern.heads[:3]))


def test_packed_is_each_alone():
    lengths = [(300, 300), (200, 517)]
    parts = [inputs(*pair, seed=i) for i, pair in enumerate(lengths)]
    q, k, v = (np.concatenate([part[t][0] for part in parts]) for t in range(3))
    cu_q = np.cumsum([0] + [s_q for s_q, _ in lengths])
    cu_kv = np.cumsum([0] + [s_kv for _, s_kv in lengths])
    heads = tuple(MInferenceHead("block_sparse", 64 + 32 * h) for h in range(4))
    for pattern in (
        XAttention(8, 0.6),
        FlashPrefill(0.9, 0, 32, 0),
        MInference(heads),
        BlockCover(0.5, 0.5, 128),
    ):
        out = flex_prefill.prefill(
            q, k, v, pattern, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, block_size=32
        )
        for i, part in enumerate(parts):
            alone = flex_prefill.prefill(*part, pattern, block_size=32)
            np.testing.assert_array_equal(out[cu_q[i] : cu_q[i + 1]], alone[0])


def test_torch_and_compile():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in inputs(400, 400))
    heads = tuple(MInferenceHead("a_shape", 32, 64 + h) for h in range(4))
    for pattern in (
        XAttention(),
        FlashPrefill(0.5, 0, 64, 64),
        MInference(heads),
        BlockCover(0.5),
        BlockCover(0.9, 0.5, 96),
    ):
        want = flex_prefill.prefill(q.numpy(), k.numpy(), v.numpy(), pattern, block_size=32)
        got = flex_prefill.prefill(q, k, v, pattern, block_size=32)
        np.testing.assert_array_equal(got.numpy(), want)


class TestFile:
    LAYER: ClassVar = {"0": ["vertical_and_slash", 1000, 6096, 0.9], "1": ["stream_llm", 100, 0, 1]}

    def test_published_format(self, tmp_path: Path):
        path = tmp_path / "model.json"
        layer = {**self.LAYER, "2": ["block_sparse", 100, 1, 0.5]}
        path.write_text(json.dumps([layer]))
        pattern = load(path).of(0, 3)
        assert pattern.heads == (
            MInferenceHead("vertical_slash", 1000, 6096),
            MInferenceHead("a_shape", 100, 1),
            MInferenceHead("block_sparse", 6400, 1),
        )
        assert to_entry(pattern.heads[2], 0.5) == layer["2"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[", "expected JSON"),
            ("{}", "a list with an object"),
            ('[{"1": ["stream_llm", 1, 1, 1]}]', "layer 0: expected heads"),
            ('[{"0": ["stream", 1, 1, 1]}]', "layer 0, head 0: expected one of stream_llm"),
            ('[{"0": ["stream_llm", -1, 1, 1]}]', "expected sizes of at least 0, got -1"),
            ('[{"0": 5}]', "expected \\[name"),
        ],
    )
    def test_errors(self, tmp_path: Path, content: str, message: str):
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load(path)

    def test_other_model(self, tmp_path: Path):
        path = tmp_path / "model.json"
        path.write_text(json.dumps([self.LAYER]))
        with pytest.raises(ValueError, match="has 2 heads, the model 4"):
            load(path).of(0, 4)
        with pytest.raises(ValueError, match="it has 1 layers, the model 3"):
            load(path).check(3, 2)
