"""The state tensor's columns: what they take, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from state_cases import frozen

from kasmina_fx import (
    InvalidArgument,
    InvalidType,
    KasminaError,
    SeedLifecycle,
    StateTensor,
)

S = SeedLifecycle


def _any(value: Any) -> Any:
    """What the types would refuse too."""
    return value


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
        lambda s: s.advance(1, _any("ASLEEP")),
        InvalidArgument,
        "ASLEEP.*DORMANT",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_what_is_out_of_range_is_refused_and_nothing_is_written(
    call: Callable[[StateTensor], Any], error: type[Exception], message: str
) -> None:
    state = StateTensor(3, name="fc")
    state.set_rows([0, 1], lifecycle_state=1, blueprint_id=3, epochs_in_state=2)
    state.set_alpha(1, 0.25)
    before, tensor = frozen(state), state.state_tensor
    with pytest.raises(error, match=message) as caught:
        call(state)
    assert isinstance(caught.value, KasminaError)
    assert "fc" in str(caught.value)
    assert frozen(state) == before
    assert state.state_tensor is tensor


@pytest.mark.parametrize("num_seeds", [0, -1, 1.0, True, "3"])
def test_a_number_of_seeds_that_is_none_is_refused(num_seeds: Any) -> None:
    with pytest.raises(KasminaError, match="num_seeds"):
        StateTensor(num_seeds)


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


@pytest.mark.parametrize("epochs", [0, 1, 32_767])
def test_an_embargo_may_last_as_long_as_epochs_count(epochs: int) -> None:
    assert StateTensor(2, embargo_epochs=epochs).embargo_epochs == epochs
    for wrong in (-1, 32_768):
        with pytest.raises(InvalidArgument, match="from 0 to 32767"):
            StateTensor(2, embargo_epochs=wrong)
