"""Blueprints of each kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BUILTINS = ("mlp", "residual_mlp", "lora", "affine", "bottleneck")


class Elementwise(nn.Module):
    """A user's module: constant buffers, one of them of ints, and no feature dim of its own."""

    powers: Tensor
    floor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(()), requires_grad=False)
        self.register_buffer("powers", torch.tensor([1, 2]))
        self.register_buffer("floor", torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.gain * x) ** int(1 + i) for i in range(2)) * 0.1 + self.floor + self.frozen


def user(size: int) -> nn.Module:
    return Elementwise()
