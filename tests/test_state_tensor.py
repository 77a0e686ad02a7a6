"""The state of seeds: columns, ranges, transitions, and that changes show whole or not at all."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

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
    SeedLifecycle,
    StateTensor,
)
from kasmina_fx.lifecycle import (
    BLENDED,
    HOLDS_BLUEPRINT,
    LEGAL,
    REACHABLE,
    holds_blueprint,
    is_blended,
    is_legal,
)

S = SeedLifecycle
stages = pytest.mark.parametrize("stage", SeedLifecycle, ids=lambda stage: stage.name)


def _frozen(state: StateTensor) -> tuple[Any, ...]:
    return (
        state.state_tensor.tolist(),
        state.alpha.tolist(),
        state._mirror.tolist(),
        state.alphas.tolist(),
    )


def _any(value: Any) -> Any:
    """What the types would refuse too."""
    return value


# The lifecycle.


def test_stages_and_their_numbers() -> None:
    assert [stage.name for stage in SeedLifecycle] == [
        "DORMANT",
        "GERMINATED",
        "TRAINING",
        "GRAFTING",
        "STABILIZATION",
        "EVALUATING",
        "FINE_TUNING",
        "FOSSILIZED",
        "CULLED",
        "CANCELLED",
        "ROLLED_BACK",
    ]
    assert [int(stage) for stage in SeedLifecycle] == list(range(11))


def test_the_legal_transitions_are_those_of_the_design() -> None:
    text = """DORMANT>GERMINATED; GERMINATED>TRAINING|CANCELLED;
    TRAINING>GRAFTING|CULLED|CANCELLED|ROLLED_BACK; GRAFTING>STABILIZATION|CULLED|ROLLED_BACK;
    STABILIZATION>EVALUATING|ROLLED_BACK; EVALUATING>FINE_TUNING|CULLED|ROLLED_BACK;
    FINE_TUNING>FOSSILIZED|CULLED|ROLLED_BACK; CULLED>DORMANT; CANCELLED>DORMANT;
    FOSSILIZED>; ROLLED_BACK>"""
    by_name = {stage.name: stage for stage in SeedLifecycle}
    expected = {}
    for part in text.split(";"):
        source, _, targets = part.strip().partition(">")
        expected[by_name[source]] = frozenset(by_name[n] for n in targets.split("|") if n)
    assert expected == LEGAL


@stages
def test_the_vectorised_rules_equal_the_tables(stage: SeedLifecycle) -> None:
    all_stages = torch.arange(len(SeedLifecycle), dtype=torch.int32)
    assert is_legal(all_stages, stage).tolist() == [stage in LEGAL[now] for now in SeedLifecycle]
    one = torch.tensor([stage], dtype=torch.int32)
    assert bool(is_blended(one)) == (stage in BLENDED)
    assert bool(holds_blueprint(one)) == (stage in HOLDS_BLUEPRINT)
    assert stage not in BLENDED or 3 <= stage <= 7


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


# Transitions.


@stages
@pytest.mark.parametrize("now", SeedLifecycle, ids=lambda stage: stage.name)
def test_advance_takes_the_legal_transitions_that_this_release_reaches(
    now: SeedLifecycle, stage: SeedLifecycle
) -> None:
    state = StateTensor(3, name="fc")
    state.set_rows([0, 2], lifecycle_state=now, blueprint_id=7, epochs_in_state=4)
    state.set_rows([0, 2], grafting_strategy=1)
    state.set_alpha([0, 2], 0.5)
    before = _frozen(state)
    if stage in LEGAL[now] and stage in REACHABLE:
        state.advance([0, 2], stage)
        dormant = stage is S.DORMANT
        row = [int(stage), 0 if dormant else 7, 0, 0 if dormant else 1]
        assert state.state_tensor.tolist() == [row, [0] * 4, row]
        alpha = 0.0 if stage in (S.DORMANT, S.CULLED, S.CANCELLED) else 0.5
        assert state.alpha.tolist() == [alpha, 0.0, alpha]
    else:
        with pytest.raises(IllegalTransition) as caught:
            state.advance([0, 2], stage)
        message = str(caught.value)
        assert message.startswith(f"fc: seed 0 can't go from {now.name} to {stage.name}")
        for name in sorted(s.name for s in LEGAL[now] & REACHABLE) or ["none"]:
            assert name in message.partition("legal from")[2]
        assert _frozen(state) == before


@pytest.mark.parametrize("bad", [0, 57, 99])
def test_one_illegal_of_many_changes_nothing(bad: int) -> None:
    state = StateTensor(100, name="fc")
    others = [i for i in range(100) if i != bad]
    state.advance(others, S.GERMINATED)
    before, tensor = _frozen(state), state.state_tensor
    with pytest.raises(IllegalTransition, match=f"seed {bad} .*DORMANT to TRAINING"):
        state.advance(range(100), S.TRAINING)
    assert _frozen(state) == before
    assert state.state_tensor is tensor
    state.advance(others, S.TRAINING)


class Life(RuleBasedStateMachine):
    """The state tensor against lists of plain ints."""

    @initialize(n=st.integers(1, 6))
    def begin(self, n: int) -> None:
        self.state = StateTensor(n)
        self.rows = [[0, 0, 0, 0] for _ in range(n)]
        self.alpha = [0.0] * n

    def _ids(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.integers(0, len(self.rows) - 1), unique=True))

    @rule(data=st.data(), to=st.sampled_from(SeedLifecycle))
    def advance(self, data: st.DataObject, to: SeedLifecycle) -> None:
        ids = self._ids(data)
        if ids and not all(to in LEGAL[S(self.rows[i][0])] & REACHABLE for i in ids):
            with pytest.raises(IllegalTransition):
                self.state.advance(ids, to)
            return
        self.state.advance(ids, to)
        for i in ids:
            kept = [0, 0] if to is S.DORMANT else [self.rows[i][1], self.rows[i][3]]
            self.rows[i] = [int(to), kept[0], 0, kept[1]]
            if to in (S.DORMANT, S.CULLED, S.CANCELLED):
                self.alpha[i] = 0.0

    @rule(data=st.data(), stage=st.sampled_from(SeedLifecycle), blueprint=st.integers(0, 9))
    def put(self, data: st.DataObject, stage: SeedLifecycle, blueprint: int) -> None:
        ids = self._ids(data)
        self.state.set_rows(ids, lifecycle_state=stage, blueprint_id=blueprint)
        for i in ids:
            self.rows[i][:2] = [int(stage), blueprint]

    @rule(data=st.data(), value=st.floats(-1, 2, width=32))
    def blend(self, data: st.DataObject, value: float) -> None:
        ids = self._ids(data)
        self.state.set_alpha(ids, value)
        for i in ids:
            self.alpha[i] = min(1.0, max(0.0, value))

    @rule()
    def epoch(self) -> None:
        self.state.increment_epochs()
        for row in self.rows:
            row[2] = min(32_767, row[2] + (row[0] != 0))

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
        fresh = StateTensor(len(self.rows))
        fresh.load_state_dict(self.state.state_dict())
        fresh.refresh_mirror()
        self.state = fresh

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "state"):
            return
        assert self.state.state_tensor.tolist() == self.state._mirror.tolist() == self.rows
        assert self.state.alpha.tolist() == self.state.alphas.tolist() == self.alpha
        blended = [row[0] in BLENDED and row[1] > 0 for row in self.rows]
        assert self.state.blended.tolist() == blended


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
    state.on_publish = lambda: published.append(state.state_tensor[:, 0].tolist())
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
    published: list[int] = []
    state.on_publish = lambda: published.append(1)
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
    assert published == [1]


def test_published_tensors_are_new_objects() -> None:
    state = StateTensor(3)
    old_state, old_alpha = state.state_tensor, state.alpha
    mirror = state._mirror
    state.advance(1, S.GERMINATED)
    state.set_alpha(1, 0.5)
    assert old_state.tolist() == [[0] * 4] * 3
    assert old_alpha.tolist() == [0.0] * 3
    assert state.state_tensor is not old_state
    assert state.alpha is not old_alpha
    assert state.state_tensor.data_ptr() != mirror.data_ptr()
    assert state.alpha.data_ptr() != state.alphas.data_ptr()
    assert dict(state.named_buffers()).keys() == {"state_tensor", "alpha"}


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
    state.on_publish = lambda: None
    twin = copy.deepcopy(state)
    assert twin.on_publish is None
    assert state.on_publish is not None
    twin.advance(0, S.GERMINATED)
    assert state.stages.tolist() == [0, 0, 0]
    assert twin.stages.tolist() == [1, 0, 0]


def test_casting_a_model_keeps_int32_and_float32() -> None:
    state = StateTensor(3)
    state.set_alpha(0, 0.3)
    nn.Sequential(state).to(torch.bfloat16)
    assert state.state_tensor.dtype == torch.int32
    assert state.alpha.dtype == torch.float32
    assert state.alpha[0] == torch.tensor(0.3)


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
