"""The chunked layer with eleven stages: lives, checkpoints of seeds, and its Triton kin."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kasmina_fx
from kasmina_fx import KasminaError, reference
from kasmina_fx.compat.chunked import (
    MIN_EPOCHS,
    ChunkedKasminaLayerV2,
    ExtendedLifecycle,
    GraftingConfig,
    TritonChunkedKasminaLayer,
)
from kasmina_fx.grafting import strategies
from kasmina_fx.testing import RecordingBackend

E = ExtendedLifecycle


def layer_of(folder: Path | None = None, **options: Any) -> ChunkedKasminaLayerV2:
    torch.manual_seed(0)
    return ChunkedKasminaLayerV2(nn.Linear(4, 8), 4, "a/fc", checkpoint_dir=folder, **options)


def pass_epochs(layer: ChunkedKasminaLayerV2, count: int) -> None:
    for _ in range(count):
        layer.step_epoch()


def stage(layer: ChunkedKasminaLayerV2, seed: int = 0) -> ExtendedLifecycle:
    return E(int(layer.extended_state.get_state([seed])))


def test_a_whole_life_keeps_to_the_minimum_epochs() -> None:
    assert {s.name: n for s, n in MIN_EPOCHS.items()} == {
        "TRAINING": 100,
        "GRAFTING": 50,
        "STABILIZATION": 20,
        "EVALUATING": 30,
        "FINE_TUNING": 50,
    }
    layer, x = layer_of(), torch.randn(5, 4)
    assert layer.request_germination(0, "mlp")
    assert not layer.request_germination(0)
    assert stage(layer) is E.GERMINATED
    assert torch.equal(layer(x), layer.base_layer(x))
    go = layer.request_state_transition
    assert not go(0, E.GRAFTING)  # the lifecycle has no such way
    assert go(0, E.TRAINING)
    pass_epochs(layer, 99)
    assert not go(0, E.GRAFTING, {"by": "test"})
    layer.step_epoch()
    assert go(0, E.GRAFTING)
    pass_epochs(layer, 49)
    assert stage(layer) is E.GRAFTING
    assert 0.9 < float(layer.state.alphas[0]) < 1.0
    layer.step_epoch()
    assert stage(layer) is E.STABILIZATION  # the ramp is over
    for after, to in ((20, "EVALUATING"), (30, "FINE_TUNING"), (50, "FOSSILIZED")):
        assert not go(0, to)
        pass_epochs(layer, after)
        assert go(0, to)
    torch.testing.assert_close(layer(x), reference.forward(layer, x))
    assert not torch.allclose(layer(x), layer.base_layer(x))
    told = layer.get_health_report()["seeds"][0]
    assert told["state"] == "FOSSILIZED"
    assert told["recent_transitions"][0]["to"] == "FOSSILIZED"
    assert not go(0, E.CULLED)


@pytest.mark.parametrize("way", [E.CULLED, E.CANCELLED, E.ROLLED_BACK])
def test_the_ways_out_wait_for_nothing(way: ExtendedLifecycle) -> None:
    layer = layer_of()
    layer.request_germination(1)
    layer.request_state_transition(1, E.TRAINING)
    assert layer.request_state_transition(1, way)
    assert stage(layer, 1) is way


def test_seeds_that_there_are_not_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    layer = layer_of()
    with caplog.at_level(logging.ERROR):
        assert layer.request_germination(-1) is False
        assert layer.request_germination(4) is False
    assert "there is no seed -1" in caplog.text
    assert layer.extended_state.get_state_summary() == {"DORMANT": 4}
    for call in (
        lambda: layer.request_state_transition(-1, E.TRAINING),
        lambda: layer.save_checkpoint(4),
        lambda: layer.restore_checkpoint(-1),
    ):
        with pytest.raises(ValueError, match="does not exist"):
            call()
    with pytest.raises(ValueError, match="allowed are DORMANT"):
        layer.request_state_transition(0, 11)
    with pytest.raises(KasminaError, match="grafting_config="):
        layer_of(grafting_config=3)


def test_strategies_are_strings_and_become_ramps_on_the_device(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = ("linear", "drift_controlled", "momentum", "adaptive")
    layer = layer_of()
    for seed, name in enumerate(names):
        assert layer.request_germination(seed, None, name)
    used = [strategies()[int(n)].name for n in layer.state.strategies]
    assert used == ["FIXED_RAMP", "DRIFT_CONTROLLED", "PERFORMANCE_LINKED", "ADAPTIVE"]
    layer.extended_state.set_state([0, 1, 2, 3], torch.tensor([E.GRAFTING] * 4))
    pass_epochs(layer, 2)
    torch.testing.assert_close(layer.state.alphas, torch.full((4,), 2 / 50))
    with torch.no_grad():
        layer.base_layer.weight.mul_(1.5)  # type: ignore[operator]  # a Tensor
    layer.step_epoch()
    torch.testing.assert_close(layer.state.alphas * 50, torch.tensor([3.0, 2.0, 3.0, 2.0]))
    other = layer_of()
    assert other.request_germination(0, grafting_strategy="stability")
    with caplog.at_level(logging.WARNING):
        assert other.request_germination(1, grafting_strategy="quick")
    assert "no grafting strategy 'quick', linear is taken" in caplog.text
    assert [strategies()[int(n)].name for n in other.state.strategies[:2]] == [
        "GRAD_NORM_GATED",
        "FIXED_RAMP",
    ]


def test_a_strategy_of_older_code_is_saved_and_loaded() -> None:
    layer, other = layer_of(), layer_of()
    layer.request_germination(1, None, "adaptive")
    other.load_state_dict(layer.state_dict())
    assert strategies()[int(other.state.strategies[1])].name == "ADAPTIVE"


def test_the_bounds_of_alpha_and_the_duration_are_the_config_s() -> None:
    layer = layer_of(grafting_config=GraftingConfig(10, min_alpha=0.25, max_alpha=0.5))
    layer.request_germination(0)
    layer.extended_state.set_state([0], torch.tensor([E.GRAFTING]))
    layer.step_epoch()
    assert float(layer.state.alphas[0]) == 0.25
    pass_epochs(layer, 3)
    assert (stage(layer), float(layer.state.alphas[0])) == (E.STABILIZATION, 0.5)


def test_the_extended_state_is_of_now_and_writes_through() -> None:
    layer = layer_of()
    layer.request_germination(2, "lora")
    known = layer.extended_state
    assert known.state_tensor[2, :4].tolist() == [E.GERMINATED, 1, 0, 0]
    assert known.get_transition_history(2) == [(E.DORMANT, E.GERMINATED)]
    known.set_state(torch.tensor([0, 2]), torch.tensor([E.FINE_TUNING, E.DORMANT]))
    assert layer.state.stages.tolist() == [E.FINE_TUNING, 0, 0, 0]
    assert layer.bank_of(0) is not None  # it grew an identity
    assert layer.extended_state.get_rollback_states([2]).tolist() == [E.GERMINATED]
    known.update_performance([1], {"loss": torch.tensor([0.5])})
    assert layer.extended_state.performance_metrics[1, 0] == 0.5
    calls: list[Any] = [
        known.increment_epochs,
        lambda: known.update_blueprint([0], torch.tensor([1])),
        lambda: known.from_dict(known.to_dict()),
    ]
    for refused in calls:
        with pytest.raises(ValueError, match="this is the state of a layer"):
            refused()
    other = copy.deepcopy(layer)
    other.extended_state.set_state([1], torch.tensor([E.FOSSILIZED]))
    assert layer.state.stages.tolist() == [E.FINE_TUNING, 0, 0, 0]
    assert "_extended" not in " ".join(layer.state_dict())


def test_a_move_keeps_the_state_of_all_seeds() -> None:
    layer = layer_of()
    layer.request_germination([0, 3])
    assert layer.to("cpu", torch.float64) is layer
    assert layer.extended_state.get_state().tolist() == [E.GERMINATED, 0, 0, E.GERMINATED]
    assert layer(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64


# Checkpoints.


def grown(folder: Path) -> ChunkedKasminaLayerV2:
    layer = layer_of(folder)
    layer.request_germination([1, 2])
    layer.extended_state.set_state([1, 2], torch.tensor([E.FINE_TUNING, E.FINE_TUNING]))
    layer.set_alpha([1, 2], 0.75)
    return layer


def test_a_seed_goes_back_to_its_checkpoint_to_the_bit(tmp_path: Path) -> None:
    layer, x = grown(tmp_path / "kept"), torch.randn(5, 4)
    assert not (tmp_path / "kept").exists()
    assert not layer.restore_checkpoint(1)  # there is none
    before = layer(x)
    first = layer.save_checkpoint(1)
    assert first is not None
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.mul_(3.0)
    layer.set_alpha(1, 0.1)
    layer.request_state_transition(1, E.ROLLED_BACK)
    moved = layer(x)
    assert layer.restore_checkpoint(1, first)
    assert torch.equal(layer(x)[:, 2:4], before[:, 2:4])
    assert torch.equal(layer(x)[:, 4:], moved[:, 4:])  # others are left alone
    assert stage(layer, 1) is E.FINE_TUNING
    layer.set_alpha(1, 0.2)
    second = layer.save_checkpoint(1)
    layer.set_alpha(1, 0.9)
    assert layer.restore_checkpoint(1)  # the newest
    assert float(layer.state.alphas[1]) == pytest.approx(0.2)
    assert layer.checkpoint_manager.list_checkpoints("a/fc") == [first, second]
    assert layer.get_health_report()["checkpoints"]["total_saved"] == 2


def test_a_checkpoint_loads_in_another_process(tmp_path: Path) -> None:
    layer, x = grown(tmp_path), torch.randn(5, 4)
    name = layer.save_checkpoint(1)
    dormant = layer.save_checkpoint(0)
    other = layer_of(tmp_path)  # as it would be made there
    assert other.restore_checkpoint(1, name)
    assert other.restore_checkpoint(0, dormant)
    assert torch.equal(other(x)[:, 2:4], layer(x)[:, 2:4])
    assert torch.equal(other(x)[:, 4:], other.base_layer(x)[:, 4:])


def test_what_can_t_be_restored_gives_false_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = grown(tmp_path), torch.randn(5, 4)
    shared = layer.register_blueprint("affine")
    layer.request_germination(3, shared)
    of_shared = layer.save_checkpoint(3)
    good = layer.save_checkpoint(1)
    assert good is not None
    text = (tmp_path / f"{good}.pt").read_bytes()
    broken = good.replace("normal", "high")
    (tmp_path / f"{broken}.pt").write_bytes(text[:-40])
    before = layer(x)
    for bad in ("../secret", "nothing", good.replace("normal", "low"), broken):
        assert not layer.restore_checkpoint(1, bad)
    assert not layer.restore_checkpoint(2, good)  # of another seed
    assert torch.equal(layer(x), before)
    other = layer_of(tmp_path)
    assert not other.restore_checkpoint(3, of_shared)
    assert "is not registered" in caplog.text
    wide = ChunkedKasminaLayerV2(nn.Linear(4, 12), 4, "a/fc", checkpoint_dir=tmp_path)
    assert not wide.restore_checkpoint(1, good)
    torch.save({"format": "x"}, tmp_path / "x.pt")
    assert wide.extended_state.get_state_summary() == {"DORMANT": 4}


def test_five_are_kept_and_a_higher_priority_outlasts_others(tmp_path: Path) -> None:
    layer = grown(tmp_path)
    first = layer.save_checkpoint(1, "critical")
    others = [layer.save_checkpoint(1, "low") for _ in range(6)]
    assert layer.checkpoint_manager.list_checkpoints("a/fc", 1) == [first, *others[-4:]]
    with pytest.raises(ValueError, match="priority='urgent'"):
        layer.save_checkpoint(1, "urgent")


def test_a_folder_that_can_t_be_written_gives_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file")
    assert grown(tmp_path / "taken" / "below").save_checkpoint(1) is None
    assert "seed 1 not saved" in caplog.text


# What ran in Triton.


def test_the_triton_layer_calls_its_base_and_writes_every_feature(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = TritonChunkedKasminaLayer(nn.Linear(4, 10), 4, checkpoint_dir=tmp_path)
    assert (layer.chunks_per_layer, layer.hidden_dim, layer.chunk_size) == (4, 10, 2)
    x = torch.randn(5, 4)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.request_germination(3, "mlp")
    assert layer.request_state_transition(3, E.TRAINING)
    assert layer.get_active_seed_count() == 1
    assert layer.get_performance_summary()["active_ratio"] == 0.25
    layer.extended_state.set_state([3], torch.tensor([E.FINE_TUNING]))
    layer.set_alpha(3, 1.0)
    assert (layer(x) != layer.base_layer(x)).any(0).tolist() == [False] * 8 + [True] * 2
    assert layer.save_checkpoint() == "latest"
    expected = layer(x)
    layer.set_alpha(3, 0.0)
    layer.load_checkpoint("latest")
    assert torch.equal(layer(x), expected)
    for bad in ("../x", "", "no_such"):
        with pytest.raises(KasminaError):
            layer.load_checkpoint(bad)
    with pytest.raises(KasminaError, match="checkpoint_dir"):
        TritonChunkedKasminaLayer(nn.Linear(4, 10), 4).save_checkpoint()


@pytest.mark.parametrize("enabled", [True, False])
def test_it_compiles_with_the_backend_and_the_lowering_asked_for(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = TritonChunkedKasminaLayer(nn.Linear(4, 10), 4, enable_triton=enabled)
    given: dict[str, Any] = {}

    def compiled(call: Any, **options: Any) -> Any:
        given.update(options)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    layer.compile()
    lowering = "auto" if enabled else "matmul"
    assert given == {"backend": "kasmina", "options": {"lowering": lowering}}
    layer.compile(backend=RecordingBackend("eager"))
    assert isinstance(given["backend"], RecordingBackend)


def test_it_is_a_real_layer() -> None:
    layer = TritonChunkedKasminaLayer(nn.Linear(4, 10), 4)
    assert isinstance(layer, kasmina_fx.KasminaLayer)
