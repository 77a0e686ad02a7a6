"""The eleven stages: every transition, and what a stage means for a seed's blueprint."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
import torch
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
from kasmina_fx.config import SeedConfig
from kasmina_fx.lifecycle import (
    BLENDED,
    DEFAULT_EMBARGO,
    HOLDS_BLUEPRINT,
    LEARNS_TASK,
    LEGAL,
    RECONSTRUCTS,
    RUNS,
    Mode,
    holds_blueprint,
    is_blended,
    is_legal,
    modes,
    runs,
)
from kasmina_fx.testing import graft

S = SeedLifecycle

#: Row by row who may follow, as the public names were promised.
TABLE: Final = {
    S.DORMANT: {S.GERMINATED},
    S.GERMINATED: {S.TRAINING, S.CANCELLED},
    S.TRAINING: {S.GRAFTING, S.CULLED, S.CANCELLED, S.ROLLED_BACK},
    S.GRAFTING: {S.STABILIZATION, S.CULLED, S.ROLLED_BACK},
    S.STABILIZATION: {S.EVALUATING, S.ROLLED_BACK},
    S.EVALUATING: {S.FINE_TUNING, S.CULLED, S.ROLLED_BACK},
    S.FINE_TUNING: {S.FOSSILIZED, S.CULLED, S.ROLLED_BACK},
    S.FOSSILIZED: set[SeedLifecycle](),
    S.CULLED: {S.DORMANT},
    S.CANCELLED: {S.DORMANT},
    S.ROLLED_BACK: set[SeedLifecycle](),
}

#: From DORMANT to each stage, by legal steps.
WAY: Final = (
    S.GERMINATED,
    S.TRAINING,
    S.GRAFTING,
    S.STABILIZATION,
    S.EVALUATING,
    S.FINE_TUNING,
    S.FOSSILIZED,
)
PATHS: Final = {S.DORMANT: WAY[:0]} | {stage: WAY[: i + 1] for i, stage in enumerate(WAY)}
PATHS[S.CULLED], PATHS[S.CANCELLED] = (*WAY[:3], S.CULLED), (S.GERMINATED, S.CANCELLED)
PATHS[S.ROLLED_BACK] = (*WAY[:3], S.ROLLED_BACK)

NO_EMBARGO: Final = SeedConfig(embargo_epochs=0)


def _name(stage: SeedLifecycle) -> str:
    return stage.name


stages = pytest.mark.parametrize("stage", SeedLifecycle, ids=_name)
nows = pytest.mark.parametrize("now", SeedLifecycle, ids=_name)  # times 11 in a loop, for speed


def _layer(**kwargs: Any) -> KasminaLayer:
    return KasminaLayer(nn.Linear(4, 6), 3, layer_id="fc", **kwargs)


def _bring(layer: KasminaLayer, seeds: Sequence[int], stage: SeedLifecycle) -> None:
    """Dormant seeds to a stage, by legal steps."""
    for step in PATHS[stage]:
        if step is S.GERMINATED:
            assert layer.request_germination(seeds, "affine", 1)
        else:
            layer.advance(seeds, step)
    layer.set_alpha(seeds, 0.0 if stage in (S.DORMANT, S.CULLED, S.CANCELLED) else 0.5)


def _all(layer: KasminaLayer) -> list[Any]:
    """Everything that a refused change must leave alone."""
    state, published = layer.state, layer.kasmina.shown
    tensors = [*layer.state_dict().values(), state.rows, state.alphas]
    tensors += [*published.layer, *published.seeds, *published.positions, *published.modes]
    held = [bank.held.tolist() for bank in layer.kasmina.bank_list()]
    return [t.tolist() for t in tensors if isinstance(t, Tensor)] + held


# The tables.


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


def test_the_legal_transitions_are_those_promised() -> None:
    assert {now: set(after) for now, after in LEGAL.items()} == TABLE


@stages
def test_the_vectorised_rules_equal_the_tables(stage: SeedLifecycle) -> None:
    everything = torch.arange(len(SeedLifecycle), dtype=torch.int32)
    assert is_legal(everything, stage).tolist() == [stage in TABLE[now] for now in SeedLifecycle]
    one = torch.tensor([stage], dtype=torch.int32)
    assert bool(is_blended(one)) == (stage in BLENDED)
    assert bool(holds_blueprint(one)) == (stage in HOLDS_BLUEPRINT)
    assert bool(runs(one)) == (stage in RUNS)
    learns, reconstructs = stage in LEARNS_TASK, stage in RECONSTRUCTS
    expected = Mode.LEARNS if learns else Mode.RECONSTRUCTS if reconstructs else Mode.FROZEN
    assert int(modes(one)) == expected


def test_what_each_stage_means() -> None:
    assert {S(i) for i in range(3, 8)} == BLENDED
    assert {S(i) for i in range(1, 8)} | {S.ROLLED_BACK} == HOLDS_BLUEPRINT
    assert {S(i) for i in range(2, 8)} == RUNS
    assert {S.GRAFTING, S.FINE_TUNING} == LEARNS_TASK
    assert {S.TRAINING} == RECONSTRUCTS


# All 121 transitions, on the state, the layer and the seed.


@nows
def test_a_state_tensor_takes_the_legal_transitions_and_no_others(now: SeedLifecycle) -> None:
    for to in SeedLifecycle:
        state = StateTensor(3, name="fc")
        state.set_rows([0, 2], lifecycle_state=now, blueprint_id=7, grafting_strategy=1)
        state.set_rows([0, 2], epochs_in_state=DEFAULT_EMBARGO)
        state.set_alpha([0, 2], 0.5)
        rows, alphas, tensor = state.rows.tolist(), state.alphas.tolist(), state.state_tensor
        if to in TABLE[now]:
            state.advance([0, 2], to)
            dormant = to is S.DORMANT
            row = [int(to), 0 if dormant else 7, 0, 0 if dormant else 1]
            assert state.state_tensor.tolist() == state.rows.tolist() == [row, [0] * 4, row]
            alpha = 0.0 if to in (S.DORMANT, S.CULLED, S.CANCELLED) else 0.5
            assert state.alpha.tolist() == state.alphas.tolist() == [alpha, 0.0, alpha]
            continue
        with pytest.raises(IllegalTransition) as caught:
            state.advance([0, 2], to)
        message, error = str(caught.value), caught.value
        assert message.startswith(f"fc: seed 0 can't go from {now.name} to {to.name}")
        for name in sorted(s.name for s in TABLE[now]) or ["none"]:
            assert name in message.partition("legal from")[2]
        assert (error.seed, error.source, error.target) == (0, now, to)
        assert error.legal == tuple(sorted(TABLE[now]))
        assert (state.rows.tolist(), state.alphas.tolist()) == (rows, alphas)
        assert state.state_tensor is tensor


def _by_layer(layer: KasminaLayer, to: SeedLifecycle) -> None:
    layer.advance([0, 2], to)


def _by_number(layer: KasminaLayer, to: SeedLifecycle) -> None:
    layer.advance(torch.tensor([0, 2]), int(to))


def _by_seed(layer: KasminaLayer, to: SeedLifecycle) -> None:
    for seed in (layer.seeds[0], layer.seeds[2]):
        seed.advance(to)


@pytest.mark.parametrize("advance", [_by_layer, _by_number, _by_seed])
@nows
def test_layers_and_their_seeds_take_the_legal_transitions_and_no_others(
    now: SeedLifecycle, advance: Callable[[KasminaLayer, SeedLifecycle], None]
) -> None:
    fresh = _layer(config=NO_EMBARGO)
    _bring(fresh, [0, 2], now)
    before, ids = _all(fresh), fresh.state.blueprint_ids.tolist()
    for to in TABLE[now]:
        layer = copy.deepcopy(fresh)
        advance(layer, to)
        assert [seed.stage for seed in layer.seeds] == [to, S.DORMANT, to]
        assert layer.state.blueprint_ids.tolist() == ([0, 0, 0] if to is S.DORMANT else ids)
        holds = to in HOLDS_BLUEPRINT
        assert layer.state.holding.tolist() == [holds, False, holds]
        has_slot = holds and bool(ids[0])  # advance() alone allocates nothing
        assert [layer.bank_of(seed) is not None for seed in range(3)] == [has_slot, False, has_slot]
    for to in set(SeedLifecycle) - TABLE[now]:
        with pytest.raises(IllegalTransition, match=f"fc: seed 0 .*{now.name} to {to.name}") as e:
            advance(fresh, to)
        assert (e.value.seed, e.value.source, e.value.target) == (0, now, to)
        assert e.value.legal == tuple(sorted(TABLE[now]))
        assert _all(fresh) == before


@pytest.mark.parametrize("bad", [0, 57, 99])
def test_one_illegal_of_many_changes_nothing(bad: int) -> None:
    layer = KasminaLayer(nn.Linear(4, 100), 100, layer_id="fc")
    others = [i for i in range(100) if i != bad]
    assert layer.request_germination(others, "affine")
    before, tensor, published = _all(layer), layer.state.state_tensor, layer.kasmina.shown
    with pytest.raises(IllegalTransition, match=f"seed {bad} .*DORMANT to TRAINING") as caught:
        layer.advance(range(100), S.TRAINING)
    assert caught.value.seed == bad
    assert _all(layer) == before
    assert layer.state.state_tensor is tensor
    assert layer.kasmina.shown is published
    layer.advance(others, S.TRAINING)


def test_the_first_seed_given_is_the_one_named() -> None:
    state = StateTensor(4)
    state.advance([1, 3], S.GERMINATED)
    with pytest.raises(IllegalTransition, match="seed 2 ") as caught:
        state.advance([3, 2, 1, 0], S.TRAINING)
    assert caught.value.seed == 2
    assert isinstance(caught.value, KasminaError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("stage", [11, -1, "ASLEEP", None, 1.5, True])
def test_what_is_no_stage_is_refused(stage: Any) -> None:
    layer = _layer()
    with pytest.raises((InvalidArgument, InvalidType), match=r"fc: stage .*DORMANT"):
        layer.advance(0, stage)


def test_a_stage_may_be_given_by_its_name() -> None:
    layer = _layer()
    layer.request_germination(0)
    layer.advance(0, "TRAINING")
    assert layer.state.find_seeds_by_state("TRAINING").tolist() == [0]


def test_nobody_may_go_anywhere() -> None:
    layer = _layer()
    layer.advance([], S.FOSSILIZED)
    assert layer.state.stages.tolist() == [0, 0, 0]


# Cancelling and resetting.


@stages
def test_cancelling_is_for_seeds_that_did_not_reach_the_host(stage: SeedLifecycle) -> None:
    layer = _layer(config=NO_EMBARGO)
    _bring(layer, [0], stage)
    _bring(layer, [2], S.TRAINING)
    before = _all(layer)
    if stage in (S.GERMINATED, S.TRAINING):
        assert layer.cancel_germination([0, 2])
        assert layer.state.stages.tolist() == [S.CANCELLED, 0, S.CANCELLED]
        assert layer.state.alpha.tolist() == [0, 0, 0]
        assert layer.bank_of(0) is None
    else:
        assert not layer.cancel_germination([2, 0])
        assert _all(layer) == before


@stages
def test_reset_leads_from_any_stage_to_a_seed_as_new(stage: SeedLifecycle) -> None:
    layer = _layer()  # with an embargo, which reset does not wait for
    _bring(layer, [0, 1], stage)
    layer.reset(0)
    assert layer.state.rows[0].tolist() == [0, 0, 0, 0]
    assert layer.state.alpha[0] == 0
    assert layer.state.stages.tolist() == [S.DORMANT, stage, S.DORMANT]
    assert layer.bank_of(0) is None
    held = [int((bank.held > 0).sum()) for bank in layer.kasmina.bank_list()]
    assert sum(held) == (stage in HOLDS_BLUEPRINT)  # seed 1's alone
    assert layer.request_germination(0, "affine")


def test_reset_of_bad_ids_changes_nothing() -> None:
    layer = _layer()
    _bring(layer, [0], S.FOSSILIZED)
    before = _all(layer)
    with pytest.raises(KasminaError):
        layer.reset([0, 3])
    assert _all(layer) == before


# Blueprints over a life.


@pytest.mark.parametrize("end", [S.CULLED, S.CANCELLED], ids=_name)
def test_a_private_blueprint_that_ends_frees_its_slot(end: SeedLifecycle) -> None:
    layer = _layer()
    _bring(layer, [0, 1], S.TRAINING)
    (bank,) = layer.kasmina.bank_list()
    assert (bank.held > 0).tolist() == [True, True]
    layer.advance(0, end)
    assert (bank.held > 0).tolist() == [False, True]
    assert bank.slots.tolist() == bank.held.tolist()
    assert layer.bank_of(0) is None
    assert layer.seeds[0].blueprint_id > 0  # it says what was culled, until it is dormant
    capacity = bank.capacity
    _bring(layer, [2], S.TRAINING)
    assert bank.capacity == capacity  # the free slot is used again
    assert (bank.held > 0).tolist() == [True, True]


def test_a_shared_blueprint_outlives_its_seeds() -> None:
    layer = _layer()
    shared = layer.register_blueprint("affine")
    graft(layer, [0, 1], shared)
    (bank,) = layer.kasmina.bank_list()
    with torch.no_grad():
        bank.get_parameter("shift").fill_(3.0)
    layer.advance([0, 1], S.CULLED)
    assert bank.held.tolist() == [shared]
    graft(layer, 2, shared)
    held = layer.bank_of(2)
    assert held is not None
    assert held[0].slot_tensors(held[1])["shift"].tolist() == [3.0, 3.0]


def test_a_seed_that_was_rolled_back_keeps_its_blueprint_until_reset() -> None:
    layer = _layer()
    graft(layer, 0, "affine", 0.5)
    (bank,) = layer.kasmina.bank_list()
    with torch.no_grad():
        bank.get_parameter("shift")[0] = torch.tensor([2.0, 5.0])
    number, x = layer.seeds[0].blueprint_id, torch.randn(3, 4)
    layer.advance(0, S.ROLLED_BACK)
    _bring(layer, [1, 2], S.GRAFTING)  # makes the bank grow
    layer.advance([1, 2], S.CULLED)
    for _ in range(DEFAULT_EMBARGO + 1):
        layer.step_epoch()
    assert layer.state.rows[0].tolist() == [S.ROLLED_BACK, number, DEFAULT_EMBARGO + 1, 0]
    held = layer.bank_of(0)
    assert held is not None
    assert held[0].slot_tensors(held[1])["shift"].tolist() == [2.0, 5.0]
    assert torch.equal(layer(x), layer.base(x))  # for inspection alone
    layer.reset(0)
    assert layer.bank_of(0) is None
    assert not bank.held.any()


# Epochs.


def test_epochs_count_in_step_epoch_alone() -> None:
    layer = _layer()
    _bring(layer, [0], S.GRAFTING)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        layer.get_health_report()
        layer.set_alpha(0, 0.25)
    assert layer.state.epochs.tolist() == [0, 0, 0]
    layer.step_epoch()
    layer.step_epoch()
    assert layer.state.state_tensor[:, 2].tolist() == [2, 0, 0]
    layer.advance(0, S.STABILIZATION)
    assert layer.state.epochs.tolist() == [0, 0, 0]


def test_epochs_stop_at_what_int16_holds() -> None:
    layer = _layer()
    _bring(layer, [1, 2], S.TRAINING)
    layer.state.set_rows(2, epochs_in_state=32_766)
    for expected in ([0, 1, 32_767], [0, 2, 32_767], [0, 3, 32_767]):
        layer.step_epoch()
        assert layer.state.state_tensor[:, 2].tolist() == expected


# The embargo.


@pytest.mark.parametrize("embargo", [None, 1, 3])
def test_a_culled_seed_rests_and_becomes_dormant_by_itself(embargo: int | None) -> None:
    layer = _layer() if embargo is None else _layer(config=SeedConfig(embargo_epochs=embargo))
    _bring(layer, [0], S.CULLED)
    layer.step_epoch()
    _bring(layer, [2], S.CULLED)  # an epoch later
    left = (5 if embargo is None else embargo) - 1
    while left:
        with pytest.raises(IllegalTransition, match=f"none; its embargo lasts {left} epochs") as e:
            layer.advance(0, S.DORMANT)
        assert (e.value.seed, e.value.legal) == (0, ())
        assert not layer.request_germination(0, "affine")
        assert layer.seeds[0].stage is S.CULLED
        layer.step_epoch()
        left -= 1
    assert layer.state.rows[0].tolist() == [0, 0, 0, 0]
    assert layer.seeds[2].stage is S.CULLED
    layer.step_epoch()
    assert layer.state.rows.tolist() == [[0] * 4] * 3
    assert layer.request_germination([0, 2], "affine")


def test_without_an_embargo_a_culled_seed_may_become_dormant_at_once() -> None:
    layer = _layer(config=NO_EMBARGO)
    _bring(layer, [0], S.CULLED)
    layer.advance(0, S.DORMANT)
    assert layer.request_germination(0, "affine")


def test_without_an_embargo_a_culled_seed_becomes_dormant_at_the_next_epoch() -> None:
    layer = _layer(config=NO_EMBARGO)
    _bring(layer, [0], S.CULLED)
    layer.step_epoch()
    assert layer.seeds[0].stage is S.DORMANT


def test_a_state_dict_from_a_longer_embargo_leaves_no_seed_culled_for_good() -> None:
    patient, hasty = (_layer(config=SeedConfig(embargo_epochs=n)) for n in (9, 2))
    _bring(patient, [0], S.CULLED)
    for _ in range(4):
        patient.step_epoch()
    hasty.load_state_dict(patient.state_dict())
    hasty.step_epoch()
    assert hasty.seeds[0].stage is S.DORMANT


def test_only_culled_seeds_rest() -> None:
    layer = _layer()
    _bring(layer, [0], S.CANCELLED)
    layer.step_epoch()
    assert layer.seeds[0].stage is S.CANCELLED  # the controller decides
    layer.advance(0, S.DORMANT)
    assert layer.request_germination(0, "affine")


# Transactions of a layer.


def test_a_failed_transaction_gives_slots_back() -> None:
    layer = _layer(reserve=2)
    graft(layer, 0, None, 0.5)
    x, (bank,) = torch.randn(2, 4), layer.kasmina.bank_list()
    rows, held, out = layer.state.rows.tolist(), bank.held.tolist(), layer(x)

    def fail() -> None:
        with layer.transaction():
            layer.advance(0, S.CULLED)
            graft(layer, 1, None, 1.0)
            layer.reset(0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert layer.state.rows.tolist() == layer.state.state_tensor.tolist() == rows
    assert layer.state.alphas.tolist() == [0.5, 0, 0]
    assert bank.held.tolist() == held
    assert torch.equal(layer(x), out)
    graft(layer, 1, None, 1.0)
    assert [layer.bank_of(seed) is not None for seed in range(3)] == [True, True, False]


def test_a_failed_transaction_leaves_what_another_thread_did_meanwhile() -> None:
    layer = _layer(reserve=2)
    begun = threading.Event()

    def fail() -> None:
        begun.set()
        with pytest.raises(KeyError), layer.transaction():
            raise KeyError

    thread = threading.Thread(target=fail, daemon=True)
    with layer.state.transaction():
        thread.start()
        assert begun.wait(20)
        thread.join(0.2)  # now it waits for this transaction
        graft(layer, 0)
    thread.join(20)
    assert layer.seeds[0].stage is S.GRAFTING
    assert layer.bank_of(0) is not None
