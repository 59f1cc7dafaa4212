"""Muon for the matrices (Jordan et al. 2024), all of one shape in one batch, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration to the nearest orthogonal matrix, for a batch [n, rows, cols]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        y = x @ x.mT
        x = a * x + (b * y + c * y @ y) @ x
    return x if wide else x.mT


class Muon:
    """Momentum, orthogonalised, scaled to the size of AdamW's updates."""

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, decay: float = 0.01):
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self.groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].device))
            for shape, group in by_shape.items()
        ]
        self.momentum, self.decay = momentum, decay
        self.direction = orthogonalize

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, buffer in self.groups:
            gradient = torch.stack([p.grad for p in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = self.direction(gradient.lerp(buffer, self.momentum)).float()
            scale = 0.2 * max(buffer.shape[-2:]) ** 0.5
            torch._foreach_mul_(group, 1 - lr * self.decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr * scale)
