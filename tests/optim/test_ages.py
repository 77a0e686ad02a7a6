"""A seed moves as far as its age says, whenever it germinated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from kasmina_fx import KasminaLayer
from kasmina_fx.optim import sync
from kasmina_fx.testing import graft

RATE = 0.01
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "Adam": lambda p: optim.Adam(p, lr=RATE),
    "Adam, one by one": lambda p: optim.Adam(p, lr=RATE, foreach=False),
    "Adam, fused": lambda p: optim.Adam(p, lr=RATE, fused=True),
    "Adam, L2": lambda p: optim.Adam(p, lr=RATE, weight_decay=0.1),
    "Adam, amsgrad": lambda p: optim.Adam(p, lr=RATE, amsgrad=True),
    "Adam, maximize": lambda p: optim.Adam(p, lr=RATE, maximize=True),
    "AdamW": lambda p: optim.AdamW(p, lr=RATE, weight_decay=0.1),
    "NAdam": lambda p: optim.NAdam(p, lr=RATE),
    "NAdam, L2": lambda p: optim.NAdam(p, lr=RATE, weight_decay=0.1),
    "NAdam, decoupled": lambda p: optim.NAdam(
        p, lr=RATE, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "NAdam, maximize": lambda p: optim.NAdam(p, lr=RATE, weight_decay=0.1, maximize=True),
    "Adagrad, maximize": lambda p: optim.Adagrad(p, lr=RATE, lr_decay=0.1, maximize=True),
    "RAdam": lambda p: optim.RAdam(p, lr=RATE),
    "Adamax": lambda p: optim.Adamax(p, lr=RATE),
    "Adagrad": lambda p: optim.Adagrad(p, lr=RATE, lr_decay=0.1),
    "Adagrad, L2": lambda p: optim.Adagrad(p, lr=RATE, lr_decay=0.1, weight_decay=0.1),
    "SGD": lambda p: optim.SGD(p, lr=RATE, momentum=0.9),
    "RMSprop": lambda p: optim.RMSprop(p, lr=RATE, momentum=0.9),
    "Adadelta": lambda p: optim.Adadelta(p, lr=RATE),
    "Rprop": lambda p: optim.Rprop(p, lr=RATE),
}


def lived(
    build: Callable[[Any], optim.Optimizer],
    births: dict[int, int],
    steps: int,
    after: Callable[[int, KasminaLayer], None] = lambda step, layer: None,
) -> Any:
    """A layer whose seeds germinate at given steps, all with gradients of their own age.

    ``after`` is called behind each step, with how many there were.
    """
    torch.manual_seed(0)
    layer = KasminaLayer(nn.Linear(4, 6), 3, reserve=4, layer_id="fc")
    optimizer = build(list(layer.blueprint_parameters()))
    for step in range(steps):
        for seed, birth in births.items():
            if birth == step:
                graft(layer, [seed])
                for tensor in slot(layer, seed):
                    tensor.data.copy_(torch.linspace(-1, 1, tensor.numel()).view_as(tensor))
        optimizer.zero_grad(set_to_none=False)
        for stack in layer.blueprint_parameters():
            stack.grad = torch.zeros_like(stack)
        for seed, birth in births.items():
            if birth <= step:
                held = layer.bank_of(seed)
                assert held is not None
                for stack in held[0].tensors():
                    assert stack.grad is not None
                    torch.manual_seed(step - birth)
                    stack.grad[held[1]] = torch.randn(stack.shape[1:])
        optimizer.step()
        after(step + 1, layer)
    return layer, optimizer


def slot(layer: KasminaLayer, seed: int) -> list[Tensor]:
    held = layer.bank_of(seed)
    assert held is not None
    return list(held[0].slot_tensors(held[1]).values())


@pytest.mark.untraced
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_seed_born_late_moves_as_one_born_at_the_start(name: str) -> None:
    expected: dict[int, list[Tensor]] = {}
    compared = []

    def keep(step: int, layer: KasminaLayer) -> None:
        expected[step] = [tensor.detach().clone() for tensor in slot(layer, 0)]

    def compare(step: int, layer: KasminaLayer) -> None:
        if step - 37 in (1, 2, 5, 40):
            for seed, age in ((1, step - 30), (2, step - 37)):
                for got, right in zip(slot(layer, seed), expected[age], strict=True):
                    torch.testing.assert_close(got, right, atol=2e-6, rtol=1e-5)
                compared.append(age)

    lived(OPTIMIZERS[name], {0: 0}, 47, keep)
    lived(OPTIMIZERS[name], {0: 0, 1: 30, 2: 37}, 77, compare)
    assert compared == [8, 1, 9, 2, 12, 5, 47, 40]


def test_ages_survive_saving_growth_and_end() -> None:
    layer, optimizer = lived(OPTIMIZERS["Adam"], {0: 0, 1: 30}, 33)
    twin = copy.deepcopy(layer)
    other = optim.Adam(list(twin.blueprint_parameters()), lr=RATE)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    sync(other, twin)  # the two have not met
    graft(layer, [2])
    graft(twin, [2])
    for each, stepped in ((layer, optimizer), (twin, other)):
        each.reserve(8)
        for stack in each.blueprint_parameters():
            stack.grad = torch.ones_like(stack)
        stepped.step()
    for seed in range(3):
        for got, right in zip(slot(twin, seed), slot(layer, seed), strict=True):
            torch.testing.assert_close(got, right)
    stack = next(layer.blueprint_parameters())
    assert optimizer.state[stack]["kasmina_births"]["slots"].keys() >= {1, 2}
    optimizer.param_groups[0]["betas"] = (0.1, 0.1)  # grown up after 8 steps
    for _ in range(8):
        optimizer.step()
    assert "kasmina_births" not in optimizer.state[stack]


def test_a_step_that_a_fused_optimizer_leaves_out_moves_nothing() -> None:
    layer, optimizer = lived(OPTIMIZERS["Adam, fused"], {0: 0, 1: 5}, 6)
    before = [t.clone() for t in slot(layer, 1)]
    for stack in layer.blueprint_parameters():
        stack.grad = torch.ones_like(stack)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    for now, then in zip(slot(layer, 1), before, strict=True):
        assert torch.equal(now, then)
