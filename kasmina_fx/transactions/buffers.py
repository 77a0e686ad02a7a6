"""Copies between host and device, and buffers whose dtype is not the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class Float32Module(nn.Module):
    """A module whose own float32 buffers stay float32, whatever dtype its model is converted to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {n: b for n, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, unannotated
        for name, old in before.items():
            new = self._buffers[name]
            if old.dtype == torch.float32 and new is not None and new.dtype != torch.float32:
                self._buffers[name] = old.to(new.device)
        return self


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a tensor on ``device`` that no later write to ``table`` reaches.

    From the CPU it is made in stream order, without a sync.
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
