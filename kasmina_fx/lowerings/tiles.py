"""One operator a bank: active chunks alone are read, blended and written, in place.

``kasmina::fused_tiles(y, tables, params, before, plan, keep, notes, followed)``
    Returns ``(out, kept, notes)``, the blend of one bank. ``y`` ``(..., D)`` is contiguous; ``out``
    is like it. It is functional, and made so that Inductor sees through: ``out = y.clone();
    kernel(out)``, of which it drops the copy where nobody else needs ``y``. ``kept``, in one dim
    ``(rows * active * size,)``: the chunks of the active seeds as they were, which with tables and
    parameters is all that backward needs; empty unless ``keep`` (a CPU's kernels lay it out by
    blocks of rows, and pad these). ``notes`` float32 ``(3, n)``: those of a blend, of seeds that
    this bank does not run as ``before`` says (None: nothing ran); empty unless ``notes``.
    ``followed``: a kernel of another bank takes ``out`` next, and its buffer is what comes back.
``kasmina::fused_tiles_backward(dout, kept, tables, params, plan, followed)``
    Returns ``[dy, blame, *dparams]``. Sums of a slot's gradients are float32, in a fixed order: the
    same bits every time.

``tables`` are those of :data:`kasmina_fx.lowerings.launches.TABLES`. Neither operator knows
how many seeds are active: that is the length of ``order``, a dynamic dimension.
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
    natively,
    numbers_of,
    report,
    sent_to_tables,
)
from kasmina_fx.lowerings.native.library import ROWS
from kasmina_fx.lowerings.native.operators import TILES, TILES_BACKWARD
from kasmina_fx.lowerings.plan import KERNELS, Plan

#: Into how many parts the rows fall, each a program of its own: at most so many, twice as many from
#: so many tiles on, and about so many programs in all, forward and backward. In backward each has
#: sums of its own: fewer where they are large. Tuned on an H100: programs that start are not free,
#: and a few must keep a chip busy.
_MOST: Final = 256
_MANY: Final = 16
_PROGRAMS: Final = (8448, 1056)
_LARGE: Final = 4096
#: Rows of a block, and warps: forward and backward, of narrow and wide tiles.
_BLOCK: Final = 16
_WARPS: Final = ((1, 4), (1, 2))


class _Launch(NamedTuple):
    """Holds what the launches of one call share; sizes may be symbols."""

    rows: Any
    active: Any
    tiles: Any
    warps: int

    @classmethod
    def of(cls, y: Tensor, order: Tensor, plan: Plan, way: int = 0) -> "_Launch":
        tiling = plan.tiling
        active: Any = order.shape[0]
        if isinstance(active, int) and active % tiling.seeds:
            raise ValueError(f"order holds {active} places, not whole tiles of {tiling.seeds}")
        rows, tiles = y.numel() // y.shape[-1], active // tiling.seeds
        return cls(rows, active, tiles, _WARPS[way][plan.wide])

    def parts(self, programs: int) -> Any:
        """Say into how many parts the rows fall."""
        blocks = (self.rows + _BLOCK - 1) // _BLOCK
        most = torch.sym_min(_MOST * (1 + torch.sym_min(1, self.tiles // _MANY)), blocks)
        return torch.sym_max(1, torch.sym_min(most, programs // self.tiles))


@triton_op("kasmina::fused_tiles", mutates_args={})
def fused_tiles(
    y: Tensor,
    tables: list[Tensor],
    params: list[Tensor],
    before: Tensor | None,
    plan: str,
    keep: bool,
    notes: bool,
    followed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``kasmina::fused_tiles``, see above."""
    out, kept, told = _outputs(y, tables, plan, keep, notes)
    if natively(y.device):
        TILES(out, kept, told, before, tables, params, plan)
        return out, kept, told
    order, seeds, positions, modes, alpha, roles, _, loss_scale = tables
    asked = Plan.parse(plan)
    launch, kernels = _Launch.of(y, order, asked), KERNELS[asked.kind]
    splits = launch.parts(_PROGRAMS[0])
    said = y.new_empty(splits * 3 * asked.count if notes else 0, dtype=torch.float32)
    tiling = asked.tiling
    sizes = [y.shape[-1], asked.offset, asked.first_seed, asked.count]
    sizes += [seeds.shape[1], launch.rows]
    wide = even(asked, asked.size, y.shape[-1])
    kernel = launching(kernels.module, "forward", launch.warps)[(launch.tiles, splits)]
    # The last three are for backward: a CUDA graph copies in what may move, if it reads it.
    common = (out, kept, said, order, seeds, alpha, roles, positions, modes, loss_scale)
    if kernels.module == "affine":
        kernel(
            *common, *params, *sizes,
            asked.size, tiling.seeds, tiling.columns, _BLOCK, keep, notes, wide,
        )  # fmt: skip
    elif kernels.module == "bottleneck":
        kernel(
            *common, *params, *sizes, asked.size, asked.hidden, *tiling, _BLOCK,
            _alone(asked), keep, notes, DOTS[asked.dot], wide,
        )  # fmt: skip
    else:
        act, bias, residual = kernels.switches
        kernel(
            *common, *four(params), *sizes, asked.size, asked.hidden, *tiling, _BLOCK,
            act, bias, residual, keep, notes, DOTS[asked.dot], wide,
        )  # fmt: skip
    if notes:
        report(said, splits, before, told, tables, asked, launch.rows)
    return out, kept, told


