"""What blueprints did, and faults: gradients that were NaN or Inf."""

from __future__ import annotations

import math

import pytest
import torch
from telemetry_cases import overflow_in_backward, spoil, summary, watched
from torch import Tensor

from kasmina_fx import SeedLifecycle
from kasmina_fx.config import SeedConfig
from kasmina_fx.physical.graph_inputs import NO_LOSS
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import DELTA, LOSS, REJECTED, ROWS, RUNS, merge_statistics
from kasmina_fx.testing import graft

S = SeedLifecycle


def _told(rejected: float, loss: float, delta: float) -> Tensor:
    """Notes of a layer of one seed."""
    return torch.tensor([[rejected], [loss], [delta]])


def test_moving_averages_equal_a_plain_python_model() -> None:
    layout, telemetry, y = ChunkLayout.of([2], -1), torch.zeros(ROWS, 1), torch.zeros(1, 2)
    runs = rejected = 0
    loss = delta = 0.0
    for i in range(60):
        ran, new_loss, new_delta = i % 3 != 1, float(torch.rand(()) * 9), float(torch.rand(()))
        if ran:
            loss, delta = (
                (new_loss, new_delta)
                if runs == 0
                else (loss + 0.1 * (new_loss - loss), delta + 0.1 * (new_delta - delta))
            )
            runs += 1
        else:
            rejected += 1
        notes = _told(0, new_loss, new_delta) if ran else _told(1, NO_LOSS, 0)
        telemetry = merge_statistics(y, notes, telemetry, layout)
        assert telemetry[RUNS].tolist() == [runs]
        assert telemetry[REJECTED].tolist() == [rejected]
        assert telemetry[LOSS].tolist() == pytest.approx([loss], rel=1e-5)
        assert telemetry[DELTA].tolist() == pytest.approx([delta], rel=1e-5)
    found = summary(telemetry)
    assert found["reconstruction_loss"].tolist() == pytest.approx([loss], rel=1e-5)
    assert found["delta_norm"].tolist() == pytest.approx([math.sqrt(delta)], rel=1e-5)


def test_a_loss_of_zero_is_a_run() -> None:
    telemetry = torch.zeros(ROWS, 1)
    for loss in (0.0, 1.0):
        telemetry = merge_statistics(
            torch.zeros(1, 2), _told(0, loss, 0), telemetry, ChunkLayout.of([2], -1)
        )
    assert telemetry[RUNS].tolist() == [2]
    assert telemetry[LOSS].tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_leaves_the_averages(value: float) -> None:
    layout, telemetry = ChunkLayout.of([2], -1), torch.zeros(ROWS, 1)
    telemetry = merge_statistics(torch.zeros(1, 2), _told(0, 3.0, 2.0), telemetry, layout)
    after = merge_statistics(torch.zeros(1, 2), _told(0, value, value), telemetry, layout)
    assert [after[row].item() for row in (RUNS, LOSS, DELTA)] == [1, 3, 2]


def test_where_no_blueprint_ran_there_is_no_loss() -> None:
    layer = watched()
    graft(layer, 0, "affine", 1.0)
    layer.request_germination(1, "affine")
    layer(torch.randn(3, 7))
    report = layer.get_health_report()
    assert report["runs"].tolist() == [1, 0, 0]
    assert report["reconstruction_loss"].isnan().tolist() == [False, True, True]
    assert report["delta_norm"].isnan().tolist() == [False, True, True]


