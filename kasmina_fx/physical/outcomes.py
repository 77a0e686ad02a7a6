"""Operators that take what blueprints made back to the host.

``mix(host, made, ran, positions, seeds, alpha, roles, dim) -> (out, mixed)``
    ``host + alpha * (f - host)`` where a seed blends and that is finite, elsewhere ``host`` to the
    bit. ``host`` ``(..., n, size, ...)`` holds a run's chunks along ``dim`` (negative); ``alpha``
    and ``roles`` are those of its seeds. The lists hold a tensor for each of the run's banks: what
    its blueprints ``made`` ``(K, M, ..., size, ...)``, which slots ``ran``, bool ``(K,)``, and its
    tables. No two banks hold the same seed. ``mixed``, int8 like ``out``, is 1 for elements that
    were blended: backward needs no more.
``notes(made, rows, ran, positions, alpha, roles) -> notes``
    What is said of a run's seeds, float32 ``(3, n)``: see ``NOTES``. ``rows``
    ``(K, M, ..., size, ...)`` are the chunks that blueprints ran on. Nothing has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import known_one
from kasmina_fx.lifecycle import Role
from kasmina_fx.physical.gradients import as_dtype, overflows, wide_dtype
from kasmina_fx.physical.graph_inputs import NO_LOSS
from kasmina_fx.physical.moves import Lookup, at_seeds, checked
from kasmina_fx.physical.rows import along, finite_rows, inside, kept


def mixed_outcomes(
    host: Tensor,
    made: Sequence[Tensor],
    ran: Sequence[Tensor],
    positions: Sequence[Tensor],
    seeds: Sequence[Tensor],
    alpha: Tensor,
    roles: Tensor,
    dim: int,
    lookup: Lookup = checked,
    by_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute ``mix``; ``by_mask`` so that autograd may look inside, where 0 times NaN is NaN."""
    f, runs = _of_seeds(made, ran, positions, dim, lookup)
    blends = runs & (roles == int(Role.BLENDS))
    # One number a seed to look up for each of its rows. NaN: its blend is not finite, and refused.
    weight = alpha if by_mask else alpha.masked_fill(~blends, torch.nan)
    # float32 for half types: the difference of two close values has few correct bits in them.
    wide = wide_dtype(host, f)
    exact, other, factor = (as_dtype(t, wide) for t in (host, f, along(weight, dim)))
    grown = as_dtype(exact + factor * (other - exact), host.dtype)
    # The same to the bit, written otherwise: Inductor would keep one that is read twice in memory.
    mixed = as_dtype(exact - factor * (exact - other), host.dtype).abs() < torch.inf
    if by_mask:
        mixed = mixed & along(blends, dim)
    if overflows(f, host):
        mixed = mixed & (f.to(host.dtype).abs() < torch.inf)
    # A where, not a product with 0: what is not blended keeps its bits, NaN, Inf and -0 included.
    # Not kept as bool: what Inductor writes for a CPU to store one takes 30 times as long.
    return torch.where(mixed, grown, host), mixed.to(torch.float32).to(torch.int8)


