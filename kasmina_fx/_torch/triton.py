"""Private names around Triton: whether it is there, and how its kernels are launched."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch.library import wrap_triton


@cache
def has_triton() -> bool:
    """Say whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Say whether Triton's interpreter runs kernels, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def launches_on(device: torch.device) -> bool:
    """Say whether kernels can be launched on tensors of a device."""
    return has_triton() and (device.type == "cuda" or interprets())


def launching(module: str, name: str) -> Any:
    """Return a kernel of ``kasmina_fx.lowerings.triton``, wrapped so that a tracer sees it."""
    kernel = getattr(importlib.import_module(f"kasmina_fx.lowerings.triton.{module}"), name)
    # The interpreter's functions are no kernels that a tracer could see.
    return kernel if interprets() else wrap_triton(kernel)
