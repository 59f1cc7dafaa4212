"""Attention and selection in plain NumPy, float64: independent of the library's own reference."""

from __future__ import annotations

import numpy as np

# Unit roundoff of the element types.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def grid(s_q: int, s_kv: int, block_size: int) -> tuple[int, int, int]:
    """(first_q_block, n_q, n_kv): blocks are anchored at token 0, of queries and of keys."""
    first, n_kv = (s_kv - s_q) // block_size, -(-s_kv // block_size)
    return first, n_kv - first, n_kv


def visible(s_q, s_kv, block_size, mask=None, windows=None):
    """bool [s_q, s_kv]: causal keys, of kept blocks (mask [n_q, n_kv]) and inside the windows."""
    position = np.arange(s_kv - s_q, s_kv)[:, None]
    key = np.arange(s_kv)[None, :]
    seen = key <= position
    if mask is not None:
        first = grid(s_q, s_kv, block_size)[0]
        seen &= mask[position // block_size - first, key // block_size]
    if windows is not None:
        seen &= (key < windows[0]) | (position - key < windows[1])
    return seen


def attention(q, k, v, seen, scale=None, round_to=None):
    """One head: q [s_q, d], k [s_kv, d], v [s_kv, d_v], seen [s_q, s_kv] -> out, lse.

    In float64; with `round_to` (a function that rounds to an element type) as a plain
    implementation in that type would do it: float32 products, rounded probabilities and output.
    """
    kind = np.float64 if round_to is None else np.float32
    p, lse = _probabilities(q, k, seen, scale, kind)
    v = v.astype(kind)
    if round_to is None:
        return p @ v, lse
    return round_to(round_to(p) @ v), lse


def _probabilities(q, k, seen, scale, kind=np.float64):
    """softmax(scale * q k^T) over what is seen, and its logarithmic sums; 0, -inf over nothing."""
    q, k = q.astype(kind), k.astype(kind)
    scale = kind(1 / np.sqrt(q.shape[-1]) if scale is None else scale)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = np.where(seen, q @ k.T * scale, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        p = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = p.sum(axis=-1, keepdims=True)
        return np.where(total == 0, 0, p / total), (np.log(total) + top)[:, 0]


def assert_close(out, q, k, v, seen, scale=None, dtype="float32", round_to=None):
    """|error| at most twice that of the plain implementation in the type, and a few ulp more: of
    the result, of its terms as their roundings add up, and of float32 arithmetic."""
    exact, _ = attention(q, k, v, seen, scale)
    plain, _ = attention(q, k, v, seen, scale, round_to or (lambda x: x.astype(np.float32)))
    p, _ = _probabilities(q, k, seen, scale)
    v = np.abs(v.astype(np.float64))
    few_ulp = ROUNDOFF[dtype] * (2 * np.abs(exact) + 6 * np.sqrt(p**2 @ v**2)) + 2**-21 * (p @ v)
    allowed = 2 * np.abs(plain - exact).max() + few_ulp
    error = np.abs(out.astype(np.float64) - exact)
    assert (error <= allowed).all(), f"worst {(error / allowed).max():.2f} times what is allowed"


def _cover(scores, gamma):
    return int((np.cumsum(np.sort(scores)[::-1]) <= gamma).sum()) + 1


def _best(scores, count):
    """The `count` best, block 0 always among them; ties: lower index first."""
    scores = scores.copy()
    scores[0] = np.inf
    return np.argsort(-scores, kind="stable")[: max(count, 1)]


def _block_means(x, first_token, block_size):
    """Means over the blocks that rows first_token, first_token + 1, ... fall into, and counts."""
    block = (first_token + np.arange(len(x))) // block_size
    block -= block[0]
    sums = np.zeros((block[-1] + 1, x.shape[1]))
    np.add.at(sums, block, x)
    counts = np.bincount(block)
    return sums / counts[:, None], counts


def _softmax(logits, weights):
    p = weights * np.exp(logits - logits.max())
    return p / p.sum()


def _jsd_sqrt(p, r):
    def divergence(a, m):
        return np.sum(a[a > 0] * np.log(a[a > 0] / m[a > 0]))

    m = (p + r) / 2
    return np.sqrt(max(0.0, (divergence(p, m) + divergence(r, m)) / 2))


def select_flex_prefill(q, k, block_size, gamma, tau, min_budget, max_budget=None, scale=None):
    """One head: q [s_q, d], k [s_kv, d] -> (mask [n_q, n_kv], name of the head's pattern)."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    s_q, s_kv = len(q), len(k)
    first, n_q, n = grid(s_q, s_kv, block_size)
    causal = np.arange(n)[None, :] <= first + np.arange(n_q)[:, None]
    least = -(-min_budget // block_size)
    if s_q <= block_size or s_kv <= max(2 * block_size, least * block_size):
        return causal, "dense"
    most = n if max_budget is None else min(-(-max_budget // block_size), n)
    scale = 1 / np.sqrt(q.shape[1]) if scale is None else scale

    rows = min(block_size, s_q)
    probe = q[-rows:]
    position = np.arange(s_kv - rows, s_kv)
    logits = np.where(np.arange(s_kv)[None, :] <= position[:, None], probe @ k.T * scale, -np.inf)
    a = np.exp(logits - logits.max(axis=1, keepdims=True))
    a /= a.sum(axis=1, keepdims=True)
    vertical = a.mean(axis=0)
    slash = np.zeros(s_kv)
    for i, at in enumerate(position):
        slash[: at + 1] += a[i, at::-1] / rows

    padding = np.zeros(n * block_size - s_kv)
    vertical_block = np.concatenate([vertical, padding]).reshape(n, block_size).sum(axis=1)
    slash_block = np.concatenate([slash, padding]).reshape(n, block_size).sum(axis=1)
    k_means, k_counts = _block_means(k, 0, block_size)
    estimate = _softmax(scale * (k_means @ probe.mean(axis=0)), k_counts / block_size)
    query_aware = _jsd_sqrt(estimate, vertical_block) < tau

    n_v = n_s = least
    if not query_aware:
        n_v = min(max(_cover(vertical, gamma) // block_size + 1, least), most)
        n_s = min(max(_cover(slash, gamma) // block_size + 1, least), most)
    mask = np.zeros((n_q, n), bool)
    mask[:, _best(vertical_block, n_v)] = True
    distance = first + np.arange(n_q)[:, None] - np.arange(n)[None, :]
    mask |= np.isin(distance, _best(slash_block, n_s))
    if query_aware:
        q_means, _ = _block_means(q, s_kv - s_q, block_size)
        logits = np.where(causal, scale * (q_means @ k_means.T), -np.inf)
        p = np.exp(logits - logits.max(axis=1, keepdims=True)) * k_counts
        p /= p.sum(axis=1, keepdims=True)
        order = np.argsort(-p.ravel(), kind="stable")
        kept = order[np.cumsum(p.ravel()[order]) <= gamma * n_q]
        mask.ravel()[kept] = True
    return mask & causal, "query_aware" if query_aware else "vertical_slash"
