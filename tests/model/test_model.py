"""Calls for all layers of a model: transactions, reports; snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from graph_cases import TwoLayers, layer_of, wrapped
from torch import nn

import kasmina_fx
from kasmina_fx import IllegalTransition, InvalidArgument, KasminaLayer, NoTargets
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.testing import graft


def _model() -> nn.Module:
    return wrapped(TwoLayers(), seeds=4, telemetry=True)


def test_a_transaction_over_a_model_shows_all_or_nothing() -> None:
    model = _model()
    up, down = layer_of(model, "up"), layer_of(model, "down")

    def fail() -> None:
        with kasmina_fx.transaction(model):
            graft(up, [0], "mlp")
            graft(down, [1], "mlp")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not bool(up.state.stages.any() | down.state.stages.any())
    with kasmina_fx.transaction(model):
        graft(up, [0], "mlp")
        graft(down, [1], "mlp")
        assert not bool(up.state.state_tensor.any())
    assert int(up.state.state_tensor[0, 0]) == int(down.state.state_tensor[1, 0]) == S.GRAFTING


def test_a_report_of_a_model(tmp_path: Path) -> None:
    model = _model()
    model(torch.randn(5, 8))
    report = kasmina_fx.health_report(model)
    assert list(report) == ["up", "down"]
    assert len(report) == 2
    text = report.to_json(tmp_path / "report.json")
    assert json.loads(text)["up"]["num_seeds"] == 4
    assert (tmp_path / "report.json").read_text() == text + "\n"
    kasmina_fx.step_epoch(model)
    with pytest.raises(NoTargets):
        kasmina_fx.health_report(nn.Linear(2, 2))


@pytest.mark.parametrize("library", ["pandas", "pyarrow"])
def test_a_report_as_a_table(library: str) -> None:
    pytest.importorskip(library)
    model = _model()
    model(torch.randn(5, 8))
    graft(layer_of(model, "down"), [3], "mlp")
    report = kasmina_fx.health_report(model)
    table = report.to_pandas() if library == "pandas" else report.to_arrow()
    columns = {name: list(table[name]) for name in ("layer", "seed", "stage", "mean")}
    if library == "pyarrow":
        columns = {name: [value.as_py() for value in cells] for name, cells in columns.items()}
    assert columns["layer"] == ["up"] * 4 + ["down"] * 4
    assert columns["seed"] == [0, 1, 2, 3] * 2
    assert columns["stage"] == ["DORMANT"] * 7 + ["GRAFTING"]
    means = [*report["up"]["mean"].tolist(), *report["down"]["mean"].tolist()]
    assert columns["mean"] == pytest.approx(means)


def test_host_parameters_are_the_plain_models() -> None:
    model = _model()
    plain = list(model.parameters())
    graft(layer_of(model, "down"), [3], "mlp")
    found = list(kasmina_fx.host_parameters(model))
    assert all(a is b for a, b in zip(found, plain, strict=True))
    assert len(list(model.parameters())) > len(plain)
    graft(layer_of(model, "up"), [1], "mlp", stage=S.TRAINING)
    norms = []
    for scale in (1.0, 100.0):
        with torch.no_grad():
            for parameter in layer_of(model, "up").blueprint_parameters():
                parameter.mul_(scale)
        model.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        found = list(kasmina_fx.host_parameters(model))
        norms.append(nn.utils.clip_grad_norm_(found, 1.0))
    assert torch.equal(*norms)
    with pytest.raises(NoTargets):
        kasmina_fx.host_parameters(nn.Linear(2, 2))


def test_what_passes_unobserved_leaves_no_trace_in_the_statistics() -> None:
    model = _model()
    up, down = layer_of(model, "up"), layer_of(model, "down")
    down.telemetry_enabled = False
    model(torch.randn(5, 8))
    before = up.kasmina.telemetry.accumulated.clone()
    with kasmina_fx.unobserved(model):
        assert not up.telemetry_enabled
        with kasmina_fx.unobserved(up):
            model(torch.randn(5, 8))
        assert not up.telemetry_enabled
    assert torch.equal(up.kasmina.telemetry.accumulated, before)
    assert up.telemetry_enabled
    assert not down.telemetry_enabled
    model(torch.randn(5, 8))
    assert not torch.equal(up.kasmina.telemetry.accumulated, before)


def test_layers_are_observed_again_after_an_exception() -> None:
    model = _model()

    def fail() -> None:
        with kasmina_fx.unobserved(model):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(layer.telemetry_enabled for layer in kasmina_fx.kasmina_layers(model).values())
    with pytest.raises(NoTargets), kasmina_fx.unobserved(nn.Linear(2, 2)):
        pass


def test_only_the_first_unobserved_call_compiles_and_each_compile_is_counted() -> None:
    model = _model()
    compiled = torch.compile(model, backend="eager")
    start, counted = kasmina_fx.compiles(), []
    for _ in range(2):
        compiled(torch.ones(5, 8))
        counted.append(kasmina_fx.compiles() - start)
        with kasmina_fx.unobserved(model):
            compiled(torch.ones(5, 8))
        counted.append(kasmina_fx.compiles() - start)
    assert counted == [1, 2, 2, 2]
    torch.compiler.reset()
    assert kasmina_fx.compiles() == start + 2


def test_a_scaler_that_is_named_is_followed() -> None:
    model = _model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    kasmina_fx.follow_scaler(model, scaler)
    for name in ("up", "down"):
        assert float(layer_of(model, name).loss_scale) == 8.0
    with pytest.raises(NoTargets):
        kasmina_fx.follow_scaler(nn.Linear(2, 2), scaler)


def test_a_rollback_returns_bits_and_marks() -> None:
    layer = layer_of(_model(), "up")
    graft(layer, [0, 1], "mlp", alpha=0.25)
    held = layer.bank_of(0)
    assert held is not None
    before = {name: t.detach().clone() for name, t in held[0].slot_tensors(held[1]).items()}
    snapshot = layer.snapshot()
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(1.0)
    layer.set_alpha([0, 1], 0.75)
    layer.step_epoch()
    layer.seeds[0].rollback(snapshot)
    assert layer.seeds[0].stage is S.ROLLED_BACK
    layer.rollback(snapshot, [1], mark=False)
    assert layer.seeds[1].stage is S.GRAFTING
    assert layer.seeds[0].alpha == layer.seeds[1].alpha == 0.25
    for name, value in held[0].slot_tensors(held[1]).items():
        assert torch.equal(value, before[name])


def test_a_rollback_brings_back_what_was_culled() -> None:
    layer = layer_of(_model(), "up")
    graft(layer, [0], "mlp")
    snapshot = layer.seeds[0].snapshot()
    layer.advance(0, S.CULLED)
    graft(layer, [1], "mlp")  # takes the slot
    layer.rollback(snapshot, mark=False)
    assert layer.state.rows[0].tolist() == snapshot.rows[0].tolist()
    assert layer.bank_of(0) != layer.bank_of(1)
    with pytest.raises(IllegalTransition):
        layer.rollback(layer.snapshot([2]), [2])
    with pytest.raises(InvalidArgument, match="does not hold seed 3"):
        layer.rollback(snapshot, [3])
    with pytest.raises(InvalidArgument, match="the snapshot is of chunks"):
        layer_of(_model(), "down").rollback(snapshot)


def test_a_snapshot_from_before_an_older_state_was_loaded_takes_nobodys_blueprint() -> None:
    layer = layer_of(_model(), "up")
    old = layer.state_dict()
    graft(layer, [0], "mlp")
    snapshot = layer.snapshot()
    layer.load_state_dict(old, strict=False)
    graft(layer, [1], "mlp")  # gets the id that seed 0 had
    before = layer.state.rows.clone()
    with pytest.raises(InvalidArgument, match=r"now is that of seed 1: an older state was loaded"):
        layer.rollback(snapshot, [0], mark=False)
    assert torch.equal(layer.state.rows, before)
    layer.reset([1])
    layer.rollback(snapshot)
    assert layer.seeds[0].stage is S.GRAFTING


def test_a_rollback_that_is_undone_leaves_parameters_alone() -> None:
    layer = layer_of(_model(), "up")
    graft(layer, [0], "mlp")
    snapshot = layer.snapshot()
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(1.0)
    now = [parameter.detach().clone() for parameter in layer.blueprint_parameters()]

    def undone() -> None:
        with layer.transaction():
            layer.rollback(snapshot)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        undone()
    for parameter, value in zip(layer.blueprint_parameters(), now, strict=True):
        assert torch.equal(parameter, value)
    layer.rollback(snapshot)
    assert not torch.equal(next(layer.blueprint_parameters()), now[0])


def test_a_rollback_before_a_cull_in_one_transaction_writes_to_no_slot() -> None:
    layer = layer_of(_model(), "up")
    graft(layer, [0], "mlp")
    snapshot = layer.snapshot()
    with layer.transaction():
        layer.rollback(snapshot)
        layer.advance(0, S.CULLED)
    assert layer.bank_of(0) is None


def test_a_rollback_forgets_what_went_wrong_since() -> None:
    layer = layer_of(_model(), "up")
    graft(layer, [0], "mlp", alpha=0.5)
    snapshot = layer.snapshot([0])
    for parameter in layer.blueprint_parameters():
        nn.init.constant_(parameter, torch.nan)
    for _ in range(5):
        layer(torch.randn(4, 8))
    layer.step_epoch()
    assert layer.state.stages[0] == S.CULLED
    layer.rollback(snapshot, [0], mark=False)
    layer.step_epoch()
    assert layer.state.stages[0] == S.GRAFTING


def test_a_rollback_takes_a_snapshot_of_its_own_layer_alone() -> None:
    up = layer_of(wrapped(TwoLayers(), seeds=4), "up")
    graft(up, [0], "lora")
    other = KasminaLayer(nn.Linear(8, 12), 4, layer_id="other")
    with pytest.raises(InvalidArgument, match="other: the snapshot is of up"):
        other.rollback(up.snapshot())
    stranger = layer_of(wrapped(TwoLayers(), seeds=4), "up")
    with pytest.raises(InvalidArgument, match=r"no banks \['lora_run0'\] any more"):
        stranger.rollback(up.snapshot())
    assert stranger.kasmina.highest_id == other.kasmina.highest_id == 0
