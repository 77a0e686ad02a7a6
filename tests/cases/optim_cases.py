"""A growing model, its stacks, and the optimizers that train it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from graph_cases import OneLayer, layer_of, wrapped
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer, RMSprop, Rprop

from kasmina_fx.banks.bank import Bank
from kasmina_fx.testing import graft


def growing(reserve: int = 0, seeds: int = 6) -> nn.Module:
    """Two seeds in GRAFTING: a bank of two slots, both in use, unless more are reserved."""
    torch.manual_seed(0)
    model = wrapped(OneLayer(), seeds=seeds)
    if reserve:
        layer_of(model).reserve(reserve, "mlp")
    graft(layer_of(model), [0, 1], "mlp")
    return model


def bank_of(model: nn.Module, name: str = "fc") -> Bank:
    return layer_of(model, name).kasmina.bank_list()[0]


def stacks(model: nn.Module, name: str = "fc") -> list[Tensor]:
    return list(bank_of(model, name).tensors())


def rows(model: nn.Module, slot: int) -> list[Tensor]:
    return [stack.detach()[slot].clone() for stack in stacks(model)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loss_of(run: Any, number: int) -> Tensor:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(number))
    loss: Tensor = (run(x) - 1).square().mean()
    return loss


def train(
    run: Any, optimizer: Optimizer, steps: int, scaler: torch.amp.GradScaler | None = None
) -> list[float]:
    losses = []
    for number in range(steps):
        losses.append(step(run, optimizer, number, scaler))
    return losses


def step(
    run: Any, optimizer: Optimizer, number: int, scaler: torch.amp.GradScaler | None = None
) -> float:
    """One step on the batch of a number; its loss."""
    optimizer.zero_grad()
    loss = loss_of(run, number)
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.item()


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW foreach": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adagrad": lambda p: Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "Adafactor": lambda p: Adafactor(p, lr=0.05, weight_decay=0.01),
    "Rprop": lambda p: Rprop(p, lr=0.01),
}
