"""Germination: who may, and what ids and names mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import snapshot
from torch import nn

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
)
from kasmina_fx.testing import graft


@pytest.mark.parametrize("seeds", [1, [1], [0, 1, 2], torch.tensor([1, 3])])
def test_germination_of_a_seed_that_is_not_dormant_is_false_and_changes_nothing(
    seeds: Any,
) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    assert layer.request_germination(1)
    shared = layer.register_blueprint("mlp")
    before = snapshot(layer)
    assert layer.request_germination(seeds, "lora") is False
    assert layer.request_germination(seeds, shared) is False
    assert snapshot(layer) == before


def test_germination_of_several_kinds_of_ids() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 6)
    for ids in (0, [1], (2,), torch.tensor(3), torch.tensor([4, 5])):
        assert layer.request_germination(ids, "affine", grafting_strategy=2) is True
    state = layer.state.state_tensor
    assert state[:, 0].tolist() == [SeedLifecycle.GERMINATED] * 6
    assert state[:, 1].unique().numel() == 6  # a name gives each a copy, with an id of its own
    assert state[:, 2:].tolist() == [[0, 2]] * 6
    assert layer.request_germination([]) is True


def test_an_int_id_shares_and_a_name_does_not() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 6)
    number = layer.register_blueprint("mlp")
    assert number == 1
    graft(layer, [0, 1], number)
    graft(layer, [2, 3], "mlp")
    assert layer.state.blueprint_ids[:2].tolist() == [number, number]
    assert len({number, *layer.state.blueprint_ids[2:4].tolist()}) == 3
    used = {name: bank["used"] for name, bank in layer.get_layer_stats()["banks"].items()}
    assert used == {"mlp_run0": 2, "mlp_shared_run0": 1}


def test_the_default_blueprint_is_the_mlp_that_starts_as_the_identity() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination(2)
    held = layer.bank_of(2)
    assert held is not None
    assert held[0].spec.kind == "residual_mlp"
    shapes = {name: tuple(t.shape) for name, t in held[0].slot_tensors(0).items()}
    assert shapes == {
        "up.weight": (6, 3),
        "up.bias": (6,),
        "down.weight": (3, 6),
        "down.bias": (3,),
    }