def _alone(plan: Plan) -> int:
    """Return how often a block may be computed again: once a seed, unless there is but one."""
    return plan.tiling.seeds if plan.tiling.seeds > 1 else 0


def _outputs(
    y: Tensor, tables: list[Tensor], plan: str, keep: bool, notes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    asked = Plan.parse(plan)
    launch = _Launch.of(y, tables[0], asked)
    rows = (launch.rows + ROWS - 1) // ROWS * ROWS if natively(y.device) else launch.rows
    kept = y.new_empty(rows * asked.size * launch.active if keep else 0)
    told = y.new_empty((3 if notes else 0, asked.count), dtype=torch.float32)
    return y.clone(memory_format=torch.contiguous_format), kept, told


@fused_tiles.register_fake
def _(y: Tensor, tables: list[Tensor], _params: Any, _before: Any, *how: Any) -> Any:
    return _outputs(y, tables, *how[:3])


@triton_op("kasmina::fused_tiles_backward", mutates_args={})
def fused_tiles_backward(
    dout: Tensor,
    kept: Tensor,
    tables: list[Tensor],
    params: list[Tensor],
    plan: str,
    followed: bool,
) -> list[Tensor]:
    """Compute ``kasmina::fused_tiles_backward``, see above."""
    order, seeds, _, modes, alpha, roles, _, loss_scale = tables
    dy, *found = _gradients(dout, tables, params, plan, followed)
    if natively(dout.device):
        TILES_BACKWARD(dy, found[0], found[1:], kept, tables, params, plan)
        return [dy, *found]
    asked = Plan.parse(plan)
    launch, kernels = _Launch.of(dout, order, asked, 1), KERNELS[asked.kind]
    width, tiling = sum(numbers_of(params)) + 2, asked.tiling
    slots, places = seeds.shape
    splits = launch.parts(_PROGRAMS[1] if width < _LARGE else _PROGRAMS[1] // 4)
    sums = dout.new_empty(splits * slots * places * width, dtype=torch.float32)
    sizes = [dout.shape[-1], asked.offset, asked.first_seed, places, launch.rows]
    wide = even(asked, asked.size, dout.shape[-1])
    kernel = launching(kernels.module, "backward", launch.warps)[(launch.tiles, splits)]
    common = (dy, sums, kept, order, seeds, alpha, roles, modes, loss_scale)
    if kernels.module == "affine":
        kernel(
            *common, *params, *sizes, asked.size, tiling.seeds, tiling.columns, _BLOCK, width,
            wide,
        )  # fmt: skip
    elif kernels.module == "bottleneck":
        kernel(
            *common, *params, *sizes, asked.size, asked.hidden, *tiling, _BLOCK,
            _alone(asked), DOTS[asked.dot], width, wide,
        )  # fmt: skip
    else:
        act, bias, residual = kernels.switches
        kernel(
            *common, *four(params), *sizes, asked.size, asked.hidden, *tiling, _BLOCK,
            act, bias, residual, DOTS[asked.dot], width, wide,
        )  # fmt: skip
    finish(sums, splits, tables, found, params, asked)
    return [dy, *found]


def _gradients(
    dout: Tensor, tables: list[Tensor], params: list[Tensor], plan: str, followed: bool
) -> list[Tensor]:
    """Return ``dout`` to be changed in place, and room for the other gradients.

    Of what a kernel wrote a clone vanishes, where a multiplication would be a pass over memory. Of
    anything else it would vanish too, and the kernel change what is no buffer yet, which Inductor
    copies twice.
    """
    dy = dout.clone() if followed else dout * 1
    return [dy, *gradients(tables, params, Plan.parse(plan))]


@fused_tiles_backward.register_fake
def _(dout: Tensor, _kept: Tensor, *others: Any) -> list[Tensor]:
    return _gradients(dout, *others)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, tables, params, _, plan, keep, _, followed = inputs
    if not keep:
        raise RuntimeError("compiled for inference, without what a backward needs")
    ctx.save_for_backward(output[1], *tables, *params)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.how = plan, followed


def _backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    kept, *others = ctx.saved_tensors
    tables, params = others[: len(TABLES)], others[len(TABLES) :]
    dy, blame, *grads = fused_tiles_backward(dout.contiguous(), kept, tables, params, *ctx.how)
    return dy, sent_to_tables(blame), grads, None, None, None, None, None


fused_tiles.register_autograd(_backward, setup_context=_save)

FUSED: Final = torch.ops.kasmina.fused_tiles.default
