"""Layers under torch.func, autocast, checkpointing and without gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import CASES, MIXES, all_builtins, assert_same, grown, perturb, training_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    reference,
)
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.testing import graft


def test_functional_call_replaces_base_and_blueprint_parameters() -> None:
    layer = grown(CASES["linear, 2-D"], all_builtins, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    fresh = {name: p.detach() * 0.5 for name, p in layer.named_parameters()}
    got = torch.func.functional_call(layer, fresh, (x,))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(got, twin(x), atol=0, rtol=0)
    assert not torch.equal(got, layer(x))


def test_torch_func_grad_over_parameters_equals_backward() -> None:
    layer = grown(CASES["linear, 2-D"], all_builtins, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, values, (x,))
        return out.square().sum()

    got = torch.func.grad(loss)(parameters)
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


def test_blueprint_gradients_are_right_by_finite_differences() -> None:
    layer = grown(CASES["linear, 2-D"], all_builtins, torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        out: Tensor = torch.func.functional_call(layer, named, (x,))
        return out

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize("mix", MIXES[1:], ids=lambda mix: mix.__name__.strip("_"))
def test_autocast_to_bfloat16(mix: Callable[[KasminaLayer], None]) -> None:
    layer = grown(CASES["linear, 3-D"], mix, torch.float32)
    x = torch.randn(3, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        expected = reference.forward(layer, x)
        plain = layer.base(x)
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)
    out.float().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) and p.grad.dtype == torch.float32
        for p in layer.parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    layer = grown(CASES["linear, 2-D"], all_builtins, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = layer(x)
    with mode():
        out = layer(x)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    assert layer.get_health_report()["count"][0] == 2 * 3 * 2
    layer(x).sum().backward()  # training goes on


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_seeds_changed_without_gradients_train_afterwards(mode: Callable[[], Any]) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    with mode():
        graft(layer, [0, 1], "mlp", 0.5)
        graft(layer, 2, layer.register_blueprint("lora"), 0.5)
    got = training_step(layer, layer, (torch.randn(3, 4),))
    assert any(t.any() for name, t in got.items() if name.startswith("kasmina.banks.mlp"))
    layer.set_alpha(0, 1.0)
    graft(layer, 3, "mlp", 0.5)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_and_counts_a_step_once(reentrant: bool) -> None:
    layer = grown(CASES["linear, 2-D"], all_builtins, torch.float64)
    x = (torch.randn(3, 7, dtype=torch.float64),)
    expected = training_step(layer, layer, x)
    layer.kasmina.telemetry.reset()
    got = training_step(layer, lambda *xs: checkpoint(layer, *xs, use_reentrant=reentrant), x)
    assert_same(got, expected, 1e-12)
    assert layer.get_health_report()["count"].tolist() == [6.0] * 6


def test_two_layers_may_share_a_base() -> None:
    base = nn.Linear(6, 6).double()
    first, second = KasminaLayer(base, 3), KasminaLayer(base, 2)
    graft(first, 0, "mlp", 0.5)
    graft(second, 1, "bottleneck", 0.5)
    perturb(second)
    model = nn.Sequential(first, second)
    x = torch.randn(4, 6, dtype=torch.float64)
    out = model(x)
    torch.testing.assert_close(
        out, reference.forward(second, reference.forward(first, x)), atol=1e-12, rtol=1e-12
    )
    out.sum().backward()
    grad = base.weight.grad
    assert grad is not None
    got = grad.clone()
    model.zero_grad()
    reference.forward(second, reference.forward(first, x)).sum().backward()
    assert base.weight.grad is not None
    torch.testing.assert_close(got, base.weight.grad)
    assert len({id(p) for p in model.parameters() if not isinstance(p, StackedParameter)}) == 2


def test_a_layer_called_twice_in_one_step_sums_its_gradients() -> None:
    layer = KasminaLayer(nn.Linear(6, 6).double(), 3)
    graft(layer, [0, 2], "mlp", 0.5)
    x = (torch.randn(4, 6, dtype=torch.float64),)
    got = training_step(layer, lambda x: layer(layer(x).relu()), x)
    expected = training_step(
        layer, lambda x: reference.forward(layer, reference.forward(layer, x).relu()), x
    )
    assert_same(got, expected, 1e-12)
    assert layer.get_health_report()["count"].tolist() == [16.0] * 3


def test_seeds_may_change_between_forward_and_backward() -> None:
    layer = KasminaLayer(nn.Linear(4, 24).double(), 8)
    graft(layer, [0, 1], "mlp", 0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = training_step(layer, layer, (x,))
    layer.zero_grad()
    parameters = dict(layer.named_parameters())
    out = layer(x)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    layer.set_alpha([0, 1], 0.9)
    layer.advance(0, SeedLifecycle.CULLED)
    graft(layer, range(2, 8), "mlp", 0.5)  # outgrows the bank, and takes seed 0's slot
    (out * weight).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter is not parameters[name]:  # the gradient goes to the stack that took its place
            assert parameters[name].grad is None
        assert parameter.grad is not None
        rows = len(expected[name])
        torch.testing.assert_close(parameter.grad[:rows], expected[name], msg=name)
        assert not parameter.grad[rows:].any()
