"""The operators of a blend together: overloads, decompositions, and plain code in their place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import size_of
from kasmina_fx.lifecycle import Mode
from kasmina_fx.physical.gradients import in_use, of_slots
from kasmina_fx.physical.graph_inputs import NOTES as NOTE_ROWS
from kasmina_fx.physical.moves import gathered, pulled, unchecked
from kasmina_fx.physical.outcomes import mixed_outcomes, noted
from kasmina_fx.physical.programs import plain_operators
from kasmina_fx.physical.rows import beside
from kasmina_fx.physical.sense import SENSE_GRADIENT

PULL: Final = torch.ops.kasmina.pull.default
GATHER: Final = torch.ops.kasmina.gather.default
GUARD: Final = torch.ops.kasmina.guard.default
RECONSTRUCT: Final = torch.ops.kasmina.reconstruct.default
MIX: Final = torch.ops.kasmina.mix.default
NOTES: Final = torch.ops.kasmina.notes.default

#: For ``compile_fx(decompositions=...)``.
DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {
    PULL: partial(pulled, lookup=unchecked),
    GATHER: partial(gathered, lookup=unchecked),
    GUARD: lambda tensors, modes, positions, faults, blames: [
        *in_use(tensors),
        *of_slots(tensors, modes),
    ],
    RECONSTRUCT: lambda f, rows, trainees, loss_scale, alone, ran: f,
    MIX: partial(mixed_outcomes, lookup=unchecked),
    NOTES: partial(noted, lookup=unchecked),
    SENSE_GRADIENT: lambda y, squares, loss_scale, chunks, one_in, rows: y.clone(),
}


class Moves(NamedTuple):
    """Holds the operators that a blend is made of, or what stands for them.

    ``pull`` is in backward alone.
    """

    gather: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    guard: Callable[[list[Tensor], Tensor, Tensor, Tensor, Tensor], list[Tensor]]
    reconstruct: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    mix: Callable[..., tuple[Tensor, Tensor]]
    notes: Callable[..., Tensor]


def _plain_guard(
    tensors: list[Tensor], modes: Tensor, positions: Tensor, faults: Tensor, blames: Tensor
) -> list[Tensor]:
    rows, *params = in_use(tensors)
    learns = (modes != int(Mode.FROZEN)).any(1)
    trains = beside(modes == int(Mode.RECONSTRUCTS), rows)
    return [
        torch.where(trains, rows.detach(), rows),
        *(torch.where(beside(learns, p), p, p.detach()) for p in params),
        *of_slots(tensors, modes),
    ]


def _no_reconstruction(
    f: Tensor, rows: Tensor, trainees: Tensor, loss_scale: Tensor, alone: Tensor, ran: Tensor
) -> Tensor:
    return f


_OPERATORS: Final = Moves(GATHER, PULL, GUARD, RECONSTRUCT, MIX, NOTES)
_PLAIN: Final = Moves(
    gathered,
    pulled,
    _plain_guard,
    _no_reconstruction,
    partial(mixed_outcomes, by_mask=True),
    # Nobody asks for notes where these are run.
    lambda made, rows, ran, positions, alpha, roles: alpha.new_zeros(NOTE_ROWS, size_of(alpha, 0)),
)


def current() -> Moves:
    """Return the operators, or plain code with the same values where none may be recorded."""
    return _PLAIN if plain_operators() else _OPERATORS
