"""What multiplies the gradients of reconstruction losses: the scale of a GradScaler, or 1.

Training loops never see these losses, so that ``scaler.scale(loss)`` misses them, and yet
``scaler.step(optimizer)`` divides their gradients with all others. So the seeds of a model follow
the scaler that steps their optimizer.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from enum import Enum, auto
from typing import Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_fx._torch.amp import scale_of, stepping_scaler, steps_for

_LOG: Final = logging.getLogger(__name__)


class Change(Enum):
    """What a step of an optimizer says of the scaler that was followed until then."""

    NONE = auto()  #: it is the one that steps, or there is none
    FOUND = auto()  #: one steps, and none was followed: losses were not scaled
    LOST = auto()  #: losses were scaled by one that does not divide their gradients


class LossScale:
    """Which GradScaler the reconstruction losses of one model follow.

    A user may name it, or that there is none. Else it is learnt when it steps an optimizer of the
    model's, and let go of when that is stepped without it.
    """

    def __init__(self) -> None:
        self._scaler: weakref.ref[torch.amp.GradScaler] | None = None
        self._named = False

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler that is followed, if it is still alive."""
        return None if self._scaler is None else self._scaler()

    def name(self, scaler: torch.amp.GradScaler | None) -> None:
        """Follow this scaler, or none, from now on: the user says so."""
        self._follow(scaler)
        self._named = True

    def _follow(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = None if scaler is None else weakref.ref(scaler)

    def check(self, optimizers: Iterable[Optimizer]) -> Change:
        """Follow the scaler that divides the gradients, in a step of these optimizers."""
        if self._named:
            return Change.NONE
        followed, before = self._scaler is not None, self.scaler
        # unscale_() may be called without the scaler's step().
        known = before is not None and steps_for(before, optimizers)
        now = before if known else stepping_scaler()
        if now is before and followed == (now is not None):
            return Change.NONE
        self._follow(now)
        if before is not None:
            _LOG.warning(
                "the GradScaler that scaled reconstruction losses does not step this model's "
                "optimizer: they are not scaled by it from now on, and their gradients of this "
                "step are dropped; say so beforehand with follow_scaler(model, None)"
            )
        return Change.LOST if followed else Change.FOUND

    def tensor(self, default: Tensor) -> Tensor:
        """The scale as float32 ``()`` on the device of ``default``, which stands for no scaler."""
        scaler = self.scaler
        return default if scaler is None else scale_of(scaler, default.device)
