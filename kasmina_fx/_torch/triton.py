"""Private names around Triton: whether it is there, and how its kernels are launched."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
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


def launching(module: str, name: str, warps: int | None = None) -> Any:
    """Return a kernel of ``kasmina_fx.lowerings.triton``, wrapped so that a tracer sees it.

    ``warps`` are those of a program; None: as many as Triton takes by default.
    """
    if INTERPRET:
        return _kernel(module, name)  # no kernel that a tracer could see, and without warps
    _say_what_is_written()
    _remember_sources()
    return wrap_triton(_kernel(module, name) if warps is None else _tuned(module, name, warps))


def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)


@cache
def _tuned(module: str, name: str, warps: int) -> Any:
    """Return one object for all launches: of ``num_warps=`` torch makes a kernel a launch.

    Each of those it names, hashes and prints by itself: seconds of a deep model's first call.
    """
    from triton import Config, autotune

    return autotune(configs=[Config({}, num_warps=warps)], key=[])(_kernel(module, name))


@cache
def _remember_sources() -> None:
    """Let torch put a kernel's source together once, where it would at each launch of a graph."""
    from torch._inductor.codegen import wrapper

    find = wrapper.user_defined_triton_kernel_transitive_closure_source_code
    known: dict[Any, str] = {}

    def found(kernel: Any, *others: Any, **named: Any) -> str:
        if any(others) or any(named.values()):  # the source with an epilogue (torch 2.13)
            return find(kernel, *others, **named)
        if kernel not in known:
            known[kernel] = find(kernel)
        return known[kernel]

    wrapper.user_defined_triton_kernel_transitive_closure_source_code = found


@cache
def _say_what_is_written() -> None:
    """Let torch read what our kernels write, where it would find it out by analysis.

    It compiles a kernel to Triton's intermediate code and walks that, several times for each launch
    of a graph: minutes for a model of 48 layers (torch 2.11 to 2.13). The names stand in ``WRITES``
    of a kernel's module; a test compares them with what torch finds.
    """
    for name, answer in (  # 2.11, 2.13
        ("identify_mutated_tensors", lambda names, kwargs: names),
        ("identify_accessed_tensors", _as_accesses),
    ):
        analyse = getattr(triton_kernel_wrap, name, None)
        if analyse is not None:
            setattr(triton_kernel_wrap, name, _answering(analyse, answer))


def _answering(analyse: Any, answer: Callable[[list[str], dict[str, Any]], Any]) -> Any:
    def answered(kernel: Any, kwargs: dict[str, Any], *others: Any) -> Any:
        function = kernel.fn if not hasattr(kernel.fn, "fn") else kernel.fn.fn  # in an Autotuner
        if not getattr(function, "__module__", "").startswith(_KERNELS):
            return analyse(kernel, kwargs, *others)
        return answer(written_arguments(function, kwargs), kwargs)

    return answered


def written_arguments(function: Any, kwargs: dict[str, Any]) -> list[str]:
    """Return the names of what a kernel writes to, called with such arguments.

    An entry ``"d3": "N3"`` of ``WRITES`` says: ``d3``, unless the argument ``N3`` is 0 or False.
    """
    written = importlib.import_module(function.__module__).WRITES[function.__name__]
    return [name for name, unless in written.items() if unless is None or kwargs[unless]]


def _as_accesses(names: list[str], kwargs: dict[str, Any]) -> Any:
    """Return what ``identify_accessed_tensors`` does (torch 2.13)."""
    from torch._inductor.dependencies import ReadWrites, StarDep
    from torch.utils._ordered_set import OrderedSet

    writes: Any = OrderedSet(StarDep(name) for name in names)
    tensors = [k for k, v in kwargs.items() if hasattr(v, "dtype") or hasattr(v, "get_dtype")]
    reads: Any = OrderedSet(StarDep(name) for name in tensors)
    accesses = ReadWrites(reads=reads, writes=writes, index_exprs=OrderedSet())
    return triton_kernel_wrap.TensorAccesses(accesses, can_fuse_epilogue=False)
