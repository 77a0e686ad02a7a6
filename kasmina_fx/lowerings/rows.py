"""One pass over a whole output, each way: a bank's blend, and the activation that follows it.

``kasmina::fused_rows(y, tables, params, before, plan, then, notes) -> (out, notes)``
    The blend of one bank and ``then``, one of :data:`ACTIVATIONS`. ``y`` ``(..., D)``; ``out`` is
    like it, contiguous. Backward keeps ``y``, which that of a GELU would keep. ``before`` and
    ``notes`` are as of :mod:`kasmina_fx.lowerings.tiles`.
``kasmina::fused_rows_backward(dout, y, tables, params, plan, then) -> [dy, blame, *dparams]``
    Sums of a slot's gradients are float32, in a fixed order: the same bits every time.
``kasmina::blended_rows(y, tables, params, plan, one_in, rows) -> seen``
    The blend, with no activation, of those rows alone that ``kasmina::observe`` looks at
    ``(n, D)``: where an activation is absorbed they are nowhere in memory.

``tables`` are those of :data:`kasmina_fx.lowerings.launches.TABLES`. A program's work does not
depend on how many seeds are active, but for tiles in which none is: these pass through.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op

from kasmina_fx._torch.triton import launching
from kasmina_fx.lowerings.launches import (
    DOTS,
    TABLES,
    even,
    finish,
    four,
    gradients,
    numbers_of,
    report,
    sent_to_tables,
)
from kasmina_fx.lowerings.plan import KERNELS, Plan
from kasmina_fx.lowerings.sample import rows_seen

#: What may follow a blend ("": nothing); kernels know it by its place.
ACTIVATIONS: Final = ("", "gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid")
#: Those whose backward keeps their input; the others keep what they return.
KEEP_THEIR_INPUT: Final = ("gelu", "gelu_tanh", "silu")


class Shape(NamedTuple):
    """Says how rows are handed out: a program's blocks, its warps, loads in flight, and programs.

    ``masked`` loads are in flight where a tile's columns are not all features. ``programs`` is
    about how many there are in all; each has an equal part of the rows.
    """

    rows: int
    warps: int
    stages: int
    programs: int
    masked: int | None = None


#: Of narrow tiles, of wide ones, and of narrow ones in float32, whose products tensor cores do not
#: do; each of a backward's programs has sums of its own. Chosen by what Triton 3.6 compiles for an
#: H100: no spill in an inner loop, 34 instructions an element forward, 54 backward (`mlp`, GELU);
#: loads in flight by time, 4 and 2: 164 and 258 us of 4,096 features in chunks of 4, 262 and 190 us
#: of 3,072 in chunks of 12.
FORWARD: Final = [Shape(32, 2, 4, 4224, masked=2), Shape(16, 4, 2, 4224), Shape(16, 4, 2, 4224)]
BACKWARD: Final = [Shape(32, 2, 3, 2112), Shape(16, 8, 2, 264), Shape(16, 4, 2, 1056)]
#: Of a sample, whose programs have few rows each to read their weights for.
SAMPLE: Final = [shape._replace(stages=2, programs=1056) for shape in FORWARD]


class _Grid(NamedTuple):
    """Holds what the launches of one call share; sizes may be symbols."""

    shape: Shape
    rows: Any
    left: int  # tiles to the left of the run
    tiles: int
    parts: Any
    whole: bool  # every column of every tile is a feature
    even: int

    @classmethod
    def of(cls, shapes: list[Shape], rows: Any, features: int, plan: Plan) -> "_Grid":
        tiling = plan.tiling
        shape = shapes[1 if plan.wide else 2 if plan.dot == "float32" else 0]
        step = tiling.seeds * plan.size
        left = -(-plan.offset // step)
        tiles = left - (plan.offset - features) // step
        blocks = (rows + shape.rows - 1) // shape.rows
        parts = torch.sym_max(1, torch.sym_min(max(1, shape.programs // tiles), blocks))
        whole = step == tiling.columns and plan.offset % step == 0 and features % step == 0
        if isinstance(rows, int) and rows == 0:  # there is no row to read ahead
            whole = False
        if not whole and shape.masked is not None:
            shape = shape._replace(stages=shape.masked)
        return cls(shape, rows, left, tiles, parts, whole, even(plan, step, features))


@triton_op("kasmina::fused_rows", mutates_args={})
def fused_rows(
    y: Tensor,
    tables: list[Tensor],
    params: list[Tensor],
    before: Tensor | None,
    plan: str,
    then: str,
    notes: bool,
) -> tuple[Tensor, Tensor]:
    """Compute ``kasmina::fused_rows``, see above."""
    asked, rows = Plan.parse(plan), y.numel() // y.shape[-1]
    out, told = _outputs(y, asked, notes)
    said, parts = _forward(y.contiguous(), out, tables, params, asked, rows, then=then, notes=notes)
    if notes:
        report(said, parts, before, told, tables, asked, rows)
    return out, told


def _outputs(y: Tensor, plan: Plan, notes: bool) -> tuple[Tensor, Tensor]:
    told = y.new_empty((3 if notes else 0, plan.count), dtype=torch.float32)
    return torch.empty_like(y, memory_format=torch.contiguous_format), told


@fused_rows.register_fake
def _(y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, plan, _, notes = others
    return _outputs(y, Plan.parse(plan), notes)


def _forward(
    y: Tensor,
    out: Tensor,
    tables: list[Tensor],
    params: list[Tensor],
    plan: Plan,
    rows: Any,
    then: str = "",
    notes: bool = False,
    part: bool = False,
) -> tuple[Tensor, Any]:
    """Write ``out``: all of ``rows``, or a part of these, spread evenly.

    Returns what is said, and by how many parts.
    """
    _, seeds, positions, modes, alpha, roles, _, loss_scale = tables
    features, seen = y.shape[-1], out.numel() // out.shape[-1]
    grid = _Grid.of(SAMPLE if part else FORWARD, seen, features, plan)
    kernels, tiling = KERNELS[plan.kind], plan.tiling
    said = y.new_empty(grid.parts * 3 * plan.count if notes else 0, dtype=torch.float32)
    sizes = [features, plan.offset, plan.first_seed, plan.count, seeds.shape[1]]
    sizes += [rows, seen, grid.parts, grid.left]
    number = ACTIVATIONS.index(then)
    launched = launching(f"rows_{kernels.module}", "forward", grid.shape.warps)
    kernel = launched[(grid.tiles, grid.parts)]
    # The last three are for backward: a CUDA graph copies in what may move, if it reads it.
    common = (y, out, said, positions, alpha, roles, seeds, modes, loss_scale)
    if kernels.module == "affine":
        kernel(
            *common, *params, *sizes,
            plan.size, tiling.seeds, tiling.columns, grid.shape.rows, notes, grid.even, grid.whole,
            number, part, grid.shape.stages,
        )  # fmt: skip
    else:
        kernel(
            *common, *four(params), *sizes,
            plan.size, plan.hidden, *tiling, grid.shape.rows, *kernels.switches, notes,
            DOTS[plan.dot], grid.even, grid.whole, number, part, grid.shape.stages,
        )  # fmt: skip
    return said, grid.parts


@triton_op("kasmina::blended_rows", mutates_args={})
def blended_rows(
    y: Tensor, tables: list[Tensor], params: list[Tensor], plan: str, one_in: int, rows: int
) -> Tensor:
    """Compute ``kasmina::blended_rows``, see above."""
    seen, count = _seen(y, one_in, rows)
    _forward(y.contiguous(), seen, tables, params, Plan.parse(plan), count, part=True)
    return seen


def _seen(y: Tensor, one_in: int, rows: int) -> tuple[Tensor, Any]:
    count, seen = rows_seen(y, one_in, rows)
    return y.new_empty((seen, y.shape[-1])), count


@blended_rows.register_fake
def _(y: Tensor, *others: Any) -> Tensor:
    *_, one_in, rows = others
    return _seen(y, one_in, rows)[0]


blended_rows.register_autograd(
    lambda *_: (None,) * 6,
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output),
)


@triton_op("kasmina::fused_rows_backward", mutates_args={})
def fused_rows_backward(
    dout: Tensor, y: Tensor, tables: list[Tensor], params: list[Tensor], plan: str, then: str
) -> list[Tensor]:
    """Compute ``kasmina::fused_rows_backward``, see above."""
    asked, kernels = Plan.parse(plan), KERNELS[Plan.parse(plan).kind]
    _, seeds, positions, modes, alpha, roles, _, loss_scale = tables
    dy, *found = _results(dout, tables, params, asked)
    features, (slots, places), tiling = y.shape[-1], seeds.shape, asked.tiling
    grid = _Grid.of(BACKWARD, y.numel() // features, features, asked)
    width = sum(numbers_of(params)) + 2
    sums = dout.new_empty(grid.parts * slots * places * width, dtype=torch.float32)
    sizes = [features, asked.offset, asked.first_seed, asked.count, places, grid.rows]
    sizes += [grid.parts, grid.left]
    number = ACTIVATIONS.index(then)
    launched = launching(f"rows_{kernels.module}", "backward", grid.shape.warps)
    kernel = launched[(grid.tiles, grid.parts)]
    common = (dout.contiguous(), y.contiguous(), dy, sums, positions, alpha, roles, modes)
    if kernels.module == "affine":
        kernel(
            *common, loss_scale, *params, *sizes, asked.size, tiling.seeds, tiling.columns,
            grid.shape.rows, width, grid.even, grid.whole, number, grid.shape.stages,
        )  # fmt: skip
    else:
        kernel(
            *common, loss_scale, *four(params), *sizes, asked.size, asked.hidden, *tiling,
            grid.shape.rows, *kernels.switches, DOTS[asked.dot], width, grid.even, grid.whole,
            number, grid.shape.stages,
        )  # fmt: skip
    finish(sums, grid.parts, tables, found, params, asked)
    return [dy, *found]


def _results(dout: Tensor, tables: list[Tensor], params: list[Tensor], plan: Plan) -> list[Tensor]:
    dy = torch.empty_like(dout, memory_format=torch.contiguous_format)
    return [dy, *gradients(tables, params, plan)]


@fused_rows_backward.register_fake
def _(dout: Tensor, *others: Any) -> list[Tensor]:
    _, tables, params, plan, _ = others
    return _results(dout, tables, params, Plan.parse(plan))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, tables, params, _, plan, then, _ = inputs
    ctx.save_for_backward(y, *tables, *params)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.how = plan, then


def _backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    y, *others = ctx.saved_tensors
    tables, params = others[: len(TABLES)], others[len(TABLES) :]
    dy, blame, *grads = fused_rows_backward(dout, y, tables, params, *ctx.how)
    return dy, sent_to_tables(blame), grads, None, None, None, None


fused_rows.register_autograd(_backward, setup_context=_save)

ROWS: Final = torch.ops.kasmina.fused_rows.default
BLENDED_ROWS: Final = torch.ops.kasmina.blended_rows.default
