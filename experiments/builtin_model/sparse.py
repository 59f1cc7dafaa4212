"""FlexPrefill's choice of blocks in plain PyTorch, batched, for experiments on any device.

Written from the algorithm's description and independent of the library, so that the built-in
model could be tried with FlexPrefill on a GPU before the library ran there. It keeps a score per
probe row and key in memory; the library does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlexPrefill:
    """Parameters of the selection."""

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    block: int = 128


@dataclass(frozen=True)
class StreamingLLM:
    """The first tokens and a window of the nearest ones."""

    global_window: int = 1024
    local_window: int = 8192
    block: int = 128


@dataclass
class Selection:
    """Kept blocks [b, h, n, n] and, per head, jsd_sqrt and whether it is query-aware [b, h]."""

    kept: Tensor
    jsd_sqrt: Tensor
    query_aware: Tensor

    def density(self) -> Tensor:
        n = self.kept.shape[-1]
        return self.kept.sum((-1, -2)) / (n * (n + 1) / 2)


def _entropy_terms(p: Tensor, q: Tensor) -> Tensor:
    # q is a mean with p: where p is so small that q rounds to 0, the term is 0 as well
    return torch.where((p > 0) & (q > 0), p * (p / q).log(), 0.0).sum(-1)


def _kept_until(scores: Tensor, limit: float) -> Tensor:
    """How many of the best scores have a running sum of at most limit."""
    return (scores.sort(-1, descending=True).values.cumsum(-1) <= limit).sum(-1)


def _best(scores: Tensor, count: Tensor) -> Tensor:
    """Mask of the `count` best entries of the last axis, lower index first among equals."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < count[..., None]


@torch.no_grad()
def select(q: Tensor, k: Tensor, lengths: Tensor, pattern: FlexPrefill | StreamingLLM) -> Selection:
    """Choose blocks for right-padded sequences.

    q [b, s, h_q, d], k [b, s, h_kv, d], s a multiple of the block; lengths [b], each in the last
    block of s.
    """
    b, s, h, d = q.shape
    block, n = pattern.block, s // pattern.block
    index = torch.arange(n, device=q.device)
    causal = index[:, None] >= index
    if isinstance(pattern, StreamingLLM):
        kept = index < pattern.global_window // block
        kept = (kept | (index[:, None] - index < pattern.local_window // block)) & causal
        zeros = torch.zeros(b, h, device=q.device)
        return Selection(kept.expand(b, h, n, n), zeros, zeros.bool())

    group, scale = h // k.shape[2], d**-0.5
    k32 = k.float().repeat_interleave(group, 2).transpose(1, 2)  # [b, h, s, d]
    rows = lengths[:, None] - block + torch.arange(block, device=q.device)  # [b, p]
    probe = q.gather(1, rows[:, :, None, None].expand(-1, -1, h, d)).float().transpose(1, 2)
    keys = torch.arange(s, device=q.device)
    scores = (scale * probe @ k32.mT).masked_fill(keys > rows[:, None, :, None], -torch.inf)
    a = scores.softmax(-1)  # [b, h, p, s]
    vertical = a.mean(2)
    distance_key = rows[:, :, None] - keys  # key at distance d of each row, [b, p, s]
    gathered = a.gather(-1, distance_key.clamp(min=0)[:, None].expand(-1, h, -1, -1))
    slash = gathered.masked_fill(distance_key[:, None] < 0, 0.0).mean(2)

    least = min(-(-pattern.min_budget // block), n)
    n_v, n_s = (
        ((_kept_until(x, pattern.gamma) + 1) // block + 1).clamp(least, n)
        for x in (vertical, slash)
    )
    vertical_block = vertical.view(b, h, n, block).sum(-1)
    slash_block = slash.view(b, h, n, block).sum(-1)

    valid = (keys < lengths[:, None]).view(b, 1, n, block)  # keys of the ragged last block
    share = valid.sum(-1) / block  # [b, 1, n]
    mean_k = (k32.view(b, h, n, block, d) * valid[..., None]).sum(-2) / (share * block)[..., None]
    mean_probe = probe.mean(2)
    pooled = (mean_probe[:, :, None] * mean_k).sum(-1) * scale + share.log()
    pooled = pooled.softmax(-1)
    middle = (pooled + vertical_block) / 2
    divergence = _entropy_terms(pooled, middle) + _entropy_terms(vertical_block, middle)
    jsd_sqrt = (divergence / 2).clamp(min=0).sqrt()
    query_aware = jsd_sqrt < pattern.tau

    n_v, n_s = (torch.where(query_aware, least, x) for x in (n_v, n_s))
    first = index == 0
    columns = _best(vertical_block.masked_fill(first, torch.inf), n_v)
    diagonals = _best(slash_block.masked_fill(first, torch.inf), n_s)
    distance = (index[:, None] - index).clamp(min=0)
    kept = columns[:, :, None, :] | diagonals[..., distance]

    q32 = q.float().transpose(1, 2).reshape(b, h, n, block, d)
    mean_q = (q32 * valid[..., None]).sum(-2) / (share * block)[..., None]
    map_scores = scale * mean_q @ mean_k.mT + share.log()[:, :, None]
    p = map_scores.masked_fill(~causal, -torch.inf).softmax(-1).view(b, h, n * n)
    wanted = _kept_until(p, pattern.gamma * n)
    aware = _best(p, wanted).view(b, h, n, n) & query_aware[..., None, None]
    kept = (kept | aware | first | (distance == 0)) & causal
    return Selection(kept, jsd_sqrt, query_aware)


@cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, dense_from: Tensor | None = None
) -> Tensor:
    """Attention over kept blocks [b, h, n, n]; q, k, v [b, s, h, d] on a GPU, differentiable.

    Rows from dense_from [b] on see every key before them, as decoded tokens do.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n = kept.shape[-1]
    index = torch.arange(n, device=q.device)
    diagonal, causal = index[:, None] == index, index[:, None] >= index
    if dense_from is None:
        dense_from = torch.full((len(q),), q.shape[1], device=q.device)
    first = (dense_from // block)[:, None, None, None]  # block where dense rows begin
    row = index[:, None]
    partial = ((kept & diagonal) | (row == first) | ((row > first) & diagonal)) & causal
    full = (kept | (row > first)) & causal & ~partial

    def mask_mod(b, h, q_index, kv_index):
        seen = (q_index >= dense_from[b]) | kept[b, h, q_index // block, kv_index // block]
        return (q_index >= kv_index) & seen

    blocks = []
    for mask in (partial, full):
        order = mask.int().argsort(dim=-1, descending=True, stable=True).int().contiguous()
        blocks += [mask.sum(-1, dtype=torch.int32), order]
    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=block, mask_mod=mask_mod)
    out = _compiled_flex_attention()(
        *(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int) -> Tensor:
    """The same with a full mask: for small sizes and for tests on the CPU."""
    s, group = q.shape[1], q.shape[2] // k.shape[2]
    mask = kept.repeat_interleave(block, -1).repeat_interleave(block, -2)
    mask = mask & torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