def _of_seeds(
    made: Sequence[Tensor],
    ran: Sequence[Tensor],
    positions: Sequence[Tensor],
    dim: int,
    lookup: Lookup,
) -> tuple[Tensor, Tensor]:
    """Return what stands for each seed, like the host, and bool ``(n,)``: a blueprint made it."""
    found: tuple[Tensor, Tensor] | None = None
    for f, sane, index in zip(made, ran, positions, strict=True):
        held, places = index >= 0, f.shape[1]
        mine = at_seeds(f, index, dim, lookup)
        runs = held & lookup(sane, [index if known_one(places) else index // places])
        if found is not None:
            mine = torch.where(along(held, dim), mine, found[0])
            runs = found[1] | runs
        found = mine, runs
    assert found is not None  # a run without a bank has nothing to mix
    return found


def _plain_mix(*given: Any) -> tuple[Tensor, Tensor]:
    out, mixed = mixed_outcomes(*given)
    return _laid_out(out, given[0]), _laid_out(mixed, given[0])


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    room = torch.empty_like(like, dtype=values.dtype)
    return values if values.stride() == room.stride() else room.copy_(values)


mix = torch.library.custom_op(
    "kasmina::mix",
    _plain_mix,
    mutates_args=(),
    schema="(Tensor host, Tensor[] made, Tensor[] ran, Tensor[] positions, Tensor[] seeds, "
    "Tensor alpha, Tensor roles, int dim) -> (Tensor, Tensor)",
)


@mix.register_fake
def _(host: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(host), torch.empty_like(host, dtype=torch.int8)


def _save_mixed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    host, made, _, positions, seeds, alpha, _, ctx.dim = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], alpha, *positions, *seeds)
    ctx.dtypes = [f.dtype for f in made]
    ctx.wide = reduce(torch.promote_types, (wide_dtype(host, f) for f in made))


def _mix_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    mixed, alpha, *tables = ctx.saved_tensors
    banks = len(ctx.dtypes)
    exact = as_dtype(grad, ctx.wide)
    # NaN less anything is NaN, so that asking for it changes nothing: it keeps AOTAutograd's
    # partitioner from asking in forward already, and from keeping the answer, a bool.
    sends = mixed.to(torch.float32) > (exact != exact)
    sent = kept(exact * as_dtype(along(alpha, ctx.dim), ctx.wide), sends)
    move = torch.ops.kasmina.gather.default
    back = [
        move(as_dtype(sent, dtype), seeds, positions, ctx.dim)
        for dtype, positions, seeds in zip(ctx.dtypes, tables, tables[banks:], strict=False)
    ]
    none = [None] * banks
    return as_dtype(exact - sent, grad.dtype), back, none, none, none, None, None, None


mix.register_autograd(_mix_backward, setup_context=_save_mixed)


#: In the place of a loss: the blueprint has parameters that are not finite, or made of a finite
#: chunk what can't be blended.
_FAULTY: Final = -2.0


def noted(
    made: Sequence[Tensor],
    rows: Sequence[Tensor],
    ran: Sequence[Tensor],
    positions: Sequence[Tensor],
    alpha: Tensor,
    roles: Tensor,
    lookup: Lookup = checked,
) -> Tensor:
    """Compute ``notes``."""
    said = None
    for f, chunks, sane, index in zip(made, rows, ran, positions, strict=True):
        mine = at_seeds(_losses(f, chunks, sane), index, -1, lookup)
        before = mine.new_full((), NO_LOSS) if said is None else said
        said = torch.where(index >= 0, mine, before)
    assert said is not None  # a run without a bank has nothing to note
    added = kept(alpha * alpha * said, (roles == int(Role.BLENDS)) & (said >= 0))
    return torch.stack([(said == _FAULTY).float(), said.clamp_min(NO_LOSS), added])


def _losses(made: Tensor, rows: Tensor, ran: Tensor) -> Tensor:
    """Say in the slots' places how far they are from their chunks; nobody's blend waits for it."""
    wide = wide_dtype(rows, made)
    difference = as_dtype(made, wide) - as_dtype(rows, wide)
    finite = finite_rows(difference, 2)  # and so are both
    if overflows(made, rows):
        finite = finite & finite_rows(made.to(rows.dtype), 2)
    loss = difference.square().mean(inside(difference, 2)).float()
    # Of a chunk that is not finite itself a blueprint can't be expected to make a finite one.
    faulty, nothing = loss.new_full((), _FAULTY), loss.new_full((), NO_LOSS)
    without = torch.where(finite_rows(rows, 2), faulty, nothing)
    return torch.where(finite & ran.unsqueeze(1), loss, without)


notes = torch.library.custom_op(
    "kasmina::notes",
    lambda *given: noted(*given),
    mutates_args=(),
    schema="(Tensor[] made, Tensor[] rows, Tensor[] ran, Tensor[] positions, Tensor alpha, "
    "Tensor roles) -> Tensor",
)


@notes.register_fake
def _(made: Any, rows: Any, ran: Any, positions: Any, alpha: Tensor, roles: Tensor) -> Tensor:
    return alpha.new_empty((3, alpha.shape[0]))


def _nothing_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)
    ctx.banks = len(inputs[0])


def _no_gradient(ctx: Any, _: Any) -> tuple[Any, ...]:
    none = [None] * ctx.banks
    return none, none, none, none, None, None


notes.register_autograd(_no_gradient, setup_context=_nothing_saved)
