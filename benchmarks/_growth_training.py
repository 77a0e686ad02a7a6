"""Experiments of `growth.py`: a small host that grows in the middle of its training."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from _growth_data import (
    Digits,
    Scale,
    accuracy,
    adamw,
    classifier,
    is_hidden,
    train,
)
from torch import nn

import kasmina_fx
from kasmina_fx import GraftingConfig, SeedConfig, SeedLifecycle, kasmina_layers, kasminify

Scores = dict[str, dict[str, float]]

WIDTH, LR, BEFORE, AFTER, LONG_RAMP = 8, 3e-3, 600, 450, 200


@dataclass(frozen=True)
class Growth:
    """How a host grows: TRAINING for so many steps, then a ramp, then learning on or not."""

    blueprint: str
    seeds: int = 1  # a layer
    training: int = 0
    ramp: int = LONG_RAMP  # 0: alpha is 1 at once
    freeze: bool = False  # after the ramp


class Nursery:
    """A host in mid-training, and what becomes of copies of it on the same batches."""

    def __init__(self, replicate: int, scale: Scale) -> None:
        self.replicate, self.scale, self.data = replicate, scale, Digits.of(replicate)
        self.host = classifier(WIDTH, replicate)
        self.optimizer = adamw(self.host.parameters(), LR)
        train(self.host, self.optimizer, self.data, scale.steps(BEFORE), replicate)
        self._found: dict[Growth, float] = {}
        self.rest = scale.steps(AFTER)

    @classmethod
    @functools.cache
    def of(cls, replicate: int, scale: Scale) -> Nursery:
        return cls(replicate, scale)

    def plain(self) -> float:
        host, optimizer = self._copies()
        train(host, optimizer, self.data, self.rest, self.replicate + 1000)
        return accuracy(host, self.data)

    def big(self, width: int) -> float:
        """A wider host from the start, all steps, on the same batches."""
        host = classifier(width, self.replicate)
        optimizer = adamw(host.parameters(), LR)
        train(host, optimizer, self.data, self.scale.steps(BEFORE), self.replicate)
        train(host, optimizer, self.data, self.rest, self.replicate + 1000)
        return accuracy(host, self.data)

    def grown(self, growth: Growth) -> float:
        """Accuracy after growth; experiments that ask for the same share it."""
        if growth not in self._found:
            self._found[growth] = self._grow(growth)
        return self._found[growth]

    def _grow(self, growth: Growth) -> float:
        host, optimizer = self._copies()
        steps = self.scale.steps(max(1, growth.ramp))
        config = SeedConfig(grafting=GraftingConfig(fixed_steps=steps), ramp_every="step")
        kasminify(
            host,
            num_seeds=growth.seeds,
            filter_fn=is_hidden,
            config=config,
            telemetry=False,
            compile=False,
        )
        kasmina_fx.optim.follow(optimizer, host)
        germinate(host, growth.blueprint)
        done = self.scale.steps(growth.training) if growth.training else 0
        learns = torch.Generator().manual_seed(self.replicate + 1000)
        phases = Phases(host, optimizer, self.data, learns)
        phases.take(done)
        advance(host, SeedLifecycle.GRAFTING)
        if growth.ramp == 0:
            for layer in kasmina_layers(host).values():
                layer.set_alpha(range(layer.num_seeds), 1.0)
        if growth.freeze:
            phases.take(steps)
            advance(host, SeedLifecycle.STABILIZATION)
            done += steps
        phases.take(self.rest - done)
        return accuracy(host, self.data)

    def _copies(self) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        host = copy.deepcopy(self.host)
        optimizer = adamw(host.parameters(), LR)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return host, optimizer


@dataclass(frozen=True)
class Phases:
    """One stream of batches, whatever happens to the seeds between its steps."""

    host: nn.Module
    optimizer: torch.optim.Optimizer
    data: Digits
    draws: torch.Generator

    def take(self, steps: int) -> None:
        train(self.host, self.optimizer, self.data, steps, self.draws)


def germinate(host: nn.Module, blueprint: str) -> None:
    """Let every seed germinate; those that can't be grafted yet enter TRAINING."""
    for layer in kasmina_layers(host).values():
        layer.request_germination(range(layer.num_seeds), blueprint)
    if blueprint == "mlp":
        advance(host, SeedLifecycle.TRAINING)


def advance(host: nn.Module, stage: SeedLifecycle) -> None:
    for layer in kasmina_layers(host).values():
        layer.advance(range(layer.num_seeds), stage)


def training(replicate: int, scale: Scale) -> Scores:
    at = Nursery.of(replicate, scale)
    return {
        "": {
            "plain host, 64-8-8-10": at.plain(),
            "`mlp`, TRAINING 105 steps, ramp 42": at.grown(Growth("mlp", training=105, ramp=42)),
            "`mlp`, TRAINING 105 steps, ramp 200": at.grown(Growth("mlp", training=105)),
            "`mlp`, ramp 200 only": at.grown(Growth("mlp")),
            "`residual_mlp`, ramp 200": at.grown(Growth("residual_mlp")),
            "`residual_mlp`, no ramp": at.grown(Growth("residual_mlp", ramp=0)),
            "64-14-14-10 from the start": at.big(14),
        }
    }


def freezing(replicate: int, scale: Scale) -> Scores:
    at = Nursery.of(replicate, scale)
    return {
        f"`{blueprint}`": {
            "learns on": at.grown(Growth(blueprint)),
            "frozen after the ramp": at.grown(Growth(blueprint, freeze=True)),
        }
        for blueprint in ("residual_mlp", "mlp")
    }


def chunks(replicate: int, scale: Scale) -> Scores:
    at = Nursery.of(replicate, scale)
    plain = at.plain()
    return {
        f"`{blueprint}`": {
            "plain host": plain,
            "one chunk of 8 features a layer": at.grown(Growth(blueprint)),
            "8 chunks of one feature": at.grown(Growth(blueprint, seeds=8)),
        }
        for blueprint in ("residual_mlp", "mlp")
    }
