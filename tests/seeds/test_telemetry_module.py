"""Telemetry as a module: what is kept, reset, cast and saved."""

from __future__ import annotations

import torch
from telemetry_cases import overflow_in_backward, spoil, watched
from torch import nn

from kasmina_fx import KasminaLayer
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.physical.statistics import DELTA, EVERY, LOSS, REJECTED, ROWS, RUNS
from kasmina_fx.seeds.telemetry import Telemetry
from kasmina_fx.testing import graft


def test_without_telemetry_nothing_is_kept() -> None:
    layer = watched(telemetry=False)
    graft(layer, 0, "affine", 1.0)
    spoil(layer, 0)
    layer(torch.randn(4, 7))
    accumulated = layer.kasmina.telemetry.accumulated
    assert not accumulated[[row for row in range(ROWS) if row != EVERY]].any()
    layer.set_telemetry(True)
    layer(torch.randn(4, 7))
    assert layer.get_health_report()["count"].tolist() == [12, 8, 8]


def test_reset_forgets_everything_but_how_often_to_look() -> None:
    layer = watched(telemetry=TelemetryPolicy(every=3))
    graft(layer, 0, "affine", 0.5)
    overflow_in_backward(layer, 0).backward()
    seen = layer.kasmina.telemetry
    seen.previous_loss.fill_(2.0)
    kept, faults = seen.accumulated, seen.faults
    assert faults.any()
    seen.reset()
    assert kept[EVERY].tolist() == [3, 3, 3]
    assert not kept[[row for row in range(ROWS) if row != EVERY]].any()
    assert not seen.faults.any()
    assert not seen.previous_loss.any()
    assert seen.accumulated is kept  # a compiled graph holds it
    assert seen.faults is faults
    y = torch.randn(4, 7)
    layer(y)
    torch.testing.assert_close(layer.get_health_report()["mean"][1], y[:, 3:5].mean())


def test_forgetting_blueprints_leaves_the_rest() -> None:
    seen = Telemetry(4)
    for buffer in seen.buffers():
        buffer.fill_(5.0)
    seen.forget_blueprints(torch.tensor([3, 1]))
    about = [REJECTED, RUNS, LOSS, DELTA]
    for row in range(ROWS):
        assert seen.accumulated[row].tolist() == ([5, 0, 5, 0] if row in about else [5] * 4)
    assert seen.faults.tolist() == seen.previous_loss.tolist() == [5, 0, 5, 0]
    seen.forget_blueprints(torch.tensor([], dtype=torch.int64))
    assert seen.faults.tolist() == [5, 0, 5, 0]


def test_germination_forgets_the_blueprint_before_and_not_the_chunk() -> None:
    layer = watched(config=SeedConfig(error_limit=None))
    graft(layer, [0, 1], "affine", 0.5)
    spoil(layer, 0)
    for _ in range(2):
        layer(torch.randn(4, 7, requires_grad=True)).sum().backward()
    layer.reset([0, 1])
    assert layer.get_health_report()["errors"].tolist() == [2, 0, 0]  # still there to read
    assert layer.request_germination(0, "affine")
    report = layer.get_health_report()
    assert report["errors"].tolist() == report["rejected"].tolist() == [0, 0, 0]
    assert report["runs"].tolist() == [0, 2, 0]
    assert report["count"].tolist() == [24, 16, 16]


def test_counts_go_past_what_half_precision_holds() -> None:
    layer = KasminaLayer(nn.Linear(2, 4).bfloat16(), 2)
    for _ in range(3):
        layer(torch.randn(101, 2).bfloat16())
    assert layer.get_health_report()["count"].tolist() == [606, 606]


def test_casting_keeps_float32_and_the_numbers() -> None:
    layer = watched()
    layer(torch.randn(5, 7))
    before = {name: b.clone() for name, b in layer.kasmina.telemetry.named_buffers()}
    layer.to(torch.bfloat16)
    for name, buffer in layer.kasmina.telemetry.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])


def test_the_buffers_are_saved_and_take_no_gradient() -> None:
    telemetry = Telemetry(4)
    assert telemetry.accumulated.shape == (ROWS, 4)
    assert list(telemetry.state_dict()) == ["accumulated", "faults", "previous_loss"]
    layer = watched()
    y = torch.randn(4, 7, requires_grad=True)
    layer(y).sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.ones_like(y))
    for buffer in layer.kasmina.telemetry.buffers():
        assert not buffer.requires_grad


def test_observing_in_inference_mode_does_not_stick_to_it() -> None:
    layer = watched()
    with torch.inference_mode():
        layer(torch.randn(2, 7))
        layer.request_germination(0, "affine")
    layer(torch.randn(2, 7))
    assert layer.get_health_report()["count"].tolist() == [12, 8, 8]


def test_a_recomputed_forward_is_not_another_step() -> None:
    layer = watched()
    y = torch.randn(2, 7, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False).sum().backward()
    assert layer.get_health_report()["count"].tolist() == [6, 4, 4]
