"""The state of seeds: columns and their ranges, and that changes show whole or not at all."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

from kasmina_fx import (
    IllegalTransition,
    InvalidArgument,
    InvalidType,
    KasminaError,
    KasminaLayer,
    SeedLifecycle,
    StateTensor,
)
from kasmina_fx.lifecycle import BLENDED, HOLDS_BLUEPRINT, LEGAL
from kasmina_fx.testing import graft

S = SeedLifecycle
LETS_GO = (S.DORMANT, S.CULLED, S.CANCELLED)
T = TypeVar("T")


def _frozen(state: StateTensor) -> tuple[Any, ...]:
    return (
        state.state_tensor.tolist(),
        state.alpha.tolist(),
        state.rows.tolist(),
        state.alphas.tolist(),
    )


def _in_a_thread(call: Callable[[], T]) -> T:
    """What another thread gets; fails instead of waiting for it for good."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "the thread hangs, or died"
    return found[0]


def _leave_to_the_device(state: StateTensor) -> None:
    """As after a ramp on CUDA: what alpha is, the host does not know."""
    state._committed = replace(state._committed, alpha=None)


def _any(value: Any) -> Any:
    """What the types would refuse too."""
    return value


# Columns.


def test_a_fresh_state_is_all_zero() -> None:
    state = StateTensor(3)
    assert state.state_tensor.dtype == torch.int32
    assert state.state_tensor.tolist() == [[0, 0, 0, 0]] * 3
    assert state.alpha.dtype == torch.float32
    assert state.alpha.tolist() == [0, 0, 0]
    assert (
        StateTensor.LIFECYCLE_STATE_IDX,
        StateTensor.BLUEPRINT_ID_IDX,
        StateTensor.EPOCHS_IN_STATE_IDX,
        StateTensor.GRAFTING_STRATEGY_IDX,
    ) == (0, 1, 2, 3)


def test_rows_are_written_by_column() -> None:
    state = StateTensor(4)
    state.set_rows(
        [3, 1],
        lifecycle_state=torch.tensor([3, 1]),
        blueprint_id=torch.tensor([7, 8]),
        epochs_in_state=5,
        grafting_strategy=2,
    )
    assert state.state_tensor.tolist() == [[0] * 4, [1, 8, 5, 2], [0] * 4, [3, 7, 5, 2]]
    state.set_rows(0, blueprint_id=2**31 - 1)
    assert int(state.state_tensor[0, 1]) == 2**31 - 1


def test_the_named_ways_to_read_and_write() -> None:
    state = StateTensor(4)
    state.set_rows(2, epochs_in_state=9)
    state.set_lifecycle_state(2, S.GRAFTING)
    state.set_blueprint(2, 5, 1)
    state.set_alpha(2, 0.5)
    state.batch_set_lifecycle_state([0, 3], S.CULLED)
    assert state.get_seed_state(2) == {
        "lifecycle_state": 3,
        "blueprint_id": 5,
        "epochs_in_state": 0,
        "grafting_strategy": 1,
        "alpha": 0.5,
    }
    assert state.get_lifecycle_states().tolist() == [8, 0, 3, 8]
    assert state.get_dormant_seeds().tolist() == [False, True, False, False]
    assert state.get_active_seeds().tolist() == [False, False, True, False]
    assert state.get_state_distribution() == {"DORMANT": 1, "GRAFTING": 1, "CULLED": 2}
    assert state.find_seeds_by_state(S.CULLED).tolist() == [0, 3]
    assert state.blended.tolist() == state.holding.tolist() == [False, False, True, False]
    state.set_blueprint(2, 0)
    assert not state.blended.any()  # no blueprint, nothing to blend


