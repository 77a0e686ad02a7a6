"""Slots: used again, grown, reserved, trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import assert_bitwise, scale, training_step
from torch import nn

from kasmina_fx import (
    InvalidArgument,
    KasminaLayer,
    SeedLifecycle,
    UnknownBlueprint,
)
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.blueprints import register
from kasmina_fx.testing import graft


def test_cancel() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination([0, 1, 2])
    layer.advance(1, SeedLifecycle.TRAINING)
    assert layer.cancel_germination([0, 3]) is False  # 3 is dormant
    assert layer.seeds[0].stage is SeedLifecycle.GERMINATED
    assert layer.cancel_germination([0, 1]) is True
    assert layer.cancel_germination(0) is False
    assert layer.state.get_state_distribution() == {"DORMANT": 1, "GERMINATED": 1, "CANCELLED": 2}
    assert layer.get_layer_stats()["banks"]["residual_mlp_run0"]["used"] == 1
    layer.advance([0, 1], SeedLifecycle.DORMANT)
    assert layer.state.blueprint_ids.tolist()[:2] == [0, 0]
    assert layer.request_germination([0, 1]) is True


def test_a_slot_is_used_again_with_fresh_values() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination([0, 1], "affine")
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.fill_(9.0)
    stacks = list(layer.blueprint_parameters())
    layer.cancel_germination(0)
    layer.request_germination(2, "affine")
    assert all(a is b for a, b in zip(stacks, layer.blueprint_parameters(), strict=True))
    two, one = layer.bank_of(2), layer.bank_of(1)
    assert two is not None
    assert one is not None
    assert two[0].slot_tensors(two[1])["scale"].tolist() == [1.0] * 3
    assert one[0].slot_tensors(one[1])["scale"].tolist() == [9.0] * 3
    assert two[0].capacity == 2


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_growing_keeps_the_values_of_old_slots(shared: bool) -> None:
    layer = KasminaLayer(nn.Linear(4, 24).double(), 8)
    first: int | str = layer.register_blueprint("mlp") if shared else "mlp"
    graft(layer, 0, first)
    held = layer.bank_of(0)
    assert held is not None
    before = {name: t.clone() for name, t in held[0].slot_tensors(held[1]).items()}
    x = torch.randn(3, 4, dtype=torch.float64)
    chunk = layer(x)[:, :3]
    for seed in range(1, 8):
        graft(layer, seed, layer.register_blueprint("mlp") if shared else "mlp")
    after = layer.bank_of(0)
    assert after is not None
    assert after[0].capacity == 8
    for name, tensor in after[0].slot_tensors(after[1]).items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, before[name])
    assert torch.equal(layer(x)[:, :3], chunk)


def test_reserve_keeps_the_same_parameters_until_it_is_used_up() -> None:
    layer = KasminaLayer(nn.Linear(4, 24), 8, reserve=4)
    stacks = list(layer.blueprint_parameters())
    assert [tuple(p.shape) for p in stacks] == [(4, 6, 3), (4, 6), (4, 3, 6), (4, 3)]
    assert all(isinstance(p, StackedParameter) for p in stacks)
    for seed in range(4):
        graft(layer, seed)
        assert all(a is b for a, b in zip(stacks, layer.blueprint_parameters(), strict=True))
    graft(layer, 4)
    assert not any(a is b for a, b in zip(stacks, layer.blueprint_parameters(), strict=True))
    assert all(len(p) == 8 for p in layer.blueprint_parameters())


def test_blueprint_parameters_are_the_trainable_stacks() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    assert list(layer.blueprint_parameters()) == []
    layer.request_germination(0, register(scale, name="scale"))
    assert len(list(layer.blueprint_parameters())) == 4
    assert len(list(layer.blueprint_parameters(trainable_only=False))) == 5  # and a buffer
    base = {id(p) for p in layer.base.parameters()}
    assert base.isdisjoint(id(p) for p in layer.blueprint_parameters(trainable_only=False))


def test_an_optimizer_trains_blended_blueprints() -> None:
    layer = KasminaLayer(nn.Linear(4, 12).requires_grad_(False), 4, reserve=2)
    optimizer = torch.optim.Adam(layer.blueprint_parameters(), lr=0.05)
    graft(layer, [0, 3], alpha=1.0)
    x = torch.randn(32, 4)
    target = torch.zeros(32, 6)
    losses = []
    for _ in range(60):
        out = layer(x)
        loss = (torch.cat([out[:, :3], out[:, 9:]], 1) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


def test_a_training_seed_does_not_touch_the_host() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination([0, 1], "mlp")
    layer.advance([0, 1], SeedLifecycle.TRAINING)
    layer.set_alpha([0, 1], 1.0)
    x = torch.randn(3, 4)
    got = training_step(layer, layer, (x,))
    expected = training_step(layer, layer.base, (x,))
    assert_bitwise(got["out 0"], expected["out 0"])
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert all(got[n].any() for n in got if n.startswith("kasmina."))  # they learn by themselves


def test_room_can_be_made_at_any_time() -> None:
    layer = KasminaLayer(nn.Linear(4, 25), 8)  # two sizes of chunks
    graft(layer, [0, 1], "affine", alpha=0.5)
    x = torch.randn(3, 4)
    before = layer(x)
    layer.reserve(7, "affine")
    layer.reserve(3, "affine")  # less than there is
    layer.reserve(7)
    assert torch.equal(layer(x), before)
    held = list(layer.blueprint_parameters())
    assert {len(stack) for stack in held} == {7}
    graft(layer, range(2, 8), "affine")
    assert all(a is b for a, b in zip(layer.blueprint_parameters(), held, strict=True))


@pytest.mark.parametrize("slots", [0, -1, True, 2.0])
def test_room_for_no_number_of_slots_is_refused(slots: Any) -> None:
    layer = KasminaLayer(nn.Linear(4, 24), 8)
    with pytest.raises(InvalidArgument, match="slots="):
        layer.reserve(slots)
    with pytest.raises(UnknownBlueprint):
        layer.reserve(2, "no such")
    assert not list(layer.blueprint_parameters())


def test_a_shared_blueprint_takes_one_slot_however_often_it_germinates() -> None:
    layer = KasminaLayer(nn.Linear(4, 24), 8)
    shared = layer.register_blueprint("affine")
    for seeds in ([0, 1], [2], [3, 4]):
        layer.request_germination(seeds, shared)
    (bank,) = layer.kasmina.bank_list()
    assert bank.held.tolist() == [shared]
    assert {layer.bank_of(seed) for seed in range(5)} == {(bank, 0)}


def test_a_users_tensors_may_be_named_like_anything_that_a_bank_has() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.reserve(2, "affine")
    (bank,) = layer.kasmina.bank_list()
    own = {*vars(bank), *vars(type(bank))} - {*vars(nn.Module()), *dir(nn.Module)}

    class Named(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            for name in sorted(own):
                self.register_parameter(name, nn.Parameter(torch.ones(size)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = torch.stack([*self.parameters()]).mean(0)
            return x * total

    assert len(own) > 20
    layer.register_blueprint(Named, name="named")
    graft(layer, [0, 1], "named", 1.0)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), layer.base(x))
    twin = KasminaLayer(nn.Linear(4, 12), 4)
    twin.register_blueprint(Named, name="named")
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(x), layer(x))
