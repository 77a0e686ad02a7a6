"""Operators that move chunks between seeds and slots, and decide which gradients pass.

Each has a backward of its own and a decomposition (:data:`DECOMPOSITIONS`) that Inductor fuses into
its neighbours.

``pull(f, index, inverse)``, ``gather(f, index, inverse)``
    ``out[i] = f[index[i]]``, 0 where ``index[i]`` is -1. Seeds and slots are inverse maps, so the
    backward of one is the same move along the other map: no atomic scatter.
``guard(tensors, modes, positions, faults, blames)``
    The identity on a bank's rows ``(K, M, ...)`` and parameters ``(K, ...)``. Backward lets a
    slot's gradients through if all of them are finite (0 x NaN is NaN: a blueprint rejected in
    forward could still poison the host's gradient) and its mode allows: frozen parameters get none,
    and no chunk gets any from a seed in TRAINING. What was refused is counted in the gradient of
    ``faults`` ``(n,)``, where it can be nothing but the blueprint's fault (``blames``, bool
    ``(K, M)``). One more output, float32 ``(K,)``, is 1 for slots that do not learn from the
    model's loss: their gradients may be scaled down on the way here.
``reconstruct(f, rows, trainees, loss_scale, alone)``
    The identity on ``f`` ``(P, ...)``. Backward adds the gradient of ``loss_scale`` times the mean
    squared difference of ``f`` from ``rows``, a sum over the places in ``trainees``: an auxiliary
    loss that needs no change of the training loop, as mixture-of-experts layers inject theirs.
    In float16 a GradScaler's scale is for the model's loss, and would overflow this one: slots that
    are ``alone`` get a power of two less, and guard multiplies it in again. How much comes there as
    the gradient of ``alone``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from kasmina_fx._torch_compat import in_functorch
from kasmina_fx.lifecycle import Mode


def take(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``out[i] = f[index[i]]``, 0 where ``index[i]`` is -1: what ``pull`` and ``gather`` compute.

    The zeros matter for gradients: without them a seed without a slot, or a slot without a seed,
    would receive row 0's gradient.
    """
    taken = f.index_select(0, index.clamp_min(0))
    return taken.masked_fill((index < 0).view(_column(f)), 0.0)


def finite_rows(values: Tensor) -> Tensor:
    """Bool ``(K,)``: are all values of ``values[k]`` finite? ``values`` is ``(K, ...)``."""
    # The largest magnitude is finite exactly if all are (amax hands NaN on, which is not below
    # Inf): one reduction, vectorised. Inductor folds the sum of ``values * 0`` to 0.
    sizes = values.detach().abs()
    return (sizes.amax(inside(sizes)) if sizes.dim() > 1 else sizes) < torch.inf


def inside(values: Tensor) -> list[int]:
    """All dims but the first: reduced at once, with no copy of what is not contiguous."""
    return list(range(1, values.dim()))


def _column(like: Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (like.dim() - 1))


# pull and gather: two names, so that graphs say which way chunks move.


