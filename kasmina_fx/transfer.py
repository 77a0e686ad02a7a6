"""Host tables to the device, in stream order and without a sync."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on ``device`` that no later write to ``table`` reaches."""
    if device.type == "cuda":  # pageable memory would make the copy wait for the device
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device, copy=True)
