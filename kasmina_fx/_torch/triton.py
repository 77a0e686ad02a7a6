"""Private names around Triton: whether it is there, and how its kernels are launched."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any, Final

import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch.library import wrap_triton

_KERNELS: Final = "kasmina_fx.lowerings.triton"


@cache
def has_triton() -> bool:
    """Say whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


#: Let kernels run on a CPU, where Triton's interpreter does it: slow, and for tests.
INTERPRET = False


def launches_on(device: torch.device) -> bool:
    """Say whether kernels can be launched on tensors of a device."""
    return has_triton() and (device.type == "cuda" or INTERPRET)


def launching(module: str, name: str) -> Any:
    """Return a kernel of ``kasmina_fx.lowerings.triton``, wrapped so that a tracer sees it."""
    kernel = getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)
    if INTERPRET:
        return kernel  # the interpreter's functions are no kernels that a tracer could see
    _remember_analyses()
    return wrap_triton(kernel)


@cache
def _remember_analyses() -> None:
    """Let torch analyse what one of our kernels writes once, and not for each launch of a graph.

    It compiles the kernel to Triton's intermediate code and walks that, several times a launch:
    minutes for a model of 48 layers (torch 2.11 to 2.13). What is found depends on the kernel, its
    compile-time arguments and dtypes alone.
    """
    for name in ("identify_mutated_tensors", "identify_accessed_tensors"):  # 2.11, 2.13
        analyse = getattr(triton_kernel_wrap, name, None)
        if analyse is not None:
            setattr(triton_kernel_wrap, name, _remembering(analyse))


def _remembering(analyse: Any) -> Any:
    found: dict[Any, Any] = {}

    def remembered(kernel: Any, kwargs: dict[str, Any], *others: Any) -> Any:
        jit = kernel if hasattr(kernel, "params") else kernel.fn  # in an Autotuner
        if not getattr(jit.fn, "__module__", "").startswith(_KERNELS):
            return analyse(kernel, kwargs, *others)
        fixed = {p.name for p in jit.params if p.is_constexpr}
        key = (jit.fn, tuple((k, _kind(v, k in fixed)) for k, v in sorted(kwargs.items())))
        if key not in found:
            found[key] = analyse(kernel, kwargs, *others)
        return found[key]

    return remembered


def _kind(value: Any, fixed: bool) -> Any:
    """Return what of an argument an analysis depends on."""
    if fixed:
        return value
    dtype = getattr(value, "dtype", None)
    if dtype is None and hasattr(value, "get_dtype"):
        dtype = value.get_dtype()
    return "number" if dtype is None else dtype
