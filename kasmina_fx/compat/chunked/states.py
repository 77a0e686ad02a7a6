"""The stages that chunked layers of older code know: five, and later eleven."""

from __future__ import annotations

from typing import Final, TypeAlias

import torch
from torch import Tensor

from kasmina_fx.compat.states import SeedLifecycleState
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.lifecycle import SeedLifecycle as Stage

#: The five, by the name that chunked layers have for them.
SeedLifecycle: TypeAlias = SeedLifecycleState
#: The eleven: kasmina_fx has the same ones.
ExtendedLifecycle: TypeAlias = Stage

_FIVE = SeedLifecycleState

#: What each of the eleven is among the five. Chunked layers blend while LOADING, by a ramp; so
#: LOADING is GRAFTING here, which :class:`~kasmina_fx.compat.SeedLifecycleState` calls ACTIVE.
STATES: Final[dict[Stage, SeedLifecycleState]] = {
    Stage.DORMANT: _FIVE.DORMANT,
    Stage.GERMINATED: _FIVE.LOADING,
    Stage.TRAINING: _FIVE.LOADING,
    Stage.GRAFTING: _FIVE.LOADING,
    Stage.STABILIZATION: _FIVE.ACTIVE,
    Stage.EVALUATING: _FIVE.ACTIVE,
    Stage.FINE_TUNING: _FIVE.ACTIVE,
    Stage.FOSSILIZED: _FIVE.FOSSILIZED,
    Stage.CULLED: _FIVE.ERROR_RECOVERY,
    Stage.CANCELLED: _FIVE.DORMANT,
    Stage.ROLLED_BACK: _FIVE.ERROR_RECOVERY,
}

#: The stage that each of the five means.
STAGES: Final[dict[SeedLifecycleState, Stage]] = {
    _FIVE.DORMANT: Stage.DORMANT,
    _FIVE.LOADING: Stage.GRAFTING,
    _FIVE.ACTIVE: Stage.FINE_TUNING,
    _FIVE.ERROR_RECOVERY: Stage.CULLED,
    _FIVE.FOSSILIZED: Stage.FOSSILIZED,
}

#: Which of the five may follow which, where transitions are asked for.
TRANSITIONS: Final[dict[SeedLifecycleState, frozenset[SeedLifecycleState]]] = {
    _FIVE.DORMANT: frozenset({_FIVE.LOADING}),
    _FIVE.LOADING: frozenset({_FIVE.ACTIVE, _FIVE.ERROR_RECOVERY}),
    _FIVE.ACTIVE: frozenset({_FIVE.FOSSILIZED, _FIVE.ERROR_RECOVERY}),
    _FIVE.ERROR_RECOVERY: frozenset({_FIVE.DORMANT}),
    _FIVE.FOSSILIZED: frozenset({_FIVE.DORMANT}),
}

#: Forwards of a ramp from alpha 0 to 1, and epochs that a seed rests in ERROR_RECOVERY.
RAMP: Final = 30
COOLDOWN: Final = 100

_TABLE: Final = torch.tensor([STATES[stage] for stage in Stage], dtype=torch.int32, device="cpu")


def five_of(stages: Tensor) -> Tensor:
    """Return what ``stages`` (int ``(n,)``, CPU) are among the five: int32 ``(n,)``."""
    return _TABLE[stages.long()]


def as_state(given: object) -> SeedLifecycleState:
    """Return one of the five, given as itself or by its number.

    Raises:
        InvalidArgument: Something else; lists the five.
    """
    try:
        return SeedLifecycleState(given)  # type: ignore[arg-type]  # that is what is asked
    except ValueError:
        allowed = ", ".join(f"{state.name} ({state.value})" for state in SeedLifecycleState)
        raise InvalidArgument(f"state {shown(given)}; allowed are {allowed}") from None
