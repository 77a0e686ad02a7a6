"""The older state tensor, by itself and as a view of a layer's seeds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kasmina_fx import KasminaError
from kasmina_fx.compat.chunked import ChunkedKasminaLayer, SeedLifecycle, StateTensor

S = SeedLifecycle


@pytest.fixture(params=["alone", "of a layer"])
def state(request: pytest.FixtureRequest) -> StateTensor:
    if request.param == "alone":
        return StateTensor(5)
    return ChunkedKasminaLayer(nn.Linear(3, 10), 5, "fc").state_tensor


def test_tensors_have_the_shapes_and_dtypes_of_before(state: StateTensor) -> None:
    dtypes = {
        "health_scores": torch.float32,
        "error_counts": torch.int16,
        "alpha_blend": torch.float32,
        "telemetry_sum": torch.float32,
        "telemetry_sum_sq": torch.float32,
        "telemetry_count": torch.int32,
    }
    assert (state.state_tensor.dtype, state.state_tensor.shape) == (torch.int32, (5, 4))
    for name, dtype in dtypes.items():
        column = getattr(state, name)
        assert (column.dtype, column.shape) == (dtype, (5,)), name
        assert column.tolist() == [float(name == "health_scores")] * 5
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = state.nothing


def test_any_state_can_be_set_and_zeroes_the_epochs(state: StateTensor) -> None:
    for new in (*SeedLifecycle, *reversed(SeedLifecycle)):
        state.batch_set_lifecycle_state(torch.tensor([1, 3]), new)
        assert state.get_lifecycle_states().tolist() == [0, new, 0, new, 0]
        active = new in (S.LOADING, S.ACTIVE)
        assert state.get_active_seeds().tolist() == [False, active, False, active, False]
        assert state.get_dormant_seeds().tolist() == [True, new == 0, True, new == 0, True]
        assert state.find_seeds_by_state(new).tolist() == ([1, 3] if new else [0, 1, 2, 3, 4])
        assert state.get_state_distribution()[new.name] == (2 if new else 5)
        state.increment_epochs()
        state.set_lifecycle_state(1, new)
        assert state.get_seed_state(1)["epochs_in_state"] == 0
        assert state.get_seed_state(3)["epochs_in_state"] == (
            1 if new else int(not LAYERS_ON(state))
        )


def LAYERS_ON(state: StateTensor) -> bool:
    return state._layer is not None


def test_alphas_ramp_with_the_epochs_of_seeds_that_load(state: StateTensor) -> None:
    state.batch_set_lifecycle_state([0, 1], S.LOADING)
    state.set_lifecycle_state(2, S.ACTIVE)
    for _ in range(15):
        state.increment_epochs()
    state.apply_grafting_ramp()
    assert state.alpha_blend.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert state.transition_ready_seeds() == {
        "loading_to_active": [],
        "active_to_fossilized": [],
        "error_to_dormant": [],
    }
    state.apply_grafting_ramp(10)
    assert state.transition_ready_seeds()["loading_to_active"] == [0, 1]
    state.update_alpha_blend(torch.tensor([1, 2]), torch.tensor([0.25, 7.0]))
    assert state.alpha_blend.tolist() == [1.0, 0.25, 1.0, 0.0, 0.0]
    state.set_lifecycle_state(0, S.ERROR_RECOVERY)
    for _ in range(100):
        state.increment_epochs()
    assert state.transition_ready_seeds()["error_to_dormant"] == [0]
    with pytest.raises(KasminaError, match="ramp_duration=0"):
        state.apply_grafting_ramp(0)


def test_elements_can_be_assigned_to_and_other_writes_raise(state: StateTensor) -> None:
    state.state_tensor[2, StateTensor.LIFECYCLE_STATE_IDX] = S.ACTIVE
    state.state_tensor[2, StateTensor.EPOCHS_IN_STATE_IDX] = 15
    state.alpha_blend[2] = 0.75
    known = state.get_seed_state(2)
    assert (known["lifecycle_state"], known["epochs_in_state"]) == (S.ACTIVE, 15)
    assert known["alpha_blend"] == 0.75
    with pytest.raises(RuntimeError, match="nference tensor"):
        state.alpha_blend.fill_(1.0)
    with pytest.raises(ValueError, match="allowed are DORMANT"):
        state.state_tensor[2, 0] = 9
    assert state.get_seed_state(2) == known


def test_what_was_read_is_a_copy_of_that_moment(state: StateTensor) -> None:
    state.set_lifecycle_state(0, S.LOADING)
    before = state.state_tensor[:, StateTensor.EPOCHS_IN_STATE_IDX]
    state.increment_epochs()
    assert int(before[0]) == 0
    assert int(state.state_tensor[0, StateTensor.EPOCHS_IN_STATE_IDX]) == 1


def test_errors_and_health(state: StateTensor) -> None:
    assert [state.increment_error_count(3) for _ in range(2)] == [1, 2]
    state.update_health_scores(torch.tensor([0, 3]), torch.tensor([0.25, 0.5]))
    assert state.health_scores.tolist() == [0.25, 1.0, 1.0, 0.5, 1.0]
    assert state.find_unhealthy_seeds().tolist() == [0, 3]
    assert state.find_unhealthy_seeds(0.3).tolist() == [0]
    state.set_lifecycle_state(1, S.LOADING)
    state.update_alpha_blend(1, 0.5)
    assert state.get_summary_stats() == {
        "total_seeds": 5,
        "state_distribution": {
            "DORMANT": 4,
            "LOADING": 1,
            "ACTIVE": 0,
            "ERROR_RECOVERY": 0,
            "FOSSILIZED": 0,
        },
        "active_count": 1,
        "avg_health_score": pytest.approx(0.75),
        "min_health_score": 0.25,
        "max_error_count": 2,
        "avg_alpha_blend": 0.5,
    }
    seeds = state.to_logical_seeds("fc", [2] * 5)
    assert [seed.health_score for seed in seeds] == [0.25, 1.0, 1.0, 0.5, 1.0]
    assert (seeds[3].error_count, seeds[1].lifecycle_state) == (2, S.LOADING)
    with pytest.raises(ValueError, match="1 chunk sizes for 5 seeds"):
        state.to_logical_seeds("fc", [2])


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_seed_that_there_is_not_is_a_value_error(state: StateTensor, bad: int) -> None:
    calls: list[Any] = [
        lambda: state.get_seed_state(bad),
        lambda: state.set_lifecycle_state(bad, S.ACTIVE),
        lambda: state.batch_set_lifecycle_state([bad], S.ACTIVE),
        lambda: state.set_blueprint(bad, 1),
        lambda: state.increment_error_count(bad),
        lambda: state.get_telemetry_stats(bad),
        lambda: state.update_alpha_blend([bad], 1.0),
        lambda: state.accumulate_telemetry(bad, 1.0, 1.0, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="does not exist"):
            call()


def test_telemetry_is_summed_by_hand_where_there_is_no_layer() -> None:
    state = StateTensor(2)
    assert state.get_telemetry_stats(0) == (0.0, 0.0)
    state.accumulate_telemetry(0, 6.0, 20.0, 2)
    assert state.get_telemetry_stats(0) == (3.0, 1.0)
    assert state.telemetry_count.tolist() == [2, 0]
    state.telemetry_sum_sq[0] = 17.9  # rounding: no variance below 0
    assert state.get_telemetry_stats(0) == (3.0, 0.0)
    state.update_health_scores(0, 0.5)
    state.reset_telemetry()
    assert state.get_telemetry_stats(0) == (0.0, 0.0)
    assert state.health_scores.tolist() == [0.5, 1.0]


def test_of_a_layer_it_is_measured() -> None:
    layer, x = ChunkedKasminaLayer(nn.Linear(3, 10), 5, "fc"), torch.randn(16, 3)
    out, state = layer(x).detach(), layer.state_tensor
    for seed, part in enumerate(out.split(2, 1)):
        mean, variance = state.get_telemetry_stats(seed)
        assert mean == pytest.approx(float(part.mean()), abs=1e-5)
        assert variance == pytest.approx(float(part.var(correction=0)), rel=1e-4)
        assert float(state.telemetry_sum[seed]) == pytest.approx(float(part.sum()), abs=1e-3)
        squares = float(part.square().sum())
        assert float(state.telemetry_sum_sq[seed]) == pytest.approx(squares, rel=1e-4)
        expected = 0.5 * min(1.0, float(part.std(correction=0)) / 0.1) + 0.5
        assert float(state.health_scores[seed]) == pytest.approx(expected, rel=1e-4)
    assert state.telemetry_count.tolist() == [32] * 5
    state.update_health_scores(1, 0.25)
    assert float(state.health_scores[1]) == 0.25
    state.reset_telemetry()
    assert state.telemetry_count.tolist() == [0] * 5
    assert state.health_scores.tolist() == [1.0] * 5
    calls: list[Any] = [
        lambda: state.accumulate_telemetry(0, 1.0, 1.0, 1),
        lambda: state.health_scores.__setitem__(0, 0.5),
        lambda: setattr(state, "health_scores", torch.ones(5)),
        lambda: state.load_checkpoint(StateTensor(5).save_checkpoint()),
    ]
    for refused in calls:
        with pytest.raises(ValueError, match=r"is measured|state dict"):
            refused()


def test_a_checkpoint_has_all_of_it_and_an_older_one_loads() -> None:
    state = StateTensor(3)
    state.batch_set_lifecycle_state([0, 2], S.LOADING)
    state.set_blueprint(2, 7, 1)
    state.increment_epochs()
    state.apply_grafting_ramp(4)
    state.accumulate_telemetry(1, 3.0, 5.0, 2)
    state.increment_error_count(1)
    state.update_health_scores(0, 0.5)
    saved = state.save_checkpoint()
    other = StateTensor(3)
    other.load_checkpoint(saved)
    for name, tensor in other.save_checkpoint().items():
        assert torch.equal(tensor, saved[name]), name
    older = {n: t for n, t in saved.items() if not n.startswith("telemetry")}
    third = StateTensor(3)
    third.load_checkpoint(older)
    assert third.telemetry_count.tolist() == [0, 0, 0]
    assert third.alpha_blend.tolist() == [0.25, 0.0, 0.25]
    before = third.save_checkpoint()
    bad = [
        {n: t for n, t in older.items() if n != "alpha_blend"},
        older | {"state_tensor": torch.zeros(2, 4, dtype=torch.int32)},
        older | {"state_tensor": torch.full((3, 4), 9, dtype=torch.int32)},
        older | {"health_scores": torch.ones(2)},
    ]
    for given in bad:
        with pytest.raises(KasminaError):
            third.load_checkpoint(given)
    assert all(torch.equal(t, before[n]) for n, t in third.save_checkpoint().items())
    assert third.to("cpu") is third


def test_a_view_of_a_layer_moves_the_layer_and_copies_see_their_own() -> None:
    layer = ChunkedKasminaLayer(nn.Linear(3, 10), 5, "fc")
    assert layer.state_tensor.to(torch.device("cpu")).device.type == "cpu"
    other = copy.deepcopy(layer)
    other.state_tensor.set_lifecycle_state(0, S.ACTIVE)
    other.state_tensor.increment_error_count(0)
    assert layer.state_tensor.get_seed_state(0)["lifecycle_state"] == S.DORMANT
    assert layer.state_tensor.get_seed_state(0)["error_count"] == 0


def test_blueprints_are_exchanged_for_registered_ones() -> None:
    layer = ChunkedKasminaLayer(nn.Linear(3, 10), 5, "fc")
    state, number = layer.state_tensor, layer.register_blueprint("lora")
    with pytest.raises(ValueError, match=r"request_germination\(1, 1, 0\)"):
        state.set_blueprint(1, number)
    layer.request_germination(1)
    state.update_alpha_blend(1, 0.5)
    state.set_blueprint(1, number, 2)
    assert state.get_seed_state(1)["blueprint_id"] == number
    assert state.get_seed_state(1)["alpha_blend"] == 0.5
    state.set_blueprint(1, number, 1)
    assert state.get_seed_state(1)["grafting_strategy"] == 1
    before = state.get_seed_state(1)
    with pytest.raises(ValueError, match="no blueprint has the id 99"):
        state.set_blueprint(1, 99)
    assert state.get_seed_state(1) == before
