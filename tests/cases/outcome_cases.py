"""What two banks of a run made: one with a place a slot, one whose slots are shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kasmina_fx.lifecycle import Role

#: Which of five seeds sits where, and the inverse; the last two places of the shared bank: one is
#: free, and the slot of the other did not run.
SEEDS = [torch.tensor([[4], [1]]), torch.tensor([[0, 2], [-1, 3]])]
POSITIONS = [torch.tensor([-1, 1, -1, -1, 0]), torch.tensor([0, -1, 1, 3, -1])]
RAN = [torch.tensor([True, True]), torch.tensor([True, False])]
#: Seed 2 runs without being blended; seed 3 should be, but did not run.
ROLES = torch.tensor([Role.BLENDS, Role.BLENDS, Role.RUNS, Role.BLENDS, Role.BLENDS])
ALPHA = torch.tensor([0.5, 1.0, 0.25, 0.75, 0.0])
BLENDED = (0, 1, 4)


def made(dtype: torch.dtype = torch.float64, rest: tuple[int, ...] = (3, 2)) -> list[Tensor]:
    """What the blueprints of both banks made."""
    return [torch.randn(s.shape + rest).to(dtype).requires_grad_() for s in SEEDS]


def mix_arguments(
    dtype: torch.dtype = torch.float64, made_in: torch.dtype | None = None
) -> tuple[Any, ...]:
    """Arguments of ``mix``: chunks of two features, three rows."""
    host = torch.randn(3, 5, 2).to(dtype).requires_grad_()
    return host, made(made_in or dtype), RAN, POSITIONS, SEEDS, ALPHA, ROLES, -2


def notes_arguments(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Arguments of ``notes`` for the same banks."""
    rows = [f.detach() + 1 for f in made(dtype)]
    return made(dtype), rows, RAN, POSITIONS, ALPHA, ROLES


def of_seed(places: list[Tensor], seed: int) -> Tensor:
    """What stands in a seed's place, in whichever bank holds it."""
    (found,) = (
        t.flatten(0, 1)[int(index[seed])]
        for t, index in zip(places, POSITIONS, strict=True)
        if index[seed] >= 0
    )
    return found
