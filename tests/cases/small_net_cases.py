"""A small net that grows, and an owner that passes a child by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
    kasmina_layers,
    kasminify,
)

X = torch.linspace(-1, 1, 8).view(2, 4)


def net(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6))
    return kasminify(made, **({"num_seeds": 3, "compile": False} | settings))


def layer_of(model: nn.Module) -> KasminaLayer:
    return kasmina_layers(model)["0"]


class PassesBy(nn.Module):
    """An owner that reads the weight of one child, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = nn.functional.linear(self.called(args[0]), self.read.weight)
        return out


class Broken(nn.Module):
    """A model of two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        out: Tensor = self.norm(self.second(x))
        return out


class Recurrent(nn.Module):
    """A layer behind an LSTM, which Dynamo does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.lstm(x)[0])
        return out
