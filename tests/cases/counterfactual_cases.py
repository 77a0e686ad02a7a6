"""Batches, their loss, and a model that draws random numbers in evaluation."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

BATCHES: Final = [
    (torch.randn(6, 8, generator=torch.Generator().manual_seed(n)), torch.full((6, 8), float(n)))
    for n in range(4)
]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


class Noisy(nn.Module):
    """A layer between two calls for random numbers, even in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.fc(x + torch.rand_like(x)))
        return out * torch.rand_like(out)
