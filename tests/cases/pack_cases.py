"""A small model whose host is frozen, and seeds of its packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import kasmina_fx
from kasmina_fx import KasminaLayer, SeedLifecycle, kasmina_layers, kasminify
from kasmina_fx.testing import graft

X: Final = torch.linspace(-2, 2, 48).view(6, 8)
TUNING: Final = SeedLifecycle.FINE_TUNING

#: Seeds and blueprints of three packs: some chunks in several, with different blueprints.
PACKS: Final = {"a": ([0, 1], "mlp"), "b": ([1, 2, 3], "lora"), "c": ([0, 3], "affine")}


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


def small(**settings: Any) -> nn.Sequential:
    made = kasminify(plain(), **({"num_seeds": 4, "compile": False} | settings))
    return made.requires_grad_(False)


def grow(
    model: nn.Module, seeds: Sequence[int], kind: int | str, stage: SeedLifecycle = TUNING
) -> None:
    """Blended seeds with values that nobody else has, in every layer."""
    for layer in kasmina_layers(model).values():
        graft(layer, seeds, kind, 1.0, stage)
        for seed in seeds:
            bank, slot = layer.bank_of(seed) or (None, 0)
            assert bank is not None  # it has just germinated
            for stack in bank.tensors():
                stack.data[slot].add_(torch.randn_like(stack[slot]), alpha=0.3)


def with_packs(**settings: Any) -> nn.Sequential:
    """The packs of :data:`PACKS`, the last of them in use."""
    model = small(**settings)
    mine = kasmina_fx.packs(model)
    for name, (seeds, kind) in PACKS.items():
        mine.activate(None)
        grow(model, seeds, kind)
        mine.capture(name)
    return model


def output(model: nn.Module, x: Tensor = X) -> Tensor:
    training = model.training
    with torch.no_grad():
        out: Tensor = model.eval()(x)
    model.train(training)
    return out


def outputs(model: nn.Module) -> dict[str | None, Tensor]:
    """Of each pack and of none; the pack that was in use is so again."""
    mine = kasmina_fx.packs(model)
    active, found = mine.active, {}
    for name in (*mine.names(), None):
        mine.activate(name)
        found[name] = output(model)
    mine.activate(active)
    return found


def first(model: nn.Module) -> KasminaLayer:
    return kasmina_layers(model)["0"]


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    """Losses of steps, each on a batch of its number."""
    losses = []
    for number in steps:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        loss: Tensor = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_of(model: nn.Module, build: Callable[[Any], Optimizer]) -> Optimizer:
    """One that takes in all stacks as they come."""
    optimizer = build([nn.Parameter(torch.zeros(1))])
    kasmina_fx.optim.follow(optimizer, model)
    return optimizer
