"""What kasminify leaves as it was: ties, hooks, flags, parametrizations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from host_cases import by_reference, network, wrapped_twin
from torch import Tensor, nn

from kasmina_fx import (
    host_state_dict,
    kasmina_layers,
    unkasminify,
)
from kasmina_fx.testing import graft


class Tied(nn.Module):
    """A shared module, a tied weight, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.stack = nn.ModuleList([self.shared, nn.Linear(8, 8)])
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(self.embed(x))
        for block in self.stack:
            h = h + block(self.again(h))
        out: Tensor = self.head(h)
        return out


@pytest.mark.parametrize("targets", [(nn.Linear,), (nn.Linear, nn.Embedding)])
def test_tied_weights_and_shared_modules_stay_so(targets: tuple[type[nn.Module], ...]) -> None:
    model: Any = Tied()
    x = torch.randint(0, 9, (3, 4))
    keys, expected = list(model.state_dict()), model(x)
    count = len(list(model.parameters()))
    wrapped_twin(model, targets=targets)
    assert list(kasmina_layers(model))[-3:] == ["shared", "stack.1", "head"]
    assert model.shared is model.again is model.stack[0]
    assert model.head.weight is model.embed.weight
    assert list(host_state_dict(model)) == keys
    assert len(list(model.parameters())) == count
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model.head.weight.grad is not None
    with torch.no_grad():
        model.head.weight.add_(1)
    twin = copy.deepcopy(model)
    assert twin.shared is twin.again is twin.stack[0]
    assert twin.head.weight is twin.embed.weight
    assert torch.equal(twin(x), model(x))
    unkasminify(model)
    assert type(model.shared) is nn.Linear
    assert model.shared is model.again is model.stack[0]
    assert model.head.weight is model.embed.weight


def test_weights_tied_after_wrapping_are_tied() -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)})
    wrapped_twin(model)
    model["head"].weight = model["embed"].weight
    assert model["head"].base.weight is model["embed"].weight
    assert len(list(model.parameters())) == 1


def test_hooks_fire() -> None:
    calls: list[str] = []
    model = network()
    first = model[0]
    first.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    first.register_forward_hook(lambda module, args, out: calls.append("forward"))
    first.register_full_backward_hook(lambda module, grad, out: calls.append("backward"))
    first.weight.register_hook(lambda grad: calls.append("grad"))
    model.register_forward_hook(lambda module, args, out: calls.append("root"))
    wrapped_twin(model)
    model(torch.randn(3, 5, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["backward", "forward", "grad", "pre", "root"]


def test_dtype_requires_grad_and_training_flags_are_kept() -> None:
    model = network().bfloat16()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    wrapped_twin(model)
    first, last = kasmina_layers(model).values()
    assert (first.training, last.training) == (True, False)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16
    graft(first, 0)
    assert {p.dtype for p in first.blueprint_parameters()} == {torch.bfloat16}
    assert not model.eval()[0].base.training


def test_parametrized_targets_are_wrapped_as_they_are() -> None:
    model = network().double()
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(3, 5, dtype=torch.float64)
    expected, saved = model(x), copy.deepcopy(model.state_dict())
    wrapped_twin(model)
    assert torch.equal(model(x), expected)
    assert list(host_state_dict(model)) == list(saved)
    torch.testing.assert_close(model[0].weight, model[0].base.weight)
    graft(kasmina_layers(model)["0"], 0)
    model.load_state_dict(saved)
    torch.testing.assert_close(model(x), by_reference(model, x))


def test_reserve_and_telemetry_reach_every_layer() -> None:
    model = wrapped_twin(network(), reserve=3, telemetry=False)
    x = torch.randn(2, 5)
    model(x)
    for layer in kasmina_layers(model).values():
        assert {bank.capacity for bank in layer.kasmina.bank_list()} == {3}
        assert not layer.kasmina.telemetry.accumulated.any()


def test_the_first_germination_allocates_in_every_layer_of_the_model_and_no_other() -> None:
    model, other = wrapped_twin(network()), wrapped_twin(network())
    first, last = kasmina_layers(model).values()
    last.request_germination(0, "affine")
    assert {bank.spec.kind for bank in first.kasmina.bank_list()} == {"affine"}
    assert {bank.capacity for bank in first.kasmina.bank_list()} == {2}
    assert not any(layer.kasmina.bank_list() for layer in kasmina_layers(other).values())
