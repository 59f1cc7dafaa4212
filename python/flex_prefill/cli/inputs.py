"""Inputs on which speed and density are compared, made by torch's generator from a seed.

``structured``
    What real heads look like: an attention sink, a local band whose width differs by head, and
    0.3 % of the keys that many queries look for.
``random``
    Independent normal numbers: attention spreads over everything, the worst case.

Both give q ``[1, n, h_q, d]`` and k, v ``[1, n, h_kv, d]``, made on ``device``; a seed gives the
same numbers in every run on the same kind of device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Four kinds of K/V head, and of query head within a group.
_KV_SHARPNESS = (6.0, 3.0, 8.0, 2.0)
_KV_HEAVY = (10.0, 14.0, 6.0, 12.0)
_Q_SHARPNESS = (1.0, 0.7, 1.3, 0.3)
_Q_HEAVY = (8.0, 10.0, 6.0, 12.0)
_HEAVY_SHARE = 0.003
_SINK_TOKENS = 4


def random(
    n: int,
    h_q: int,
    h_kv: int,
    d: int,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensors:
    """Independent normal q, k, v."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"generator": generator, "device": device}
    q, k, v = (torch.randn(1, n, h, d, **on).to(dtype) for h in (h_q, h_kv, h_kv))
    return q, k, v


def structured(
    n: int,
    h_q: int,
    h_kv: int,
    d: int,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensors:
    """q, k, v with a sink, a local band and heavy keys; v is random."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    on: dict[str, Any] = {"generator": generator, "device": device}
    q, k, v = (torch.randn(1, n, h, d, **on) for h in (h_q, h_kv, h_kv))
    # All heavy keys lie in one direction.
    direction = torch.randn(d, **on)
    direction /= direction.norm()
    heavy = (torch.rand(n, **on) < _HEAVY_SHARE).float()
    heavy[:_SINK_TOKENS] = 1

    # The first quarter of the channels holds a position: near tokens have near codes.
    n_freq = d // 8
    freq = torch.exp(torch.linspace(math.log(1 / 8.0), math.log(1 / 2000.0), n_freq, device=device))
    angle = torch.arange(n, device=device).float()[:, None] * freq
    position = torch.cat([angle.cos(), angle.sin()], -1) * 8**0.5 / (2 * n_freq) ** 0.5
    channels = slice(0, 2 * n_freq)

    for h in range(h_kv):
        k[0, :, h, channels] = position * _KV_SHARPNESS[h % 4]
        k[0, :, h] += heavy[:, None] * direction * _KV_HEAVY[h % 4]
    for h in range(h_q):
        kv, g = divmod(h, h_q // h_kv)
        q[0, :, h, channels] = position * _KV_SHARPNESS[kv % 4] * _Q_SHARPNESS[g % 4]
        q[0, :, h] += direction * _Q_HEAVY[g % 4]
    return q.to(dtype), k.to(dtype), v.to(dtype)


INPUTS = {"structured": structured, "random": random}
