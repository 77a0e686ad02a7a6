"""The stages of a seed, and which may follow which.

    DORMANT -> GERMINATED -> TRAINING -> GRAFTING -> STABILIZATION -> EVALUATING -> FINE_TUNING
    -> FOSSILIZED

with CULLED, CANCELLED and ROLLED_BACK as ways out. One table, :data:`LEGAL`, is the truth;
everything that changes a stage asks it. A blueprint that starts as the identity may skip TRAINING:
:data:`LEGAL_FOR_IDENTITY`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from kasmina_fx.errors import InvalidArgument, InvalidType, shown


class SeedLifecycle(IntEnum):
    """The stage of a seed: column 0 of the state tensor."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10


def as_stage(given: SeedLifecycle | int | str, where: str) -> SeedLifecycle:
    """Return a stage given as itself, its number or its name.

    Raises:
        InvalidArgument, InvalidType: Something else; lists the stages.
    """
    allowed = ", ".join(f"{stage.name} ({stage.value})" for stage in SeedLifecycle)
    if isinstance(given, bool) or not isinstance(given, (int, str)):
        raise InvalidType(f"{where}: stage {shown(given)}; allowed are {allowed}")
    try:
        return SeedLifecycle[given] if isinstance(given, str) else SeedLifecycle(given)
    except (KeyError, ValueError):
        raise InvalidArgument(f"{where}: stage {shown(given)}; allowed are {allowed}") from None


class GraftingStrategy(IntEnum):
    """Says how alpha is to ramp: column 3 of the state tensor."""

    FIXED_RAMP = 0
    PERFORMANCE_LINKED = 1
    DRIFT_CONTROLLED = 2
    GRAD_NORM_GATED = 3


_S = SeedLifecycle

LEGAL: Final[dict[SeedLifecycle, frozenset[SeedLifecycle]]] = {
    _S.DORMANT: frozenset({_S.GERMINATED}),
    _S.GERMINATED: frozenset({_S.TRAINING, _S.CANCELLED}),
    _S.TRAINING: frozenset({_S.GRAFTING, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK}),
    _S.GRAFTING: frozenset({_S.STABILIZATION, _S.CULLED, _S.ROLLED_BACK}),
    _S.STABILIZATION: frozenset({_S.EVALUATING, _S.ROLLED_BACK}),
    _S.EVALUATING: frozenset({_S.FINE_TUNING, _S.CULLED, _S.ROLLED_BACK}),
    _S.FINE_TUNING: frozenset({_S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK}),
    _S.FOSSILIZED: frozenset(),
    _S.CULLED: frozenset({_S.DORMANT}),
    _S.CANCELLED: frozenset({_S.DORMANT}),
    _S.ROLLED_BACK: frozenset(),
}

#: What may follow as well where a blueprint starts as the identity: it has nothing to reconstruct.
LEGAL_FOR_IDENTITY: Final = {_S.GERMINATED: _S.GRAFTING}

#: Stages in which a seed with a blueprint is blended into the host's output.
BLENDED: Final = frozenset(
    {_S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED}
)

#: Stages in which a seed holds a blueprint of its own (and a slot for its parameters). What was
#: rolled back is kept for inspection until the seed is reset.
HOLDS_BLUEPRINT: Final = BLENDED | {_S.GERMINATED, _S.TRAINING, _S.ROLLED_BACK}

#: Stages in which a blueprint runs: it has a place in its bank's tables.
RUNS: Final = BLENDED | {_S.TRAINING}

#: Stages that end a seed's hold on its blueprint, and its blend.
LETS_GO: Final = (_S.DORMANT, _S.CULLED, _S.CANCELLED)

#: Stages whose blueprint learns from the model's loss, and those in which it learns to reconstruct
#: its chunk; in all others it is frozen.
LEARNS_TASK: Final = frozenset({_S.GRAFTING, _S.FINE_TUNING})
RECONSTRUCTS: Final = frozenset({_S.TRAINING})


#: Epochs in a stage fit int16.
MOST_EPOCHS: Final = 2**15 - 1
#: Epochs that a culled seed rests before it may germinate again.
DEFAULT_EMBARGO: Final = 5


class Mode(IntEnum):
    """Says what the graph does with a blueprint: a number in a bank's ``modes`` table."""

    FROZEN = 0
    LEARNS = 1
    RECONSTRUCTS = 2


class Role(IntEnum):
    """Says what a seed's blueprint does for its layer: a number in the layer's ``roles`` table."""

    IDLE = 0
    RUNS = 1
    BLENDS = 2


def _table(members: frozenset[SeedLifecycle]) -> Tensor:
    return torch.tensor([stage in members for stage in SeedLifecycle], device="cpu")


_LEGAL_TABLE: Final = torch.stack([_table(LEGAL[stage]) for stage in SeedLifecycle])
_BLENDED_TABLE: Final = _table(BLENDED)
_HOLDS_TABLE: Final = _table(HOLDS_BLUEPRINT)
_RUNS_TABLE: Final = _table(RUNS)
_MODE_TABLE: Final = torch.tensor(
    [
        Mode.RECONSTRUCTS if s in RECONSTRUCTS else Mode.LEARNS if s in LEARNS_TASK else Mode.FROZEN
        for s in SeedLifecycle
    ],
    device="cpu",
)


_ROLE_TABLE: Final = _RUNS_TABLE.long() + _BLENDED_TABLE.long()


def is_legal(stages: Tensor, to: SeedLifecycle) -> Tensor:
    """Say which of the ``stages`` (int ``(n,)``, CPU) may be followed by ``to``: bool ``(n,)``."""
    return _LEGAL_TABLE[stages.long(), int(to)]


def is_legal_for_identity(stages: Tensor, to: SeedLifecycle) -> Tensor:
    """Say which of the ``stages`` ``to`` may follow where a blueprint starts as the identity."""
    sources = [source for source, target in LEGAL_FOR_IDENTITY.items() if target is to]
    return torch.isin(stages.long(), torch.tensor(sources, dtype=torch.int64, device="cpu"))


def is_blended(stages: Tensor) -> Tensor:
    """Say in which of the ``stages`` (int ``(n,)``, CPU) a seed is blended: bool ``(n,)``."""
    return _BLENDED_TABLE[stages.long()]


def holds_blueprint(stages: Tensor) -> Tensor:
    """Say in which of the ``stages`` (int ``(n,)``, CPU) seeds hold a blueprint: bool ``(n,)``."""
    return _HOLDS_TABLE[stages.long()]


def runs(stages: Tensor) -> Tensor:
    """Say in which of the ``stages`` (int ``(n,)``, CPU) a seed's blueprint runs: bool ``(n,)``."""
    return _RUNS_TABLE[stages.long()]


def modes(stages: Tensor) -> Tensor:
    """Return int64 ``(n,)``: the :class:`Mode` of a seed in each of the ``stages`` (CPU)."""
    return _MODE_TABLE[stages.long()]


def roles(stages: Tensor) -> Tensor:
    """Return int64 ``(n,)``: the :class:`Role` of a seed in each of the ``stages`` (CPU)."""
    return _ROLE_TABLE[stages.long()]
