"""Private names around Triton: whether it is there, and how its kernels are launched."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch.library import wrap_triton

from kasmina_fx._torch.launches import KERNELS, quicken_tracing


@cache
def has_triton() -> bool:
    """Say whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


#: Let kernels run on a CPU, where Triton's interpreter does it: slow, and for tests.
INTERPRET = False


def launches_on(device: torch.device) -> bool:
    """Say whether kernels can be launched on tensors of a device."""
    return has_triton() and (device.type == "cuda" or INTERPRET)


def launching(module: str, name: str, warps: int | None = None) -> Any:
    """Return a kernel of ``kasmina_fx.lowerings.triton``, wrapped so that a tracer sees it.

    ``warps`` are those of a program; None: as many as Triton takes by default.
    """
    if INTERPRET:
        return _kernel(module, name)  # no kernel that a tracer could see, and without warps
    quicken_tracing()
    return wrap_triton(_kernel(module, name) if warps is None else _tuned(module, name, warps))


def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{KERNELS}.{module}"), name)


@cache
def _tuned(module: str, name: str, warps: int) -> Any:
    """Return one object for all launches: of ``num_warps=`` torch makes a kernel a launch.

    Each of those it names, hashes and prints by itself: seconds of a deep model's first call.
    """
    from triton import Config, autotune

    return autotune(configs=[Config({}, num_warps=warps)], key=[])(_kernel(module, name))
