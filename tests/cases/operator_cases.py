"""A small bank's rows, tables and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kasmina_fx.lifecycle import Mode
from kasmina_fx.physical.operators import GUARD

F, L, R = Mode.FROZEN, Mode.LEARNS, Mode.RECONSTRUCTS


NAN, INF = float("nan"), float("inf")


def maps() -> tuple[Tensor, Tensor]:
    """Which of 5 seeds sits in each of 4 slots, and the inverse; some have no partner."""
    seeds = torch.tensor([4, 1, -1, 2])
    return seeds, torch.tensor([-1, 1, 3, -1, 0])


#: Slots: one that learns, one frozen, one in TRAINING, one free; 5 seeds, of which 2 are outside.
MODES = torch.tensor([[L], [F], [R], [F]])


POSITIONS = torch.tensor([2, -1, 0, -1, 1])


BLAMES = torch.ones(4, 1, dtype=torch.bool)


ALONE = torch.ones(5)
#: All of its places ran.
RAN = torch.ones(5, dtype=torch.bool)


def bank() -> list[Tensor]:
    """Rows ``(4, 1, 3, 2)`` and two parameters."""
    shapes = [(4, 1, 3, 2), (4, 2), (4, 2, 3)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def guarded(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    modes: Tensor = MODES,
    positions: Tensor = POSITIONS,
    blames: Tensor | None = None,
    less: Tensor | None = None,
) -> tuple[list[Tensor], list[float]]:
    """What reaches each of the tensors, and the faults."""
    faults = torch.zeros(len(positions), requires_grad=True)
    blames = torch.ones_like(modes, dtype=torch.bool) if blames is None else blames
    out = GUARD(list(tensors), modes, positions, faults, blames)
    given = [*grads, torch.zeros(len(modes)) if less is None else less]
    passed = torch.autograd.grad(out[:-1], [*tensors, faults], given)
    return list(passed[:-1]), passed[-1].tolist()


TRAINEES = torch.tensor([3, 1, -1, -1])
