"""The five states and the eleven, and the layout of older code."""

from __future__ import annotations

import inspect

import pytest
import torch

from kasmina_fx import KasminaError, SeedLifecycle
from kasmina_fx.compat import KasminaLayer, KasminaStateLayout, SeedLifecycleState
from kasmina_fx.compat.states import OLD_STATES, STAGES, old_states
from kasmina_fx.lifecycle import BLENDED
from kasmina_fx.testing import graft

ACTIVE, DORMANT = SeedLifecycleState.ACTIVE, SeedLifecycleState.DORMANT


def test_the_five_have_the_numbers_that_older_code_knows() -> None:
    assert {state.name: state.value for state in SeedLifecycleState} == {
        "DORMANT": 0,
        "LOADING": 1,
        "ACTIVE": 2,
        "ERROR_RECOVERY": 3,
        "FOSSILIZED": 4,
    }


def test_each_of_the_eleven_is_one_of_the_five_and_there_and_back_is_the_same() -> None:
    assert set(OLD_STATES) == set(SeedLifecycle)
    assert {OLD_STATES[stage] for stage in STAGES.values()} == set(SeedLifecycleState)
    for state, stage in STAGES.items():
        assert OLD_STATES[stage] is state
    for stage, state in OLD_STATES.items():
        assert (stage in BLENDED) == (state in (ACTIVE, SeedLifecycleState.FOSSILIZED))
    numbers = old_states(torch.arange(len(SeedLifecycle)))
    assert numbers.dtype == torch.uint8
    assert numbers.tolist() == [OLD_STATES[stage].value for stage in SeedLifecycle]


