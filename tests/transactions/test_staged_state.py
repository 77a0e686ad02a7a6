"""Transactions of a state tensor: what is published, and when."""

from __future__ import annotations

import threading

import pytest
import torch
from state_cases import frozen, in_a_thread

from kasmina_fx import (
    IllegalTransition,
    SeedLifecycle,
    StateTensor,
)

S = SeedLifecycle


def test_a_transaction_publishes_once_and_at_its_end() -> None:
    state = StateTensor(3)
    published: list[list[int]] = []
    state.on_publish = lambda: lambda moved: published.append(state.state_tensor[:, 0].tolist())
    old = state.state_tensor
    with state.transaction():
        state.advance(0, S.GERMINATED)
        with state.transaction():
            state.advance([1, 2], S.GERMINATED)
        state.advance(0, S.TRAINING)
        assert state.state_tensor is old
        assert published == []
        assert state.stages.tolist() == [2, 1, 1]  # what the host decides by
    assert published == [[2, 1, 1]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_undoes_a_transaction(error: type[BaseException]) -> None:
    state = StateTensor(3)
    state.set_rows(1, lifecycle_state=S.GRAFTING, blueprint_id=2)
    state.set_alpha(1, 0.5)
    published: list[bool] = []
    state.on_publish = lambda: published.append
    before, tensor = frozen(state), state.state_tensor

    def fail() -> None:
        with state.transaction():
            state.advance([0, 2], S.GERMINATED)
            state.set_alpha(1, 1.0)
            state.advance(1, S.CULLED)
            state.increment_epochs()
            raise error

    with pytest.raises(error):
        fail()
    assert frozen(state) == before
    assert state.state_tensor is tensor
    assert published == []
    state.advance([0, 2], S.GERMINATED)  # not stuck
    assert published == [True]


def test_a_nested_transaction_that_fails_undoes_only_itself() -> None:
    state = StateTensor(4)

    def fail() -> None:
        with state.transaction():
            state.advance(1, S.GERMINATED)
            state.set_alpha([0, 1], 1.0)
            state.advance(2, S.FOSSILIZED)

    with state.transaction():
        state.advance(0, S.GERMINATED)
        state.set_alpha(0, 0.25)
        with pytest.raises(IllegalTransition):
            fail()
        assert state.stages.tolist() == [1, 0, 0, 0]
        assert state.alphas.tolist() == [0.25, 0, 0, 0]
        state.advance(3, S.GERMINATED)
        assert state.state_tensor.any().item() is False
    assert state.state_tensor[:, 0].tolist() == [1, 0, 0, 1]
    assert state.alpha.tolist() == [0.25, 0, 0, 0]


def test_an_outer_transaction_that_fails_undoes_what_inner_ones_did() -> None:
    state = StateTensor(2)
    before, tensor = frozen(state), state.state_tensor

    def fail() -> None:
        with state.transaction():
            with state.transaction():
                state.advance(0, S.GERMINATED)
            state.set_alpha(0, 1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert frozen(state) == before
    assert state.state_tensor is tensor


def test_a_listener_hears_whether_rows_changed() -> None:
    state = StateTensor(2)
    heard: list[bool] = []
    state.on_publish = lambda: heard.append
    state.set_alpha(0, 0.5)
    state.advance(0, S.GERMINATED)
    with state.transaction():
        state.set_alpha(0, 0.75)
        state.advance(0, S.TRAINING)
    state.set_device_alpha(torch.tensor([0.5, 0.0]))
    assert heard == [False, True, True, False]


def test_a_transaction_that_changes_nothing_publishes_nothing() -> None:
    state = StateTensor(2)
    heard: list[bool] = []
    state.on_publish = lambda: heard.append
    tensor, alpha = state.state_tensor, state.alpha
    with state.transaction(), state.transaction():
        assert state.stages.tolist() == [0, 0]
    assert heard == []
    assert state.state_tensor is tensor
    assert state.alpha is alpha


def test_another_thread_sees_only_what_is_published() -> None:
    state = StateTensor(3)
    state.set_rows(1, lifecycle_state=S.GRAFTING, blueprint_id=2)
    state.set_alpha(1, 0.5)
    before = frozen(state)
    with state.transaction():
        state.advance(0, S.GERMINATED)
        with state.transaction():
            state.advance(1, S.CULLED)
        assert state.stages.tolist() == [1, 8, 0]
        assert state.alphas.tolist() == [0, 0, 0]
        assert in_a_thread(lambda: frozen(state)) == before
        assert in_a_thread(lambda: state.get_seed_state(1))["alpha"] == 0.5
        assert in_a_thread(lambda: state.blended.tolist()) == [False, True, False]
    assert in_a_thread(lambda: state.stages.tolist()) == [1, 8, 0]
    assert in_a_thread(lambda: state.alphas.tolist()) == [0, 0, 0]


def test_a_transaction_of_another_thread_waits_for_this_one_and_builds_on_it() -> None:
    state = StateTensor(2)
    begun, seen = threading.Event(), list[list[int]]()

    def other() -> None:
        begun.set()
        with state.transaction():
            seen.append(state.stages.tolist())
            state.advance(0, S.TRAINING)

    thread = threading.Thread(target=other, daemon=True)
    with state.transaction():
        thread.start()
        assert begun.wait(20)
        thread.join(0.1)
        state.advance([0, 1], S.GERMINATED)
        assert seen == []
    thread.join(20)
    assert seen == [[1, 1]]
    assert state.stages.tolist() == [2, 1]


def test_many_threads_lose_no_change() -> None:
    state = StateTensor(40)

    def work(first: int) -> None:
        for seed in range(first, 40, 4):
            state.advance(seed, S.GERMINATED)
            with state.transaction():
                state.set_alpha(seed, seed / 64)
                state.advance(seed, S.TRAINING)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert state.state_tensor[:, 0].tolist() == [S.TRAINING] * 40
    assert state.alpha.tolist() == [seed / 64 for seed in range(40)]


def test_versions_are_never_written_to() -> None:
    state = StateTensor(3)
    state.set_alpha(1, 0.5)
    rows, alphas = state.rows, state.alphas
    with state.transaction():
        state.advance([0, 1], S.GERMINATED)
        staged_rows, staged_alphas = state.rows, state.alphas
        state.set_alpha(2, 1.0)
        state.advance(0, S.TRAINING)
        state.increment_epochs()
    assert rows.tolist() == [[0] * 4] * 3
    assert alphas.tolist() == staged_alphas.tolist() == [0, 0.5, 0]
    assert staged_rows[:, 0].tolist() == [1, 1, 0]


def test_published_tensors_are_new_objects() -> None:
    state = StateTensor(3)
    old_state, old_alpha = state.state_tensor, state.alpha
    state.advance(1, S.GERMINATED)
    state.set_alpha(1, 0.5)
    assert old_state.tolist() == [[0] * 4] * 3
    assert old_alpha.tolist() == [0.0] * 3
    assert state.state_tensor is not old_state
    assert state.alpha is not old_alpha
    assert state.state_tensor.data_ptr() != state.rows.data_ptr()
    assert state.alpha.data_ptr() != state.alphas.data_ptr()
    assert dict(state.named_buffers()).keys() == {"state_tensor", "alpha"}
