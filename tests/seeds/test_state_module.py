"""The state tensor as a module: copies, casts, state dicts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from state_cases import frozen
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    StateTensor,
)
from kasmina_fx.testing import graft

S = SeedLifecycle


def _through_a_file(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


def test_state_dict_round_trip_and_refresh() -> None:
    state = StateTensor(3)
    state.set_rows(1, lifecycle_state=S.GRAFTING, blueprint_id=2)
    state.set_alpha(1, 0.5)
    saved = _through_a_file(state.state_dict())
    assert saved.keys() == {"state_tensor", "alpha"}
    fresh = StateTensor(3)
    fresh.load_state_dict(saved)
    fresh.refresh_mirror()
    assert frozen(fresh) == frozen(state)
    fresh.advance(1, S.CULLED)
    assert saved["state_tensor"].tolist() == state.state_tensor.tolist()  # not aliased


def test_a_copy_has_a_state_of_its_own() -> None:
    state = StateTensor(3)
    state.on_publish = lambda: lambda moved: None
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert twin.on_publish is None
        assert state.on_publish is not None
        twin.advance(0, S.GERMINATED)
        twin.set_alpha(0, 0.5)
        assert frozen(state) == frozen(StateTensor(3))
        assert twin.state_tensor[:, 0].tolist() == twin.stages.tolist() == [1, 0, 0]
        assert twin.alphas.tolist() == [0.5, 0, 0]


def test_a_copy_made_inside_a_transaction_can_change() -> None:
    state = StateTensor(3)
    with state.transaction():
        state.advance(0, S.GERMINATED)
        twin = copy.deepcopy(state)
    twin.advance(1, S.GERMINATED)
    assert int(twin.state_tensor[1, 0]) == S.GERMINATED


def test_casting_a_model_keeps_int32_and_float32() -> None:
    state = StateTensor(3)
    state.set_alpha(0, 0.3)
    nn.Sequential(state).to(torch.bfloat16)
    assert state.state_tensor.dtype == torch.int32
    assert state.alpha.dtype == torch.float32
    assert state.alpha[0] == state.alphas[0] == torch.tensor(0.3)


def test_what_a_caller_holds_is_not_written_to() -> None:
    state = StateTensor(3)
    held = state.get_lifecycle_states()
    held.fill_(7)
    assert state.get_lifecycle_states().tolist() == [0, 0, 0]


def test_changes_in_inference_mode_do_not_stick_to_it() -> None:
    state = StateTensor(3)

    def fail() -> None:
        with state.transaction():
            state.advance(1, S.GERMINATED)
            raise RuntimeError

    with torch.inference_mode():
        state.advance(0, S.GERMINATED)
        with pytest.raises(RuntimeError):
            fail()
    state.advance(0, S.TRAINING)
    assert not state.state_tensor.is_inference()
    assert not state.alpha.is_inference()
    assert state.stages.tolist() == [2, 0, 0]


@pytest.mark.parametrize("stage", [SeedLifecycle.DORMANT, SeedLifecycle.CULLED])
def test_a_stage_that_is_set_lets_go_as_one_that_is_reached(stage: SeedLifecycle) -> None:
    layer = KasminaLayer(nn.Linear(4, 6), 3)
    graft(layer, [0], "mlp", alpha=0.5)
    layer.state.set_lifecycle_state(0, stage)
    assert layer.seeds[0].alpha == 0
    assert (layer.seeds[0].blueprint_id == 0) == (stage is SeedLifecycle.DORMANT)
    layer.load_state_dict(layer.state_dict())