SIGNATURES = {
    "__init__": ["num_seeds", "device"],
    "get_active_seeds": [],
    "get_dormant_seeds": [],
    "transition_seed_state": ["seed_idx", "new_state", "kernel_id"],
    "increment_error_count": ["seed_idx"],
    "update_telemetry": ["seed_idx", "latency_us", "health_score"],
    "get_stats": [],
    "reset_seed": ["seed_idx"],
    "has_active_seeds": [],
    "get_active_count": [],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_of_the_layout_have_the_signatures_of_before(name: str) -> None:
    parameters = inspect.signature(getattr(KasminaStateLayout, name)).parameters
    assert [p for p in parameters if p != "self"] == SIGNATURES[name]


COLUMNS = {
    "lifecycle_states": torch.uint8,
    "active_kernel_id": torch.int64,
    "alpha_blend": torch.float16,
    "health_accumulator": torch.float32,
    "last_update_epoch": torch.int32,
    "exec_latency_us": torch.uint16,
    "error_count": torch.int16,
    "fallback_active": torch.bool,
}


@pytest.fixture(params=["alone", "of a layer"])
def layout(request: pytest.FixtureRequest) -> KasminaStateLayout:
    if request.param == "alone":
        return KasminaStateLayout(4, torch.device("cpu"))
    layer = KasminaLayer(3, 8, num_seeds=4)
    return layer.state_layout


def test_columns(layout: KasminaStateLayout) -> None:
    assert (layout.num_seeds, layout.device) == (4, torch.device("cpu"))
    for name, dtype in COLUMNS.items():
        column = getattr(layout, name)
        assert (column.dtype, column.shape, column.device.type) == (dtype, (4,), "cpu"), name
        assert not column.any() if dtype != torch.uint16 else column.tolist() == [0] * 4
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = layout.nothing


def test_any_transition_is_taken_and_counted(layout: KasminaStateLayout) -> None:
    for state in (*SeedLifecycleState, *reversed(SeedLifecycleState)):
        layout.transition_seed_state(1, state)
        assert int(layout.lifecycle_states[1]) == state
        assert layout.get_active_count() == int(state is ACTIVE) == layout._active_seed_count
        assert layout.has_active_seeds() == (state is ACTIVE)
        assert layout.get_active_seeds().tolist() == [False, state is ACTIVE, False, False]
        assert layout.get_dormant_seeds().tolist() == [True, state is DORMANT, True, True]


def test_an_active_seed_forgets_its_errors_and_keeps_its_kernel(layout: KasminaStateLayout) -> None:
    layout.increment_error_count(2)
    layout.fallback_active[2] = True
    layout.transition_seed_state(2, ACTIVE, kernel_id=12345)
    assert int(layout.active_kernel_id[2]) == 12345
    assert (int(layout.error_count[2]), bool(layout.fallback_active[2])) == (0, False)


def test_the_third_error_is_one_too_many(layout: KasminaStateLayout) -> None:
    layout.transition_seed_state(3, ACTIVE)
    assert [layout.increment_error_count(3) for _ in range(2)] == [1, 2]
    assert int(layout.lifecycle_states[3]) == ACTIVE
    assert layout.increment_error_count(3) == 3
    assert int(layout.lifecycle_states[3]) == SeedLifecycleState.ERROR_RECOVERY
    assert bool(layout.fallback_active[3])


def test_telemetry_is_an_average_and_fits(layout: KasminaStateLayout) -> None:
    layout.update_telemetry(0, 10**9, 0.5)
    assert float(layout.health_accumulator[0]) == 0.5
    layout.update_telemetry(0, 7, 1.0)
    assert float(layout.health_accumulator[0]) == pytest.approx(0.55)
    assert layout.exec_latency_us.tolist() == [7, 0, 0, 0]
    layout.update_telemetry(1, 70_000, 0.1)
    assert layout.exec_latency_us.tolist()[1] == 65535


def test_stats_have_ten_keys(layout: KasminaStateLayout) -> None:
    layout.transition_seed_state(0, ACTIVE)
    layout.transition_seed_state(1, SeedLifecycleState.LOADING)
    layout.transition_seed_state(2, SeedLifecycleState.FOSSILIZED)
    layout.update_telemetry(0, 8, 0.4)
    layout.increment_error_count(0)
    assert layout.get_stats() == {
        "num_seeds": 4,
        "dormant_seeds": 1,
        "active_seeds": 1,
        "loading_seeds": 1,
        "error_recovery_seeds": 0,
        "fossilized_seeds": 1,
        "avg_health": pytest.approx(0.1),
        "avg_latency_us": 2.0,
        "total_errors": 1,
        "fallback_active_count": 0,
    }


def test_reset_forgets_all_and_counts_right(layout: KasminaStateLayout) -> None:
    layout.transition_seed_state(0, ACTIVE, kernel_id=5)
    layout.alpha_blend[0] = 0.5
    layout.update_telemetry(0, 8, 0.4)
    layout.last_update_epoch[0] = 3
    layout.reset_seed(0)
    for name in COLUMNS:
        assert getattr(layout, name).tolist() == [0] * 4, name
    assert layout.get_active_count() == 0  # the reference went on counting it


@pytest.mark.parametrize("bad", [-1, 4, 10**30, True, None, 1.0])
def test_a_bad_index_is_refused(layout: KasminaStateLayout, bad: int) -> None:
    calls = (
        lambda: layout.transition_seed_state(bad, ACTIVE),
        lambda: layout.increment_error_count(bad),
        lambda: layout.update_telemetry(bad, 1, 1.0),
        lambda: layout.reset_seed(bad),
    )
    for call in calls:
        with pytest.raises(ValueError, match="Invalid seed index: "):
            call()
    assert layout.get_stats()["dormant_seeds"] == 4


def test_an_index_may_be_a_tensor_and_a_state_a_number(layout: KasminaStateLayout) -> None:
    layout.transition_seed_state(torch.tensor(2), 2)  # type: ignore[arg-type]  # as loops over nonzero() do
    assert layout.get_active_seeds().nonzero().flatten().tolist() == [2]
    with pytest.raises(KasminaError, match="state 9; allowed are DORMANT"):
        layout.transition_seed_state(0, 9)


def test_assignment_to_a_column_reaches_the_seeds(layout: KasminaStateLayout) -> None:
    layout.lifecycle_states[1:3] = int(ACTIVE)
    assert layout.get_active_seeds().tolist() == [False, True, True, False]
    layout.alpha_blend[layout.get_active_seeds()] = 0.25
    assert layout.alpha_blend.tolist() == [0.0, 0.25, 0.25, 0.0]
    layout.alpha_blend[1] = 7.0
    assert layout.alpha_blend.tolist() == [0.0, 1.0, 0.25, 0.0]
    with pytest.raises(RuntimeError, match="Inplace update"):
        layout.alpha_blend.fill_(1.0)  # a copy: no write may be lost in silence
    with pytest.raises(KasminaError, match="state 77"):
        layout.lifecycle_states[0] = 77


def test_what_is_made_of_a_column_is_a_plain_tensor_in_all_but_name(
    layout: KasminaStateLayout,
) -> None:
    layout.alpha_blend[0] = 0.5
    doubled = layout.alpha_blend * 2
    doubled[0] = 0.0
    assert layout.alpha_blend.tolist() == [0.5, 0.0, 0.0, 0.0]


def test_a_layer_s_finer_stages_stay_what_they_are() -> None:
    layer = KasminaLayer(3, 8, num_seeds=4)
    graft(layer, 0, "lora")
    assert int(layer.state_layout.lifecycle_states[0]) == ACTIVE
    layer.state_layout.transition_seed_state(0, ACTIVE)
    assert layer.seeds[0].stage is SeedLifecycle.GRAFTING
    assert layer.state.stages.tolist() == [SeedLifecycle.GRAFTING, 0, 0, 0]


def test_a_cancelled_seed_is_dormant_for_older_code() -> None:
    layer = KasminaLayer(3, 8, num_seeds=4)
    layer.request_germination(0)
    layer.cancel_germination(0)
    assert bool(layer.state_layout.get_dormant_seeds()[0])
    layer.state_layout.transition_seed_state(0, DORMANT)
    assert layer.seeds[0].stage is SeedLifecycle.DORMANT


def test_the_state_is_the_layer_s_own_and_in_its_state_dict() -> None:
    layer = KasminaLayer(3, 8, num_seeds=4)
    layer.state_layout.transition_seed_state(2, ACTIVE)
    layer.state_layout.alpha_blend[2] = 0.5
    other = KasminaLayer(3, 8, num_seeds=4)
    other.load_state_dict(layer.state_dict())
    assert other.state_layout.get_active_seeds().tolist() == [False, False, True, False]
    assert other.state_layout.alpha_blend.tolist() == [0.0, 0.0, 0.5, 0.0]


def test_notes_follow_the_layer_to_another_device() -> None:
    layout = KasminaLayer(3, 8, num_seeds=4).to("meta").state_layout
    assert layout.error_count.device.type == "meta"
