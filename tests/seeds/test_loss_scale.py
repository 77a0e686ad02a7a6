"""Which GradScaler scales a model's reconstruction losses."""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import pytest
import torch
from graph_cases import layer_of
from optim_cases import growing, loss_of, step
from torch import Tensor, nn
from torch.optim import SGD

import kasmina_fx
from kasmina_fx import InvalidType
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.testing import graft

SCALE = 2.0**10


@pytest.fixture(autouse=True)
def _no_scalers_of_others() -> None:
    gc.collect()


def training(scaler: torch.amp.GradScaler | None = None) -> tuple[nn.Module, SGD]:
    model = growing(reserve=8)
    layer = layer_of(model)
    if scaler is not None:
        kasmina_fx.follow_scaler(model, scaler)
    graft(layer, [2], "mlp", stage=S.TRAINING)
    return model, SGD(model.parameters(), lr=0.1)


def moved(model: nn.Module, optimizer: SGD, scaler: torch.amp.GradScaler | None) -> Tensor:
    """How far a step moves what seed 2 trains."""
    held = layer_of(model).bank_of(2)
    assert held is not None
    before = [t.detach().clone() for t in held[0].slot_tensors(held[1]).values()]
    step(model, optimizer, 0, scaler)
    now = held[0].slot_tensors(held[1]).values()
    return torch.cat([(a - b).detach().flatten() for a, b in zip(now, before, strict=True)])


def expected() -> Tensor:
    model, optimizer = training()
    return moved(model, optimizer, None)


def test_one_that_steps_another_model_scales_nothing() -> None:
    truth = expected()
    stranger, other = torch.amp.GradScaler("cpu", init_scale=SCALE), nn.Linear(2, 2)
    second = SGD(other.parameters(), lr=0.1)
    model, optimizer = training()
    stranger.scale(other(torch.randn(3, 2)).sum()).backward()
    stranger.step(second)
    assert torch.equal(moved(model, optimizer, None), truth)
    assert float(layer_of(model).loss_scale) == 1.0


def test_one_that_does_not_step_this_model_any_more_is_let_go_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    truth = expected()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model, optimizer = training()
    torch.testing.assert_close(moved(model, optimizer, scaler), truth)  # its first step
    assert float(layer_of(model).loss_scale) == SCALE
    with caplog.at_level(logging.WARNING, logger="kasmina_fx.seeds.loss_scale"):
        assert not moved(model, optimizer, None).any()  # not a step 1,024 times too long
    assert "does not step this model's optimizer" in caplog.text
    assert float(layer_of(model).loss_scale) == 1.0
    caplog.clear()
    assert moved(model, optimizer, None).any()
    assert not caplog.records
    moved(model, optimizer, scaler)
    assert float(layer_of(model).loss_scale) == SCALE


def test_one_whose_unscale_was_called_by_hand_is_kept() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model, optimizer = training()
    moved(model, optimizer, scaler)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    optimizer.step()
    assert float(layer_of(model).loss_scale) == SCALE


def test_no_step_looks_through_all_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "get_referrers", lambda *of: pytest.fail("it does"))
    model, optimizer = training()
    moved(model, optimizer, None)
    moved(model, optimizer, torch.amp.GradScaler("cpu"))
    graft(layer_of(model), [3, 4, 5], "mlp", stage=S.TRAINING)
    moved(model, optimizer, None)


def test_none_can_be_named() -> None:
    truth = expected()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model = growing(reserve=8)
    kasmina_fx.follow_scaler(model, None)
    graft(layer_of(model), [2], "mlp", stage=S.TRAINING)
    assert float(layer_of(model).loss_scale) == 1.0
    assert torch.equal(moved(model, SGD(model.parameters(), lr=0.1), None), truth)
    assert scaler.is_enabled()
    given: Any = 3.0
    with pytest.raises(InvalidType, match="give a GradScaler"):
        kasmina_fx.follow_scaler(model, given)


def test_one_that_is_gone_scales_nothing() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model, optimizer = training(None)
    moved(model, optimizer, scaler)
    assert float(layer_of(model).kasmina.shown.layer[3]) == SCALE
    del scaler
    gc.collect()
    moved(model, optimizer, None)
    assert float(layer_of(model).kasmina.shown.layer[3]) == 1.0


def test_update_may_come_between_forward_and_backward() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1)
    model, optimizer = training(scaler)
    loss = loss_of(model, 0)
    other = nn.Linear(2, 2)
    second = SGD(other.parameters(), lr=0.1)
    scaler.scale(other(torch.randn(3, 2)).sum()).backward()
    scaler.step(second)
    scaler.update()
    scaler.scale(loss).backward()
    scaler.step(optimizer)


def test_one_that_is_made_later_is_found_in_its_first_step() -> None:
    model, optimizer = training()
    assert float(layer_of(model).loss_scale) == 1.0
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    moved(model, optimizer, scaler)
    assert float(layer_of(model).loss_scale) == SCALE


def test_going_back_in_time_keeps_an_optimizers_state() -> None:
    model = growing(reserve=8)
    layer = layer_of(model)
    layer.reset([0, 1])
    graft(layer, [2], "mlp", stage=S.TRAINING)
    saved = copy.deepcopy(model.state_dict())
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    moved(model, optimizer, None)
    state = copy.deepcopy(optimizer.state_dict())
    for stage in (S.GRAFTING, S.STABILIZATION):
        layer.advance(2, stage)
    optimizer.load_state_dict(state)
    model.load_state_dict(saved)
    held = layer.bank_of(2)
    assert held is not None
    stack = held[0].tensors()[0]
    assert bool(optimizer.state[stack]["momentum_buffer"][held[1]].any())
