"""The eleven stages: every transition, and what a stage means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from life_cases import NO_EMBARGO, S, bring, everything_of, nows, small_layer, stages
from torch import nn

from kasmina_fx import (
    IllegalTransition,
    InvalidArgument,
    InvalidType,
    KasminaError,
    KasminaLayer,
    SeedLifecycle,
    StateTensor,
)
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
    fresh = small_layer(config=NO_EMBARGO)
    bring(fresh, [0, 2], now)
    before, ids = everything_of(fresh), fresh.state.blueprint_ids.tolist()
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
        assert everything_of(fresh) == before


@pytest.mark.parametrize("bad", [0, 57, 99])
def test_one_illegal_of_many_changes_nothing(bad: int) -> None:
    layer = KasminaLayer(nn.Linear(4, 100), 100, layer_id="fc")
    others = [i for i in range(100) if i != bad]
    assert layer.request_germination(others, "affine")
    before, tensor, published = everything_of(layer), layer.state.state_tensor, layer.kasmina.shown
    with pytest.raises(IllegalTransition, match=f"seed {bad} .*DORMANT to TRAINING") as caught:
        layer.advance(range(100), S.TRAINING)
    assert caught.value.seed == bad
    assert everything_of(layer) == before
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
    layer = small_layer()
    with pytest.raises((InvalidArgument, InvalidType), match=r"fc: stage .*DORMANT"):
        layer.advance(0, stage)


def test_a_stage_may_be_given_by_its_name() -> None:
    layer = small_layer()
    layer.request_germination(0, "mlp")
    layer.advance(0, "TRAINING")
    assert layer.state.find_seeds_by_state("TRAINING").tolist() == [0]


def test_nobody_may_go_anywhere() -> None:
    layer = small_layer()
    layer.advance([], S.FOSSILIZED)
    assert layer.state.stages.tolist() == [0, 0, 0]


# Cancelling and resetting.


@stages
def test_cancelling_is_for_seeds_that_did_not_reach_the_host(stage: SeedLifecycle) -> None:
    layer = small_layer(config=NO_EMBARGO)
    bring(layer, [0], stage)
    bring(layer, [2], S.TRAINING)
    before = everything_of(layer)
    if stage in (S.GERMINATED, S.TRAINING):
        assert layer.cancel_germination([0, 2])
        assert layer.state.stages.tolist() == [S.CANCELLED, 0, S.CANCELLED]
        assert layer.state.alpha.tolist() == [0, 0, 0]
        assert layer.bank_of(0) is None
    else:
        assert not layer.cancel_germination([2, 0])
        assert everything_of(layer) == before


@stages
def test_reset_leads_from_any_stage_to_a_seed_as_new(stage: SeedLifecycle) -> None:
    layer = small_layer()  # with an embargo, which reset does not wait for
    bring(layer, [0, 1], stage)
    layer.reset(0)
    assert layer.state.rows[0].tolist() == [0, 0, 0, 0]
    assert layer.state.alpha[0] == 0
    assert layer.state.stages.tolist() == [S.DORMANT, stage, S.DORMANT]
    assert layer.bank_of(0) is None
    held = [int((bank.held > 0).sum()) for bank in layer.kasmina.bank_list()]
    assert sum(held) == (stage in HOLDS_BLUEPRINT)  # seed 1's alone
    assert layer.request_germination(0, "affine")


def test_reset_of_bad_ids_changes_nothing() -> None:
    layer = small_layer()
    bring(layer, [0], S.FOSSILIZED)
    before = everything_of(layer)
    with pytest.raises(KasminaError):
        layer.reset([0, 3])
    assert everything_of(layer) == before