BAD: dict[str, tuple[Callable[[StateTensor], Any], type[Exception], str]] = {
    "stage": (lambda s: s.set_rows(1, lifecycle_state=11), InvalidArgument, "11.*0 to 10"),
    "negative stage": (lambda s: s.set_rows(1, lifecycle_state=-1), InvalidArgument, "-1"),
    "blueprint": (lambda s: s.set_rows(1, blueprint_id=2**31), InvalidArgument, "2147483647"),
    "negative blueprint": (lambda s: s.set_rows(1, blueprint_id=-1), InvalidArgument, "-1"),
    "epochs": (lambda s: s.set_rows(1, epochs_in_state=2**15), InvalidArgument, "32767"),
    "strategy": (lambda s: s.set_rows(1, grafting_strategy=4), InvalidArgument, "0 to 3"),
    "negative strategy": (lambda s: s.set_rows(1, grafting_strategy=-1), InvalidArgument, "-1"),
    "one of many": (
        lambda s: s.set_rows([0, 1], blueprint_id=torch.tensor([1, -2])),
        InvalidArgument,
        "-2",
    ),
    "a good column beside a bad one": (
        lambda s: s.set_rows(1, blueprint_id=4, lifecycle_state=99),
        InvalidArgument,
        "99",
    ),
    "unknown column": (lambda s: s.set_rows(1, stage=1), InvalidArgument, "stage.*lifecycle"),
    "a float": (lambda s: s.set_rows(1, blueprint_id=_any(1.5)), InvalidType, r"1\.5"),
    "NaN": (lambda s: s.set_rows(1, blueprint_id=_any(float("nan"))), InvalidType, "nan"),
    "too many values": (
        lambda s: s.set_rows([0, 1], blueprint_id=torch.tensor([1, 2, 3])),
        KasminaError,
        "3",
    ),
    "set_lifecycle_state": (lambda s: s.set_lifecycle_state(1, 11), InvalidArgument, "11"),
    "set_blueprint": (lambda s: s.set_blueprint(1, -1), InvalidArgument, "-1"),
    "alpha NaN": (lambda s: s.set_alpha(1, float("nan")), InvalidArgument, "NaN"),
    "one alpha NaN": (
        lambda s: s.set_alpha([0, 1], torch.tensor([0.5, float("nan")])),
        InvalidArgument,
        "NaN",
    ),
    "too many alphas": (
        lambda s: s.set_alpha([0, 1], torch.tensor([0.5, 0.5, 0.5])),
        InvalidArgument,
        "3",
    ),
    "alphas in two dimensions": (
        lambda s: s.set_alpha([0, 1], torch.zeros(1, 2)),
        InvalidArgument,
        r"\(1, 2\)",
    ),
    "alpha None": (lambda s: s.set_alpha(1, _any(None)), InvalidType, "None"),
    "stage of another type": (
        lambda s: s.advance(1, _any("TRAINING")),
        InvalidArgument,
        "TRAINING.*DORMANT",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_what_is_out_of_range_is_refused_and_nothing_is_written(
    call: Callable[[StateTensor], Any], error: type[Exception], message: str
) -> None:
    state = StateTensor(3, name="fc")
    state.set_rows([0, 1], lifecycle_state=1, blueprint_id=3, epochs_in_state=2)
    state.set_alpha(1, 0.25)
    before, tensor = _frozen(state), state.state_tensor
    with pytest.raises(error, match=message) as caught:
        call(state)
    assert isinstance(caught.value, KasminaError)
    assert "fc" in str(caught.value)
    assert _frozen(state) == before
    assert state.state_tensor is tensor


@pytest.mark.parametrize("num_seeds", [0, -1, 1.0, True, "3"])
def test_a_number_of_seeds_that_is_none_is_refused(num_seeds: Any) -> None:
    with pytest.raises(KasminaError, match="num_seeds"):
        StateTensor(num_seeds)


# Against plain Python.


class Life(RuleBasedStateMachine):
    """The state tensor against lists of plain ints."""

    @initialize(n=st.integers(1, 6), embargo=st.integers(1, 3))
    def begin(self, n: int, embargo: int) -> None:
        self.embargo = embargo
        self.state = StateTensor(n, embargo_epochs=embargo)
        self.rows = [[0, 0, 0, 0] for _ in range(n)]
        self.alpha = [0.0] * n

    def _ids(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.integers(0, len(self.rows) - 1), unique=True))

    def _may(self, i: int, to: SeedLifecycle) -> bool:
        stage, _, epochs, _ = self.rows[i]
        return to in LEGAL[S(stage)] and (stage != S.CULLED or epochs >= self.embargo)

    def _enter(self, i: int, to: SeedLifecycle) -> None:
        kept = [0, 0] if to is S.DORMANT else [self.rows[i][1], self.rows[i][3]]
        self.rows[i] = [int(to), kept[0], 0, kept[1]]
        if to in LETS_GO:
            self.alpha[i] = 0.0

    @rule(data=st.data(), to=st.sampled_from(SeedLifecycle))
    def advance(self, data: st.DataObject, to: SeedLifecycle) -> None:
        ids = self._ids(data)
        if not all(self._may(i, to) for i in ids):
            with pytest.raises(IllegalTransition):
                self.state.advance(ids, to)
            return
        self.state.advance(ids, to)
        for i in ids:
            self._enter(i, to)

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        ids = self._ids(data)
        self.state.reset(ids)
        for i in ids:
            self._enter(i, S.DORMANT)

    @rule(
        data=st.data(),
        stage=st.sampled_from(SeedLifecycle),
        blueprint=st.integers(0, 9),
        strategy=st.integers(0, 3),
    )
    def put(self, data: st.DataObject, stage: SeedLifecycle, blueprint: int, strategy: int) -> None:
        ids = self._ids(data)
        row = [int(stage), blueprint, 0, strategy]
        self.state.set_rows(
            ids,
            lifecycle_state=stage,
            blueprint_id=blueprint,
            epochs_in_state=0,
            grafting_strategy=strategy,
        )
        for i in ids:
            self.rows[i] = list(row)

    @rule(data=st.data(), value=st.floats(-1, 2, width=32))
    def blend(self, data: st.DataObject, value: float) -> None:
        ids = self._ids(data)
        self.state.set_alpha(ids, value)
        for i in ids:
            self.alpha[i] = min(1.0, max(0.0, value))

    @rule(data=st.data(), value=st.floats(0, 1, width=32), look=st.booleans())
    def together(self, data: st.DataObject, value: float, look: bool) -> None:
        first, second = self._ids(data), self._ids(data)
        with self.state.transaction():
            self.state.set_alpha(first, value)
            if look:
                seen = [value if i in first else now for i, now in enumerate(self.alpha)]
                assert self.state.alphas.tolist() == seen
            self.state.reset(second)
        for i in first:
            self.alpha[i] = value
        for i in second:
            self._enter(i, S.DORMANT)

    @rule(data=st.data())
    def ramp(self, data: st.DataObject) -> None:
        values = st.floats(0, 1, width=32)
        self.alpha = [data.draw(values) for _ in self.rows]
        self.state.set_device_alpha(torch.tensor(self.alpha))

    @rule()
    def leave_to_the_device(self) -> None:
        _leave_to_the_device(self.state)

    @rule()
    def look(self) -> None:
        assert self.state.alphas.tolist() == self.alpha

    @rule()
    def epoch(self) -> None:
        self.state.increment_epochs()
        for i, row in enumerate(self.rows):
            row[2] = min(32_767, row[2] + (row[0] != 0))
            if row[0] == S.CULLED and row[2] >= self.embargo:
                self._enter(i, S.DORMANT)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        ids = self._ids(data)

        def failing() -> None:
            with self.state.transaction():
                self.state.set_rows(ids, lifecycle_state=S.FOSSILIZED, blueprint_id=5)
                self.state.set_alpha(ids, 1.0)
                self.state.increment_epochs()
                raise KeyError

        with pytest.raises(KeyError):
            failing()

    @rule()
    def reload(self) -> None:
        fresh = StateTensor(len(self.rows), embargo_epochs=self.embargo)
        fresh.load_state_dict(self.state.state_dict())
        fresh.refresh_mirror()
        self.state = fresh

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "state"):
            return
        assert self.state.state_tensor.tolist() == self.state.rows.tolist() == self.rows
        assert self.state.alpha.tolist() == self.alpha  # not .alphas, which asks the device
        columns = [self.state.stages, self.state.blueprint_ids, self.state.epochs]
        assert [list(row) for row in zip(*[c.tolist() for c in columns], strict=True)] == [
            row[:3] for row in self.rows
        ]
        assert self.state.strategies.tolist() == [row[3] for row in self.rows]
        blended = [row[0] in BLENDED and row[1] > 0 for row in self.rows]
        assert self.state.blended.tolist() == self.state.get_active_seeds().tolist() == blended
        assert self.state.holding.tolist() == [row[0] in HOLDS_BLUEPRINT for row in self.rows]
        assert self.state.embargoed.tolist() == [
            row[0] == S.CULLED and row[2] < self.embargo for row in self.rows
        ]


