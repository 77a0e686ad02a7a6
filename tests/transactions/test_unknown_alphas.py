"""Alphas that the device computed and the host does not know."""

from __future__ import annotations

import pytest
import torch
from state_cases import in_a_thread, leave_to_the_device

from kasmina_fx import (
    InvalidArgument,
    SeedLifecycle,
    StateTensor,
)

S = SeedLifecycle


def test_after_a_ramp_on_the_cpu_the_host_knows_alpha() -> None:
    state = StateTensor(3)
    computed = torch.tensor([0.25, 0.5, 0.0])
    state.set_device_alpha(computed)
    assert torch.equal(state.alpha, computed)
    assert state._committed.alpha is not None
    assert state.alphas.tolist() == [0.25, 0.5, 0.0]
    state.set_alpha(0, 1.0)
    assert state.alpha.tolist() == state.alphas.tolist() == [1.0, 0.5, 0.0]
    assert computed.tolist() == [0.25, 0.5, 0.0]


def test_what_the_device_alone_knows_is_asked_for_once() -> None:
    state = StateTensor(3)
    state.set_device_alpha(torch.tensor([0.25, 0.5, 0.75]))
    leave_to_the_device(state)
    known = state.alphas
    assert known.tolist() == [0.25, 0.5, 0.75]
    assert known.data_ptr() != state.alpha.data_ptr()
    assert state.alphas is known
    assert state.get_seed_state(2)["alpha"] == 0.75


def test_setting_alpha_leaves_what_the_device_alone_knows() -> None:
    state = StateTensor(4)
    state.set_device_alpha(torch.tensor([0.25, 0.5, 0.75, 1.0]))
    leave_to_the_device(state)
    old = state.alpha
    state.set_alpha([1, 2], torch.tensor([0.125, 0.0]))
    state.set_alpha(2, 0.375)
    assert state._committed.alpha is None  # nothing was read back
    assert state.alpha.tolist() == [0.25, 0.125, 0.375, 1.0]
    assert old.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert state.alphas.tolist() == [0.25, 0.125, 0.375, 1.0]


@pytest.mark.parametrize("look", [False, True], ids=["blind", "looking"])
def test_a_transaction_over_unknown_alphas_reads_its_own_changes(look: bool) -> None:
    state = StateTensor(4)
    state.set_rows([1, 2], lifecycle_state=S.GRAFTING, blueprint_id=3)
    state.set_device_alpha(torch.tensor([0.25, 0.5, 0.75, 1.0]))
    leave_to_the_device(state)
    with state.transaction():
        state.set_alpha([0, 2], 0.125)
        if look:
            assert state.alphas.tolist() == [0.125, 0.5, 0.125, 1.0]
        state.set_alpha(2, 0.375)
        state.advance(1, S.CULLED)
        if look:
            assert state.alphas.tolist() == [0.125, 0.0, 0.375, 1.0]
            assert state.get_seed_state(1)["alpha"] == 0.0
        assert state.alpha.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert state.alpha.tolist() == state.alphas.tolist() == [0.125, 0.0, 0.375, 1.0]
    assert state.stages.tolist() == [0, 8, 3, 0]


def test_a_failed_transaction_over_unknown_alphas_changes_nothing() -> None:
    state = StateTensor(2)
    state.set_device_alpha(torch.tensor([0.25, 0.5]))
    leave_to_the_device(state)
    tensor = state.alpha

    def fail_inside() -> None:
        with state.transaction():
            state.set_alpha(1, 1.0)
            state.set_alpha(1, float("nan"))

    def fail() -> None:
        with state.transaction():
            state.set_alpha(0, 1.0)
            with pytest.raises(InvalidArgument):
                fail_inside()
            assert state.alphas.tolist() == [1.0, 0.5]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert state.alpha is tensor
    assert state.alphas.tolist() == [0.25, 0.5]


def test_another_thread_reads_unknown_alphas_as_they_are_published() -> None:
    state = StateTensor(2)
    state.set_device_alpha(torch.tensor([0.25, 0.5]))
    leave_to_the_device(state)
    assert in_a_thread(lambda: state.alphas.tolist()) == [0.25, 0.5]
    with state.transaction():
        state.set_alpha(0, 1.0)
        assert in_a_thread(lambda: state.alphas.tolist()) == [0.25, 0.5]
