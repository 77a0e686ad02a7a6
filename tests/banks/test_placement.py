"""Who sits where, derived from ids and stages alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kasmina_fx import SeedLifecycle
from kasmina_fx.banks.placement import Placement, derive, slots_of
from kasmina_fx.lifecycle import Mode

S = SeedLifecycle
NOBODY = torch.zeros(0, dtype=torch.int64)


def placed(
    ids: list[int], stages: list[S], held: list[int], froze: list[int] | None = None, **options: Any
) -> Placement:
    return derive(
        torch.tensor(ids),
        torch.tensor([int(stage) for stage in stages]),
        torch.tensor(held),
        shared=options.pop("shared", False),
        froze=torch.tensor(froze or [], dtype=torch.int64),
        **options,
    )


def test_an_id_of_nobody_is_in_no_slot() -> None:
    assert slots_of(torch.tensor([0, 5, 7]), torch.tensor([0, 5, 0])).tolist() == [-1, 1, -1]
    assert slots_of(NOBODY, torch.tensor([1, 2])).tolist() == []


def test_slots_that_no_seed_holds_are_free_unless_they_are_shared() -> None:
    ids, stages = [5, 6, 0], [S.GRAFTING, S.CULLED, S.DORMANT]
    own = placed(ids, stages, [6, 5, 0])
    assert own.held.tolist() == [0, 5, 0]
    assert own.left == {0}
    shared = placed(ids, stages, [6, 5, 0], shared=True)
    assert shared.held.tolist() == [6, 5, 0]
    assert shared.left == frozenset()


def test_seeds_and_positions_are_inverse() -> None:
    now = placed([5, 6, 7], [S.GRAFTING, S.GERMINATED, S.FOSSILIZED], [7, 6, 5])
    assert now.tables.seeds.tolist() == [[2], [-1], [0]]
    assert now.tables.positions.tolist() == [2, -1, 0]
    assert now.tables.modes.tolist() == [[Mode.FROZEN], [Mode.FROZEN], [Mode.LEARNS]]
    assert now.frozen.tolist() == [True, True, False]


def test_a_shared_slot_is_frozen_only_if_all_of_its_seeds_are() -> None:
    stages = [S.STABILIZATION, S.GRAFTING]
    assert placed([5, 5], stages, [5, 0], shared=True).frozen.tolist() == [False, False]
    stages = [S.STABILIZATION, S.FOSSILIZED]
    assert placed([5, 5], stages, [5, 0], shared=True).frozen.tolist() == [True, False]


@pytest.mark.parametrize(
    ("stage", "froze", "starts"),
    [
        (S.TRAINING, [5], [0]),
        (S.TRAINING, [], []),  # it trained before
        (S.GRAFTING, [5], []),  # it goes on with what it learnt
        (S.STABILIZATION, [5], []),
    ],
)
def test_slots_start_that_reconstruct_and_were_frozen(
    stage: S, froze: list[int], starts: list[int]
) -> None:
    assert placed([5, 0], [stage, S.DORMANT], [5, 0], froze).starts.tolist() == starts


def test_sizes_are_rounded_up_where_asked() -> None:
    ids, stages = [1, 2, 3, 4, 5], [S.TRAINING] * 5
    held = [1, 2, 3, 4, 5, 0, 0, 0, 0, 0]
    exact, padded = placed(ids, stages, held), placed(ids, stages, held, pad=True)
    assert (exact.tables.seeds.shape, exact.tables.trainees.shape) == ((5, 1), (5,))
    assert (padded.tables.seeds.shape, padded.tables.trainees.shape) == ((8, 1), (8,))
    assert padded.tables.trainees.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    few = placed([1], [S.DORMANT], [0, 0])
    assert (few.tables.seeds.shape, few.tables.trainees.tolist()) == ((2, 1), [-1, -1])
