"""Operators that call the kernels; :mod:`kasmina_fx.lowerings.tiles` says what they compute.

``kasmina::tiles_on_cpu(out!, kept!, told!, before, tables, params, plan)``
    Blends ``out`` ``(..., D)`` in place. ``kept`` ``(padded rows, active * size)`` and ``told``
    ``(3, n)`` are written too, unless they are empty.
``kasmina::tiles_on_cpu_backward(dy!, blame!, grads!, kept, tables, params, plan)``
    Makes the gradient of ``y`` out of that of ``out`` in ``dy``, and writes all of the others.
``kasmina::observe_on_cpu(telemetry![], y[], notes[], chunks, one_in[], rows[])``
    What ``kasmina::observe_rows`` is (:mod:`kasmina_fx.lowerings.sample`).

All floating tensors are float32 and contiguous. They are registered without autograd, which has
been seen to above: a call costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx.lowerings.native.library import functions
from kasmina_fx.lowerings.plan import KERNELS, Plan
from kasmina_fx.physical.layout import ChunkLayout

_LIBRARY: Final = torch.library.Library("kasmina", "FRAGMENT")
_LIBRARY.define(
    "tiles_on_cpu(Tensor(a!) out, Tensor(b!) kept, Tensor(c!) told, Tensor? before, "
    "Tensor[] tables, Tensor[] params, str plan) -> ()"
)
_LIBRARY.define(
    "tiles_on_cpu_backward(Tensor(a!) dy, Tensor(b!) blame, Tensor(c!)[] grads, Tensor kept, "
    "Tensor[] tables, Tensor[] params, str plan) -> ()"
)
_LIBRARY.define(
    "observe_on_cpu(Tensor(a!)[] telemetry, Tensor[] y, Tensor?[] notes, str chunks, "
    "int[] one_in, int[] rows) -> ()"
)


def _tiles(
    out: Tensor,
    kept: Tensor,
    told: Tensor,
    before: Tensor | None,
    tables: list[Tensor],
    params: list[Tensor],
    plan: str,
) -> None:
    order, seeds, _, _, alpha, roles, *_ = tables
    functions().forward(
        _sizes_of(out, order, seeds, params, plan), _written(out), _some(kept), _some(told),
        None if before is None else _read(before), _read(order), _read(seeds), _read(alpha),
        _read(roles), _pointers(params),
    )  # fmt: skip


def _backward(
    dy: Tensor,
    blame: Tensor,
    grads: list[Tensor],
    kept: Tensor,
    tables: list[Tensor],
    params: list[Tensor],
    plan: str,
) -> None:
    order, seeds, _, modes, alpha, roles, _, loss_scale = tables
    functions().backward(
        _sizes_of(dy, order, seeds, params, plan), _written(dy), _written(blame), _read(kept),
        _read(order), _read(seeds), _read(modes), _read(alpha), _read(roles), _read(loss_scale),
        _pointers(params), _pointers(grads),
    )  # fmt: skip


def _observe(
    telemetry: list[Tensor],
    y: list[Tensor],
    notes: list[Tensor | None],
    chunks: str,
    one_in: list[int],
    rows: list[int],
) -> None:
    layouts = map(ChunkLayout.parse, chunks.split(";"))
    for layer in zip(telemetry, y, notes, layouts, one_in, rows, strict=True):
        _observe_layer(*layer)


def _observe_layer(
    telemetry: Tensor, y: Tensor, notes: Tensor | None, layout: ChunkLayout, one_in: int, rows: int
) -> None:
    features, threads = y.shape[-1], torch.get_num_threads()
    count = rows_looked_at(y, one_in)
    seen = min(rows, count) if rows else count
    if not seen:
        return
    for run in layout.runs:
        numbers = [features, run.offset, run.first_seed, run.count, telemetry.shape[1]]
        numbers += [count, seen, run.size, threads]
        functions().observe(
            _array(*numbers), _written(telemetry), _read(y), None if notes is None else _read(notes)
        )


def rows_looked_at(y: Tensor, one_in: int) -> Any:
    """Return how many rows the first of ``one_in`` equal parts of a batch ``(..., D)`` has.

    It is a symbol where a size is.
    """
    count = y.numel() // y.shape[-1]
    if one_in > 1 and y.dim() > 1:
        count = (y.shape[0] + one_in - 1) // one_in * math.prod(y.shape[1:-1])
    return count


def _fake(*_: object) -> None:
    return None


for _name, _function in {
    "tiles_on_cpu": _tiles,
    "tiles_on_cpu_backward": _backward,
    "observe_on_cpu": _observe,
}.items():
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"kasmina::{_name}", _fake, lib=_LIBRARY)

TILES: Final = torch.ops.kasmina.tiles_on_cpu.default
TILES_BACKWARD: Final = torch.ops.kasmina.tiles_on_cpu_backward.default
OBSERVE: Final = torch.ops.kasmina.observe_on_cpu.default


def _sizes_of(y: Tensor, order: Tensor, seeds: Tensor, params: list[Tensor], plan: str) -> object:
    slots, places = seeds.shape
    features = y.shape[-1]
    rows, capacity = y.numel() // features, params[0].shape[0]
    threads = torch.get_num_threads()
    return _sizes(plan, rows, features, order.shape[0], places, slots, capacity, threads)


@lru_cache(maxsize=4096)
def _sizes(
    plan: str,
    rows: int,
    features: int,
    active: int,
    places: int,
    slots: int,
    capacity: int,
    threads: int,
) -> ctypes.Array[ctypes.c_int64]:
    """Return what ``Bank`` in ``tile.h`` reads."""
    asked = Plan.parse(plan)
    kernels = KERNELS[asked.kind]
    switches = [*(kernels.switches or (0, 0, 0)), kernels.module == "bottleneck"]
    numbers = [rows, features, asked.offset, asked.first_seed, asked.count, active]
    numbers += [places, slots, capacity, asked.size, asked.hidden, *switches, threads]
    return _array(*numbers)


@lru_cache(maxsize=4096)
def _array(*numbers: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _read(t: Tensor) -> int:
    if not t.is_contiguous():
        raise RuntimeError(f"kernels read contiguous tensors, not strides {t.stride()}")
    return t.data_ptr()


_written = _read


def _some(t: Tensor) -> int | None:
    return _read(t) if t.numel() else None


def _pointers(stacks: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(stacks))(*map(_read, stacks))
