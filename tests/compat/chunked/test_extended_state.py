"""The state tensor with eight columns, by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kasmina_fx import KasminaError
from kasmina_fx.compat.chunked import ExtendedLifecycle, ExtendedStateTensor

E = ExtendedLifecycle


def test_stages_epochs_and_history() -> None:
    state = ExtendedStateTensor(3)
    state.set_state(torch.tensor([0, 2]), torch.tensor([E.GERMINATED, E.TRAINING]))
    state.increment_epochs()
    state.increment_epochs(torch.tensor([False, False, True]))
    assert state.state_tensor[:, state.EPOCHS_IN_STATE].tolist() == [1, 1, 2]
    state.set_state(torch.tensor([2]), torch.tensor([E.GRAFTING]))
    assert state.get_state().tolist() == [E.GERMINATED, E.DORMANT, E.GRAFTING]
    assert state.get_state(torch.tensor([2])).tolist() == [E.GRAFTING]
    assert state.state_tensor[:, state.EPOCHS_IN_STATE].tolist() == [1, 1, 0]
    assert state.get_rollback_states(torch.tensor([2])).tolist() == [E.TRAINING]
    assert state.get_transition_history(2) == [(E.TRAINING, E.GRAFTING), (E.DORMANT, E.TRAINING)]
    assert state.get_transition_history(2, limit=1) == [(E.TRAINING, E.GRAFTING)]
    assert state.get_transition_history(1) == []  # before, a transition that never was
    state.set_state([2], torch.tensor([E.CULLED]), record_transition=False)
    assert len(state.get_transition_history(2)) == 2
    assert state.get_seeds_in_state(E.GERMINATED).tolist() == [0]
    assert state.get_state_summary() == {"DORMANT": 1, "GERMINATED": 1, "CULLED": 1}
    for step in range(12):
        state.set_state([1], torch.tensor([1 + step % 2]))
    assert len(state.get_transition_history(1)) == 10


def test_active_seeds_and_transitions_that_the_lifecycle_has() -> None:
    state = ExtendedStateTensor(11)
    state.set_state(torch.arange(11), torch.arange(11))
    assert state.get_active_seeds_mask().nonzero().flatten().tolist() == [
        E.TRAINING,
        E.GRAFTING,
        E.FINE_TUNING,
    ]
    valid, errors = state.validate_transitions(
        torch.tensor([0, 1, 7]), torch.tensor([E.GERMINATED, E.GRAFTING, E.DORMANT])
    )
    assert valid.tolist() == [True, False, False]
    assert errors == [
        "Seed 1: Cannot transition from GERMINATED to GRAFTING",
        "Seed 7: Cannot transition from FOSSILIZED to DORMANT",
    ]


def test_notes_and_dicts() -> None:
    state = ExtendedStateTensor(2)
    state.update_blueprint([0, 1], torch.tensor([4, 5]), torch.tensor([1, 2]))
    state.set_checkpoint([1], torch.tensor([77]))
    state.increment_error_count([0, 1])
    state.reset_error_count([0])
    state.update_performance(
        torch.tensor([1]),
        {"loss": torch.tensor([0.5]), "evaluation_score": torch.tensor([0.1234])},
    )
    assert state.state_tensor.tolist() == [[0, 4, 0, 1, 0, -1, 0, 0], [0, 5, 0, 2, 0, 77, 123, 1]]
    state.telemetry_buffer += 1.0
    other = ExtendedStateTensor(2)
    other.from_dict(state.to_dict())
    third = ExtendedStateTensor(2)
    third.load_state_dict(state.state_dict())  # registered: saved and moved with a module
    for copied in (other, third):
        for name, buffer in copied.named_buffers():
            assert torch.equal(buffer, dict(state.named_buffers())[name]), name
    state.reset_telemetry()
    assert not state.telemetry_buffer.any()
    assert other.telemetry_buffer.all()


def test_what_can_t_be_is_refused_and_changes_nothing() -> None:
    state = ExtendedStateTensor(2)
    before = state.to_dict()
    short = {name: value for name, value in before.items() if name != "state_tensor"}
    calls: list[Any] = [
        lambda: state.set_state([-1], torch.tensor([1])),
        lambda: state.set_state([0], torch.tensor([11])),
        lambda: state.set_state([0, 1], torch.tensor([1, 2, 3])),
        lambda: state.update_blueprint([0], torch.tensor([0.5])),
        lambda: state.update_performance([0], {"speed": torch.tensor([1.0])}),
        lambda: state.from_dict(short),
        lambda: state.from_dict(ExtendedStateTensor(3).to_dict()),
        lambda: state.get_transition_history(2),
        lambda: ExtendedStateTensor(0),
    ]
    for call in calls:
        with pytest.raises(KasminaError):
            call()
    for name, value in state.to_dict().items():
        assert (value == before[name]).all() if name != "num_seeds" else value == 2, name
