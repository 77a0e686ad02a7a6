"""A blueprint is blamed for what it does, and for nothing that comes in or that a scale does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import KasminaLayer, kasmina_layers, kasminify, reference
from kasmina_fx.model import follow_scaler
from kasmina_fx.testing import graft


def errors(layer: KasminaLayer) -> list[int]:
    found: Tensor = layer.get_health_report()["errors"]
    return found.tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_chunk_that_comes_in_bad_is_not_its_blueprints_fault(bad: float) -> None:
    layer = KasminaLayer(nn.Identity(), 2, chunk_sizes=[2, 2], feature_dim=-1)
    graft(layer, [0, 1], "affine", 0.5)
    x = torch.ones(3, 4)
    x[1, 0] = bad
    x.requires_grad_()
    out = layer(x)
    assert torch.equal(out[:, :2], x[:, :2]) or bad != bad
    out.sum().backward()
    assert errors(layer) == [0, 0]


@pytest.mark.parametrize(("scaled", "expected"), [(True, [0, 0]), (False, [1, 1])])
def test_an_overflow_of_a_scaled_loss_is_nobodys_fault(scaled: bool, expected: list[int]) -> None:
    model = kasminify(nn.Sequential(nn.Linear(4, 4)), num_seeds=2, compile=False)
    layer = kasmina_layers(model)["0"]
    graft(layer, [0, 1], "affine", 0.5)
    for seed in range(2):
        held = layer.bank_of(seed)
        assert held is not None
        held[0].slot_tensors(held[1])["scale"].data.fill_(100.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    follow_scaler(model, scaler if scaled else None)
    # Finite where it comes in; times 100, no float32 holds it.
    model(torch.ones(3, 4)).backward(torch.full((3, 4), 1e38))
    assert errors(layer) == expected


def test_a_blueprint_that_is_bad_is_blamed_once_a_step() -> None:
    layer = KasminaLayer(nn.Linear(4, 4), 2)
    graft(layer, [0, 1], "affine", 0.5)
    held = layer.bank_of(1)
    assert held is not None
    held[0].slot_tensors(held[1])["shift"].data.fill_(torch.nan)
    layer(torch.ones(3, 4))
    assert errors(layer) == [0, 1]


def test_a_difference_that_half_a_float_does_not_hold_is_no_fault() -> None:
    """40,000 and -40,000 fit float16; their difference does not, and every blend of them does."""
    layer = KasminaLayer(nn.Identity(), 1, chunk_sizes=[2], feature_dim=-1).half()
    graft(layer, [0], "affine", 0.5)
    held = layer.bank_of(0)
    assert held is not None
    for stack in held[0].tensors():
        stack.data = stack.data.half()
    layer.publish()
    held[0].slot_tensors(held[1])["scale"].data.fill_(-1.0)
    x = torch.full((3, 2), 40_000.0, dtype=torch.float16)
    out = layer(x)
    assert torch.equal(out, torch.zeros_like(x))
    assert torch.equal(out, reference.forward(layer, x))
    assert errors(layer) == [0]
