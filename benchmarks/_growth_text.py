"""Experiment of `growth.py`: a byte-level language model that grows in the middle of training."""

from __future__ import annotations

import copy
import functools
import math

import torch
from _growth_data import Scale, adamw, generator, text
from torch import Tensor, nn
from torch.nn import functional as F

import kasmina_fx
from kasmina_fx import kasmina_layers, kasminify
from kasmina_fx.testing import graft

Scores = dict[str, dict[str, float]]

CONTEXT, BATCH, BEFORE, AFTER, LR = 32, 16, 300, 300, 3e-3


class Block(nn.Module):
    """A transformer's block, norms first, two heads."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, 2, dim // 2)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        out: Tensor = x + self.down(F.relu(self.up(self.norm2(x))))
        return out


class ByteModel(nn.Module):
    """Predicts the next byte from up to 32 before it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, dim), nn.Embedding(CONTEXT, dim)
        self.blocks = nn.Sequential(Block(dim, hidden), Block(dim, hidden))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.bytes(x) + self.places.weight)))
        return out


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, draws: torch.Generator
) -> None:
    part = text()[: _split()]
    for _ in range(steps):
        starts = torch.randint(len(part) - CONTEXT - 1, (BATCH, 1), generator=draws)
        loss = loss_of(model, part[starts + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@functools.cache
def _split() -> int:
    return len(text()) * 9 // 10


@torch.no_grad()
def bits_per_byte(model: nn.Module) -> float:
    """Over 512 windows, the same each time, of the last tenth of the text."""
    part = text()[_split() :]
    starts = torch.linspace(0, len(part) - CONTEXT - 1, 512).long()[:, None]
    model.eval()
    loss = loss_of(model, part[starts + torch.arange(CONTEXT + 1)])
    model.train()
    return float(loss) / math.log(2)


def language(replicate: int, scale: Scale) -> Scores:
    before, after = scale.steps(BEFORE), scale.steps(AFTER)
    torch.manual_seed(replicate)
    host = ByteModel(32, 32)
    optimizer = adamw(host.parameters(), LR)
    train(host, optimizer, before, generator(replicate))

    def on_with(model: nn.Module, its: torch.optim.Optimizer) -> float:
        train(model, its, after, generator(replicate + 1000))
        return bits_per_byte(model)

    def copies() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(host)
        its = adamw(model.parameters(), LR)
        its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return model, its

    def grown() -> float:
        model, its = copies()
        kasminify(
            model,
            num_seeds=2,
            filter_fn=lambda _, name: name.endswith("up"),
            telemetry=False,
            compile=False,
        )
        kasmina_fx.optim.follow(its, model)
        for layer in kasmina_layers(model).values():
            graft(layer, range(layer.num_seeds), "residual_mlp", 1.0)
        return on_with(model, its)

    torch.manual_seed(replicate)
    big = ByteModel(32, 66)
    its = adamw(big.parameters(), LR)
    train(big, its, before, generator(replicate))
    return {
        "": {
            "plain": on_with(*copies()),
            "`residual_mlp` in the blocks' hidden layers, 2 chunks of 16": grown(),
            "hidden 66 for 32 from the start": on_with(big, its),
        }
    }