def test_loss_and_delta_are_those_of_the_blueprint() -> None:
    layer = watched()
    layer.request_germination(2, "affine")
    layer.advance(2, S.TRAINING)
    graft(layer, [0, 1], "affine", 0.25)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(torch.randn_like(parameter))
    y = torch.randn(6, 7)
    out = layer(y)
    report = layer.get_health_report()
    for seed, chunk in enumerate(y.split([3, 2, 2], -1)):
        held = layer.bank_of(seed)
        assert held is not None
        tensors = held[0].slot_tensors(held[1])
        loss = (chunk * tensors["scale"] + tensors["shift"] - chunk).square().mean()
        torch.testing.assert_close(report["reconstruction_loss"][seed], loss.detach())
    delta = torch.stack([c.square().mean().sqrt() for c in (out - y).split([3, 2, 2], -1)])
    torch.testing.assert_close(report["delta_norm"], delta.detach(), atol=1e-6, rtol=1e-4)
    assert report["delta_norm"][2] == 0  # in TRAINING nothing is added


def test_rejections_are_counted_by_step() -> None:
    layer = watched()
    graft(layer, [0, 2], "affine", 1.0)
    spoil(layer, 0)
    y = torch.randn(4, 7)
    for _ in range(3):
        layer(y)
    assert layer.kasmina.telemetry.accumulated[REJECTED].tolist() == [3, 0, 0]
    # The chunk fell back to finite values, and these are what was observed.
    torch.testing.assert_close(layer.get_health_report()["mean"][0], y[:, :3].mean())
    assert layer.get_health_report()["non_finite"].tolist() == [0, 0, 0]


def test_what_is_observed_is_the_output_and_not_the_base() -> None:
    layer = watched()
    graft(layer, 0, "affine", 0.5)
    with torch.no_grad():
        layer.kasmina.banks["affine_run0"].get_parameter("shift").fill_(8.0)
    y = torch.randn(50, 7)
    out = layer(y)
    report = layer.get_health_report()
    torch.testing.assert_close(report["mean"][0], out[:, :3].mean().detach())
    assert float(report["mean"][0]) > 3


def test_faults_count_the_steps_whose_gradients_are_not_finite() -> None:
    layer = watched()
    graft(layer, [0, 1], "affine", 0.5)
    for _ in range(3):
        overflow_in_backward(layer, 1).backward()
    spoil(layer, 1)
    for _ in range(4):  # does not run: nothing comes back
        layer(torch.randn(4, 7, requires_grad=True)).sum().backward()
    seen = layer.kasmina.telemetry
    assert seen.faults.tolist() == [0, 3, 0]
    report = layer.get_health_report()
    assert report["rejected"].tolist() == [0, 4, 0]
    assert report["faults"].tolist() == [0, 3, 0]
    assert report["errors"].tolist() == [0, 4, 0]  # a step that does both would be one error


def test_faults_go_on_counting_after_seeds_change_and_layers_move() -> None:
    layer = watched(config=SeedConfig(error_limit=None))
    graft(layer, 0, "affine", 0.5)
    overflow_in_backward(layer, 0).backward()
    layer.set_alpha(0, 0.75)
    overflow_in_backward(layer, 0).backward()
    graft(layer, 1, "mlp", 0.5)
    overflow_in_backward(layer, 0).backward()
    layer.double()
    overflow_in_backward(layer, 0).backward()
    layer.load_state_dict(layer.state_dict())
    overflow_in_backward(layer, 0).backward()
    assert layer.kasmina.telemetry.faults.tolist() == [5, 0, 0]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_faults_count_with_a_graph_of_the_gradient_too() -> None:
    layer = watched()
    graft(layer, 0, "affine", 0.5)
    overflow_in_backward(layer, 0).backward(create_graph=True)
    overflow_in_backward(layer, 0).backward()
    assert layer.kasmina.telemetry.faults.tolist() == [2, 0, 0]


def test_an_overflow_of_the_loss_is_no_blueprints_fault() -> None:
    # A GradScaler provokes one every 2,000 steps, and several in a row at the start.
    layer = watched()
    graft(layer, [0, 1], "affine", 0.5)
    for _ in range(5):
        (layer(torch.randn(4, 7, requires_grad=True)).sum() * torch.inf).backward()
    layer.step_epoch()
    assert layer.state.stages.tolist() == [S.GRAFTING, S.GRAFTING, S.DORMANT]
