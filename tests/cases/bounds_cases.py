"""Kernels watched in Triton's interpreter: every address that they touch lies in a tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kasmina_fx._torch import triton
from kasmina_fx._torch.launches import written_arguments
from kasmina_fx.lowerings import launches, rows, sample, tiles

#: Takes what a launch is given, by name; returns what to give instead, and a grid for it.
Change = Callable[[dict[str, Any]], tuple[dict[str, Any], tuple[int, ...]]]


class Watch:
    """Holds what may be read and written during a launch, and which kernels were launched.

    ``changes`` says, of a kernel's module and name, what a launch is to be given instead;
    ``part`` is added to the number of the part of the rows that a program handles.
    """

    def __init__(self) -> None:
        self.readable: list[tuple[int, int]] = []
        self.writable: list[tuple[int, int]] = []
        self.launched: set[tuple[str, str]] = set()
        self.changes: dict[tuple[str, str], Change] = {}
        self.part = 0  # how far the part is that runs, and how many tiles more there are
        self.tiles = 0

    def launch(self, module: str, name: str, grid: Any, *args: Any, **options: Any) -> None:
        kernel = triton.launching(module, name)
        given = dict(zip(inspect.signature(kernel.fn).parameters, args, strict=True))
        if (module, name) in self.changes:
            changed, grid = self.changes[module, name](given)
            given |= changed
        written = written_arguments(kernel.fn, given)
        tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
        self.readable = [extent(t) for t in tensors.values()]
        self.writable = [extent(tensors[name]) for name in written]
        self.launched.add((module, name))
        kernel[grid](*given.values(), **options)

    @staticmethod
    def check(pointers: Any, mask: Any, allowed: list[tuple[int, int]]) -> None:
        addresses = np.asarray(pointers.data)
        touched = addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)]
        inside = np.zeros(touched.shape, bool)
        for first, last in allowed:
            inside |= (touched >= first) & (touched < last)
        if not inside.all():
            raise AssertionError(f"{int((~inside).sum())} addresses lie beside all tensors")


def extent(t: Tensor) -> tuple[int, int]:
    """Return where a contiguous tensor begins and ends."""
    assert t.is_contiguous()
    return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()


@pytest.fixture
def watch(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Launches are watched; an access beside the tensors of a launch fails, and is not made.

    What is written must lie in a tensor that the kernel declares (``WRITES``).
    """
    interpreting: Any = pytest.importorskip("triton.runtime.interpreter")
    builder, found = interpreting.InterpreterBuilder, Watch()
    load, store = builder.create_masked_load, builder.create_masked_store

    def loaded(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        found.check(pointers, mask, found.readable)
        return load(self, pointers, mask, *others)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        found.check(pointers, mask, found.writable)
        return store(self, pointers, value, mask, *others)

    def atomic(*_: Any) -> None:
        raise AssertionError("kernels need no atomics: sums have a fixed order")

    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        monkeypatch.setattr(builder, name, atomic)

    def shifted(own: Any, more: bool) -> Any:
        return lambda self, x, y, z: own(self, x + more * found.tiles, y + found.part, z)

    for name, more in (("set_grid_dim", True), ("set_grid_idx", False)):
        monkeypatch.setattr(builder, name, shifted(getattr(builder, name), more))

    class Launch:
        def __init__(self, module: str, name: str, _warps: int | None = None) -> None:
            self.named = (module, name)

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: found.launch(*self.named, grid, *args, **options)

    for module in (launches, rows, sample, tiles):
        monkeypatch.setattr(module, "launching", Launch)
    return found


def sparse(size: int) -> Tensor:
    """Return zeros, float16, of which memory is used where it is touched alone."""
    try:
        return torch.from_numpy(np.zeros(size, np.float16))
    except MemoryError:
        pytest.skip(f"this machine does not lend {2 * size:,} bytes of addresses")