def _save_maps(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _move_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return torch.ops.kasmina.pull.default(grad, inverse, index), None, None


def _fake_move(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return f.new_empty([index.shape[0], *f.shape[1:]])


def _decomposed_move(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    # An index, not index_select: Inductor makes it a pointwise load, which fuses. Unsafe, because
    # the maps are ours, and a bounds check for each row of each chunk slows a CPU's blend.
    taken = torch.ops.aten._unsafe_index.Tensor(f, [index.clamp_min(0)])
    masked: Tensor = taken.masked_fill((index < 0).view(_column(f)), 0.0)
    return masked


for _name in ("pull", "gather"):
    _op = torch.library.custom_op(
        f"kasmina::{_name}",
        take,
        mutates_args=(),
        schema="(Tensor f, Tensor index, Tensor inverse) -> Tensor",
    )
    _op.register_fake(_fake_move)
    _op.register_autograd(_move_backward, setup_context=_save_maps)


# guard


@torch.library.custom_op(
    "kasmina::guard",
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor modes, Tensor positions, Tensor faults, Tensor blames) "
    "-> Tensor[]",
)
def _guard(
    tensors: Sequence[Tensor], modes: Tensor, positions: Tensor, faults: Tensor, blames: Tensor
) -> list[Tensor]:
    return [*(t.clone() for t in tensors), _alone(modes)]


@_guard.register_fake
def _(
    tensors: Sequence[Tensor], modes: Tensor, positions: Tensor, faults: Tensor, blames: Tensor
) -> list[Tensor]:
    return [*(torch.empty_like(t) for t in tensors), _alone(modes)]


def _alone(modes: Tensor) -> Tensor:
    """float32 ``(K,)``: 1 for slots that don't learn from the model's loss."""
    return (modes != Mode.LEARNS).all(1).to(torch.float32)


def _save_modes(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2], inputs[4])


def _guard_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    modes, positions, blames = ctx.saved_tensors
    rows, *params, less = grads
    # Floating-point outputs: autograd makes zeros where no gradient comes.
    assert rows is not None
    assert less is not None
    # Values that are no parameters (counters of a user's module) have no gradient to check.
    params = [g if g is None else g * (1 + less).to(g.dtype).view(_column(g)) for g in params]
    faulty = ~reduce(torch.logical_and, [finite_rows(g) for g in (rows, *params) if g is not None])
    detached = (modes == Mode.RECONSTRUCTS) | faulty.unsqueeze(1)
    frozen = (modes == Mode.FROZEN).all(1) | faulty
    places = (*modes.shape, *[1] * (rows.dim() - 2))
    passed: list[Any] = [rows.masked_fill(detached.view(places), 0.0)]
    passed += [g if g is None else g.masked_fill(frozen.view(_column(g)), 0.0) for g in params]
    blamed = (faulty & blames.all(1)).float().unsqueeze(1).expand(modes.shape).reshape(-1)
    return passed, None, None, torch.ops.kasmina.pull.default(blamed, positions, positions), None


_guard.register_autograd(_guard_backward, setup_context=_save_modes)


# reconstruct


@torch.library.custom_op(
    "kasmina::reconstruct",
    mutates_args=(),
    schema="(Tensor f, Tensor rows, Tensor trainees, Tensor loss_scale, Tensor alone) -> Tensor",
)
def _reconstruct(
    f: Tensor, rows: Tensor, trainees: Tensor, loss_scale: Tensor, alone: Tensor
) -> Tensor:
    return f.clone()


@_reconstruct.register_fake
def _(f: Tensor, rows: Tensor, trainees: Tensor, loss_scale: Tensor, alone: Tensor) -> Tensor:
    return torch.empty_like(f)


def _as(dtype: torch.dtype, values: Tensor) -> Tensor:
    # Called for, .to() of the same dtype gives its input, which a schema may not say.
    return values if values.dtype == dtype else values.to(dtype)


def _save_errors(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    f, rows, trainees, loss_scale, alone = inputs
    wide = torch.promote_types(torch.promote_types(f.dtype, rows.dtype), torch.float32)
    error = _as(wide, take(f, trainees, trainees)) - _as(wide, take(rows, trainees, trainees))
    ctx.save_for_backward(error, trainees, loss_scale, alone)


#: Of a slot in float16: the sum of the magnitudes of the gradient that enters it, and so about the
#: largest that a weight's gradient is for inputs of 1; float16 ends at 65,504.
_ENTERS_AT_MOST: Final = 64.0


def _scaled_down(added: Tensor, slots: Tensor, alone: Tensor) -> tuple[Tensor, Tensor]:
    """``added`` ``(T, ...)`` divided by a power of two each slot, and these, ``(K,)``."""
    totals = torch.zeros_like(alone).index_add(0, slots, added.abs().sum(inside(added)).float())
    excess = (totals / _ENTERS_AT_MOST).log2().ceil().clamp_min(0.0) * alone
    by = excess.exp2()
    return added / by.index_select(0, slots).view(_column(added)), by


def _reconstruct_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, Tensor | None]:
    error, trainees, loss_scale, alone = ctx.saved_tensors
    # A gradient that comes in as NaN or Inf (an overflow of a scaled loss) is not the blueprint's
    # fault: it goes no further, and the host's own gradient shows it anyway.
    grad = grad.masked_fill(~finite_rows(grad).view(_column(grad)), 0.0)
    added = error * (2.0 / error[0].numel()) * loss_scale
    places, less = trainees.clamp_min(0), None
    if grad.dtype == torch.float16:
        added, by = _scaled_down(added, places // (grad.shape[0] // alone.shape[0]), alone)
        less = by - 1
    # Padding adds 0 to place 0; every other place occurs once, so the order does not matter.
    return grad.index_add(0, places, added.to(grad.dtype)), None, None, None, less


_reconstruct.register_autograd(_reconstruct_backward, setup_context=_save_errors)


PULL: Final = torch.ops.kasmina.pull.default
GATHER: Final = torch.ops.kasmina.gather.default
GUARD: Final = torch.ops.kasmina.guard.default
RECONSTRUCT: Final = torch.ops.kasmina.reconstruct.default

#: For ``compile_fx(decompositions=...)``.
DECOMPOSITIONS: Final[dict[Any, Callable[..., Any]]] = {
    PULL: _decomposed_move,
    GATHER: _decomposed_move,
    GUARD: lambda tensors, modes, positions, faults, blames: [*tensors, _alone(modes)],
    RECONSTRUCT: lambda f, rows, trainees, loss_scale, alone: f,
}


class Moves(NamedTuple):
    """The four operators, or what stands for them."""

    gather: Callable[[Tensor, Tensor, Tensor], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]
    guard: Callable[[list[Tensor], Tensor, Tensor, Tensor, Tensor], list[Tensor]]
    reconstruct: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _plain_guard(
    tensors: list[Tensor], modes: Tensor, positions: Tensor, faults: Tensor, blames: Tensor
) -> list[Tensor]:
    rows, *params = tensors
    frozen = ~(modes != Mode.FROZEN).any(1)
    trains = (modes == Mode.RECONSTRUCTS).view(*modes.shape, *[1] * (rows.dim() - 2))
    return [
        torch.where(trains, rows.detach(), rows),
        *(torch.where(frozen.view(_column(p)), p.detach(), p) for p in params),
        _alone(modes),
    ]


def _no_reconstruction(
    f: Tensor, rows: Tensor, trainees: Tensor, loss_scale: Tensor, alone: Tensor
) -> Tensor:
    return f


_OPERATORS: Final = Moves(GATHER, PULL, GUARD, RECONSTRUCT)
_PLAIN: Final = Moves(take, take, _plain_guard, _no_reconstruction)


def current() -> Moves:
    """The operators; under ``torch.func`` transforms plain code with the same values."""
    # torch.func does not take operators with a registered backward (torch 2.13). Plain code has the
    # same gradients too, but for the guard against NaN and the reconstruction loss.
    return _PLAIN if in_functorch() else _OPERATORS