TestLife = Life.TestCase


# Epochs and alpha.


def test_epochs_count_for_seeds_that_are_not_dormant_and_stop_at_int16() -> None:
    state = StateTensor(3)
    state.set_rows([1, 2], lifecycle_state=S.TRAINING)
    state.set_rows(2, epochs_in_state=32_766)
    for expected in ([0, 1, 32_767], [0, 2, 32_767], [0, 3, 32_767]):
        state.increment_epochs()
        assert state.state_tensor[:, 2].tolist() == expected


@given(st.floats(allow_nan=False))
def test_alpha_is_clamped(value: float) -> None:
    state = StateTensor(2)
    state.set_alpha(1, value)
    expected = float(torch.tensor(min(1.0, max(0.0, value)), dtype=torch.float32))
    assert state.alpha.tolist() == [0.0, expected]


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor([2.0, -1.0, 0.5]),
        torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64),
        torch.tensor([2.0, -1.0, 0.5], requires_grad=True),
        [2.0, -1.0, 0.5],
    ],
)
def test_alphas_of_several_seeds(alpha: Any) -> None:
    state = StateTensor(4)
    state.set_alpha([3, 0, 1], alpha)
    assert state.alpha.tolist() == [0.0, 0.5, 0.0, 1.0]
    assert not state.alpha.requires_grad
    state.set_alpha([0, 1], torch.tensor([0.25]))
    state.set_alpha([2], torch.tensor(0.75))
    assert state.alpha.tolist() == [0.25, 0.25, 0.75, 1.0]


