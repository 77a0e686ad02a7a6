"""A transaction that fails leaves no trace, whatever it allocated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from graph_cases import OneLayer, TwoLayers, layer_of, wrapped
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import KasminaLayer, kasmina_layers
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.physical.statistics import REJECTED
from kasmina_fx.testing import RecordingBackend, graft


class Stop(Exception):
    """What the failing transactions fail with."""


@contextmanager
def undone(transaction: AbstractContextManager[None]) -> Iterator[None]:
    """A transaction that fails at its end."""
    with suppress(Stop), transaction:
        yield
        raise Stop


def grown(stage: S = S.GRAFTING) -> KasminaLayer:
    layer = KasminaLayer(nn.Linear(8, 12), 4, telemetry=False)
    graft(layer, [0], alpha=1.0, stage=stage)
    for parameter in layer.blueprint_parameters():
        nn.init.normal_(parameter)
    return layer


def observed(layer: KasminaLayer, x: Tensor) -> dict[str, Any]:
    """All that a user can see of it, but for what it allocated."""
    state = layer.state_dict()
    held = {k: v for k, v in state.items() if "banks" not in k and "extra" not in k}
    roles = {"roles": layer.kasmina.roles}
    return held | roles | {"out": layer(x), "stages": layer.state.stages}


@pytest.mark.parametrize(
    ("stage", "then"), [(S.GRAFTING, S.CULLED), (S.TRAINING, S.GRAFTING)], ids=lambda s: s.name
)
def test_a_first_germination_shows_nothing_of_its_transaction(stage: S, then: S) -> None:
    layer, x = grown(stage), torch.randn(5, 8)
    before = observed(layer, x)
    inside: dict[str, Any] = {}
    with undone(layer.transaction()):
        layer.advance(0, then)
        layer.request_germination(1, "lora")
        reader = threading.Thread(target=lambda: inside.update(observed(layer, x)))
        reader.start()
        reader.join()
    torch.testing.assert_close(inside, before, atol=0, rtol=0)
    torch.testing.assert_close(observed(layer, x), before, atol=0, rtol=0)
    layer.load_state_dict(layer.state_dict())
    graft(layer, [1, 2], "lora")
    assert layer.state.holding.tolist() == [True, True, True, False]


def test_a_first_germination_shows_nothing_of_other_layers_either() -> None:
    model = wrapped(TwoLayers(), seeds=3)
    up, down = kasmina_layers(model).values()
    graft(down, [1], alpha=0.5)
    x = torch.randn(5, 8)
    before = model(x)
    with undone(kasmina_fx.transaction(model)):
        down.advance(1, S.CULLED)
        up.request_germination(0, "affine")
    assert torch.equal(model(x), before)
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("savepoint", [False, True])
def test_training_goes_on_after_growth_that_was_undone(savepoint: bool) -> None:
    model, twin = (wrapped(OneLayer(), seeds=4, reserve=2) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    recorder = RecordingBackend()
    losses: list[list[float]] = []
    x = torch.randn(16, 8)
    for net in (model, twin):
        torch.manual_seed(1)
        layer = layer_of(net)
        graft(layer, [0, 1], alpha=1.0)
        run: Any = torch.compile(net, backend=recorder)
        optimizer = torch.optim.SGD(list(layer.blueprint_parameters()), lr=0.5)
        kasmina_fx.optim.sync(optimizer, net)
        losses.append([])
        for step in range(6):
            if net is model and step == 2:
                around = layer.transaction() if savepoint else nullcontext()
                with around, undone(layer.transaction()):
                    layer.request_germination([2, 3])
            loss = run(x).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


def test_a_failed_germination_forgets_no_fault() -> None:
    layer = grown()
    layer.kasmina.telemetry.accumulated[REJECTED, 0] = 3
    with undone(layer.transaction()):
        layer.reset(0)
        layer.request_germination(0, "affine")
    assert layer.kasmina.telemetry.accumulated[REJECTED, 0] == 3
    layer.reset(0)
    layer.request_germination(0, "affine")
    assert layer.kasmina.telemetry.accumulated[REJECTED, 0] == 0


def test_germinating_nobody_allocates_nothing() -> None:
    layer = KasminaLayer(nn.Linear(8, 12), 4)
    assert layer.request_germination([])
    assert not list(layer.blueprint_parameters())


def test_a_later_command_does_not_write_what_a_rollback_wrote() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    graft(layer, [0, 1])
    snapshot = layer.snapshot()
    layer.rollback(snapshot)
    with torch.no_grad():
        for stack in layer.blueprint_parameters():
            stack.add_(1.0)
    trained = [stack.detach().clone() for stack in layer.blueprint_parameters()]
    layer.set_alpha(0, 0.75)
    layer.advance(1, S.STABILIZATION)
    layer.step_epoch()
    now = list(layer.blueprint_parameters())
    assert all(torch.equal(a, b) for a, b in zip(now, trained, strict=True))
