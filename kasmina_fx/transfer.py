"""Tables between host and device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on ``device`` that no later write to ``table`` reaches.

    From the CPU in stream order, without a sync.
    """
    if (table.device.type, device.type) == ("cpu", "cuda"):
        # Pageable memory would make the copy wait for the device.
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device, copy=True)


def start_copy(values: Tensor) -> Callable[[], Tensor]:
    """Queue a copy to the CPU of what ``values`` holds now.

    The call that hands it out waits for the work queued before it, and for nothing else.
    """
    if values.device.type != "cuda":
        copied = values.detach().to("cpu", copy=True)
        return lambda: copied
    here = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    here.copy_(values.detach(), non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(values.device))

    def arrived() -> Tensor:
        done.synchronize()
        return here

    return arrived