# Publishing.


def test_a_transaction_publishes_once_and_at_its_end() -> None:
    state = StateTensor(3)
    published: list[list[int]] = []
    state.on_publish = lambda moved: published.append(state.state_tensor[:, 0].tolist())
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
    state.on_publish = published.append
    before, tensor = _frozen(state), state.state_tensor

    def fail() -> None:
        with state.transaction():
            state.advance([0, 2], S.GERMINATED)
            state.set_alpha(1, 1.0)
            state.advance(1, S.CULLED)
            state.increment_epochs()
            raise error

    with pytest.raises(error):
        fail()
    assert _frozen(state) == before
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
    before, tensor = _frozen(state), state.state_tensor

    def fail() -> None:
        with state.transaction():
            with state.transaction():
                state.advance(0, S.GERMINATED)
            state.set_alpha(0, 1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _frozen(state) == before
    assert state.state_tensor is tensor


def test_a_listener_hears_whether_rows_changed() -> None:
    state = StateTensor(2)
    heard: list[bool] = []
    state.on_publish = heard.append
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
    state.on_publish = heard.append
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
    before = _frozen(state)
    with state.transaction():
        state.advance(0, S.GERMINATED)
        with state.transaction():
            state.advance(1, S.CULLED)
        assert state.stages.tolist() == [1, 8, 0]
        assert state.alphas.tolist() == [0, 0, 0]
        assert _in_a_thread(lambda: _frozen(state)) == before
        assert _in_a_thread(lambda: state.get_seed_state(1))["alpha"] == 0.5
        assert _in_a_thread(lambda: state.blended.tolist()) == [False, True, False]
    assert _in_a_thread(lambda: state.stages.tolist()) == [1, 8, 0]
    assert _in_a_thread(lambda: state.alphas.tolist()) == [0, 0, 0]


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


# Alphas that the device computed.


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
    _leave_to_the_device(state)
    known = state.alphas
    assert known.tolist() == [0.25, 0.5, 0.75]
    assert known.data_ptr() != state.alpha.data_ptr()
    assert state.alphas is known
    assert state.get_seed_state(2)["alpha"] == 0.75


def test_setting_alpha_leaves_what_the_device_alone_knows() -> None:
    state = StateTensor(4)
    state.set_device_alpha(torch.tensor([0.25, 0.5, 0.75, 1.0]))
    _leave_to_the_device(state)
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
    _leave_to_the_device(state)
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
    _leave_to_the_device(state)
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
    _leave_to_the_device(state)
    assert _in_a_thread(lambda: state.alphas.tolist()) == [0.25, 0.5]
    with state.transaction():
        state.set_alpha(0, 1.0)
        assert _in_a_thread(lambda: state.alphas.tolist()) == [0.25, 0.5]


# As a module.


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
    assert _frozen(fresh) == _frozen(state)
    fresh.advance(1, S.CULLED)
    assert saved["state_tensor"].tolist() == state.state_tensor.tolist()  # not aliased


def test_a_copy_has_a_state_of_its_own() -> None:
    state = StateTensor(3)
    state.on_publish = lambda moved: None
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert twin.on_publish is None
        assert state.on_publish is not None
        twin.advance(0, S.GERMINATED)
        twin.set_alpha(0, 0.5)
        assert _frozen(state) == _frozen(StateTensor(3))
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
    graft(layer, [0], alpha=0.5)
    layer.state.set_lifecycle_state(0, stage)
    assert layer.seeds[0].alpha == 0
    assert (layer.seeds[0].blueprint_id == 0) == (stage is SeedLifecycle.DORMANT)
    layer.load_state_dict(layer.state_dict())
