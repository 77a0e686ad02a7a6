"""Transforms of ``torch.func`` over layers, dormant and grown, and vectorised jacobians."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

from kasmina_fx import kasmina_layers, kasminify, unkasminify
from kasmina_fx.testing import graft

X = torch.linspace(-1, 1, 12).view(3, 4)
each = pytest.mark.parametrize("grown", [False, True], ids=["dormant", "grown"])


def net(grown: bool, start: int = 0) -> nn.Module:
    torch.manual_seed(start)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    kasminify(model, num_seeds=2, compile=False)
    for layer in kasmina_layers(model).values():
        if grown:
            graft(layer, [0], "mlp")
    return model


@each
def test_vmap_over_a_batch(grown: bool) -> None:
    model = net(grown)
    out = vmap(model)(X)
    torch.testing.assert_close(out, torch.stack([model(x) for x in X]))
    if not grown:  # to the bit
        assert torch.equal(out, vmap(unkasminify(model))(X))


@each
def test_an_ensemble(grown: bool) -> None:
    models = [net(grown, start) for start in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(base, (p, b), (X,))
        return out

    outs = vmap(call)(parameters, buffers)
    torch.testing.assert_close(outs, torch.stack([model(X) for model in models]))


def test_an_ensemble_in_several_states_is_refused() -> None:
    models = [net(True), net(True)]
    graft(kasmina_layers(models[1])["0"], [1], "mlp")
    parameters, buffers = stack_module_state(models)
    with pytest.raises(ValueError, match="seeds are in different states"):
        vmap(lambda p, b: functional_call(models[0], (p, b), (X,)))(parameters, buffers)


@each
def test_gradients_sample_by_sample(grown: bool) -> None:
    model = net(grown)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, p, (x.unsqueeze(0),))
        return out.square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    for i, x in enumerate(X):
        model.zero_grad()
        model(x.unsqueeze(0)).square().sum().backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name][i], expected, msg=name)


@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own jvp scripts something
def test_jacobians(grown: bool) -> None:
    model = net(grown)
    expected = torch.autograd.functional.jacobian(model, X[0])
    torch.testing.assert_close(jacrev(model)(X[0]), expected)
    torch.testing.assert_close(jacfwd(model)(X[0]), expected)
    tangent = jvp(model, (X[0],), (X[1],))[1]
    torch.testing.assert_close(tangent, expected @ X[1])
    vectorised = torch.autograd.functional.jacobian(model, X[0], vectorize=True)
    torch.testing.assert_close(vectorised, expected)
    x = X[0].clone().requires_grad_()
    (batched,) = torch.autograd.grad(model(x), x, torch.eye(4), is_grads_batched=True)
    torch.testing.assert_close(batched, expected)


def test_a_transform_keeps_no_statistics() -> None:
    model = net(True)
    vmap(model)(X)
    layer = kasmina_layers(model)["0"]
    assert layer.kasmina.telemetry.accumulated[0].tolist() == [0, 0]
    model(X)
    assert layer.kasmina.telemetry.accumulated[0].tolist() == [9, 9]
