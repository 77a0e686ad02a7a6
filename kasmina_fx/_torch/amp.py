"""Every private name of torch's automatic mixed precision that the package needs, and why."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Final, cast

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


def scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> torch.Tensor:
    """Return the tensor that holds a scaler's current scale, float32 ``()``, updated in place.

    A scaler makes it at its first ``scale()``; asking earlier makes it now, with the same value.
    """
    if not scaler.is_enabled():
        return torch.ones((), dtype=torch.float32, device=device)
    if scaler._scale is None:
        scaler._lazy_init_scale_growth_tracker(device)
    # .data: its version counter is another, so that a backward still to run may read what update()
    # has written to since.
    scale = cast("torch.Tensor", scaler._scale).data
    return scale.view(()) if scale.device == device else scale.to(device)


def steps_for(scaler: torch.amp.GradScaler, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Say whether a scaler is between ``unscale_()`` and ``update()`` for one of the optimizers."""
    return any(id(optimizer) in scaler._per_optimizer_states for optimizer in optimizers)


_STEP: Final = torch.amp.GradScaler.step.__code__


def stepping_scaler() -> torch.amp.GradScaler | None:
    """Return the enabled GradScaler whose ``step()`` this thread is in, if it is in any.

    A scaler knows its optimizers and no optimizer knows its scaler: torch calls ``optimizer.step``
    from ``scaler.step(optimizer)`` and hands nothing on. So the stack of calls is asked; subclasses
    call the method of the base class.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _STEP:
        frame = frame.f_back
    scaler = None if frame is None else frame.f_locals["self"]
    return scaler if scaler is not None and scaler.is_enabled() else None


#: What Dynamo writes around an autocast region inside a graph; arguments: device type, dtype,
#: enabled, cache.
ENTER_AUTOCAST = _enter_autocast
EXIT_AUTOCAST = _exit_autocast
