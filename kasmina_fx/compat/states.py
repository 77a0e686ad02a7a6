"""The five stages that older code knows, and the eleven that seeds have."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from kasmina_fx.lifecycle import SeedLifecycle


class SeedLifecycleState(IntEnum):
    """The stage of a seed, as older code names it.

    | of five | from the eleven | to the eleven |
    |---|---|---|
    | DORMANT | DORMANT, CANCELLED | DORMANT |
    | LOADING | GERMINATED, TRAINING | GERMINATED |
    | ACTIVE | GRAFTING, STABILIZATION, EVALUATING, FINE_TUNING | FINE_TUNING |
    | ERROR_RECOVERY | CULLED, ROLLED_BACK | CULLED |
    | FOSSILIZED | FOSSILIZED | FOSSILIZED |

    ACTIVE becomes FINE_TUNING, the stage that is in effect, may learn, and whose alpha no ramp
    moves. There and back is the identity on the five.
    """

    DORMANT = 0
    LOADING = 1
    ACTIVE = 2
    ERROR_RECOVERY = 3
    FOSSILIZED = 4


_S = SeedLifecycle
_OLD = SeedLifecycleState

#: What each of the eleven stages is for older code.
OLD_STATES: Final[dict[SeedLifecycle, SeedLifecycleState]] = {
    _S.DORMANT: _OLD.DORMANT,
    _S.GERMINATED: _OLD.LOADING,
    _S.TRAINING: _OLD.LOADING,
    _S.GRAFTING: _OLD.ACTIVE,
    _S.STABILIZATION: _OLD.ACTIVE,
    _S.EVALUATING: _OLD.ACTIVE,
    _S.FINE_TUNING: _OLD.ACTIVE,
    _S.FOSSILIZED: _OLD.FOSSILIZED,
    _S.CULLED: _OLD.ERROR_RECOVERY,
    _S.CANCELLED: _OLD.DORMANT,
    _S.ROLLED_BACK: _OLD.ERROR_RECOVERY,
}

#: The stage that older code means.
STAGES: Final[dict[SeedLifecycleState, SeedLifecycle]] = {
    _OLD.DORMANT: _S.DORMANT,
    _OLD.LOADING: _S.GERMINATED,
    _OLD.ACTIVE: _S.FINE_TUNING,
    _OLD.ERROR_RECOVERY: _S.CULLED,
    _OLD.FOSSILIZED: _S.FOSSILIZED,
}

_TABLE: Final = torch.tensor(
    [OLD_STATES[stage] for stage in SeedLifecycle], dtype=torch.uint8, device="cpu"
)


def old_states(stages: Tensor) -> Tensor:
    """Return what ``stages`` (int ``(n,)``, CPU) are for older code: uint8 ``(n,)``."""
    return _TABLE[stages.long()]
