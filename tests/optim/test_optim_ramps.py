"""Ramps that make a step with each step of the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import OneLayer, layer_of
from optim_cases import loss_of, train
from torch import nn
from torch.optim import AdamW, Optimizer

from kasmina_fx import (
    KasminaLayer,
    SeedConfig,
    SeedLifecycle,
)

S = SeedLifecycle


def ramping(strategy: str = "FIXED_RAMP", every: str = "step") -> nn.Module:
    torch.manual_seed(0)
    model = OneLayer()
    layer = KasminaLayer(model.fc, 4, layer_id="fc", config=SeedConfig(ramp_every=every))
    model.fc = layer  # type: ignore[assignment]  # it stands for the Linear
    for kind, seed in (("mlp", 0), ("affine", 1)):
        layer.request_germination(seed, kind, strategy)
        layer.advance(seed, S.TRAINING)
        layer.advance(seed, S.GRAFTING)
    return model


def ramp_steps(model: nn.Module) -> float:
    layer = layer_of(model)
    return float(layer.state.alpha[0]) * layer.config.grafting.fixed_steps


def test_a_ramp_makes_one_step_with_each_step() -> None:
    model, by_epoch = ramping(), ramping(every="epoch")
    for each in (model, by_epoch):
        train(each, AdamW(each.parameters()), 3)
    assert ramp_steps(model) == pytest.approx(3)
    assert ramp_steps(by_epoch) == 0


def test_of_several_optimizers_the_one_with_the_first_stack_ramps() -> None:
    model = ramping()
    first, *others = layer_of(model).blueprint_parameters()
    optimizers = [AdamW([first]), AdamW(others), AdamW(layer_of(model).base.parameters())]
    loss_of(model, 0).backward()
    for optimizer in reversed(optimizers):
        optimizer.step()
    assert ramp_steps(model) == pytest.approx(1)


def test_an_optimizer_around_another_ramps_once() -> None:
    class Around(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    model = ramping()
    optimizer = Around(AdamW(model.parameters()))
    train(model, optimizer, 2)
    assert ramp_steps(model) == pytest.approx(2)


def test_the_hosts_gradient_norm_is_recorded_for_those_who_ask() -> None:
    model, plain = ramping("GRAD_NORM_GATED", every="epoch"), ramping(every="epoch")
    unknown = layer_of(plain).kasmina.grad_norm.clone()
    for each in (model, plain):
        train(each, AdamW(each.parameters()), 1)
    weight = layer_of(model).weight
    assert weight.grad is not None
    torch.testing.assert_close(layer_of(model).kasmina.grad_norm, weight.grad.norm())
    torch.testing.assert_close(layer_of(plain).kasmina.grad_norm, unknown, equal_nan=True)


def test_the_norm_is_the_unscaled_one_under_a_fused_optimizer() -> None:
    norms = []
    for scaled in (False, True):
        model = ramping("GRAD_NORM_GATED", every="epoch")
        optimizer = AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        train(model, optimizer, 1, scaler)
        norms.append(layer_of(model).kasmina.grad_norm.clone())
        layer_of(model).base.zero_grad()
        optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]  # as a scaler does
        optimizer.step()  # without a gradient the norm stays
        assert torch.equal(layer_of(model).kasmina.grad_norm, norms[-1])
    torch.testing.assert_close(norms[1], norms[0])
