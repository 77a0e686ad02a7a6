"""Operators that decide which gradients leave a blueprint.

``guard(tensors, modes, positions, faults, blames)``
    The identity on a bank's rows ``(K, M, ...)`` and on the first K of its parameters
    ``(capacity >= K, ...)``. Backward lets through what is finite (0 x NaN is NaN: what forward
    kept from the host could still poison its gradient) and what a slot's mode allows: each element
    of the rows' gradient for itself, the parameters' of a slot only together; frozen parameters get
    none, and no chunk gets any from a seed in TRAINING. Slots of which something was refused are
    counted in the gradient of ``faults`` ``(n,)``, where it can be nothing but the blueprint's
    fault (``blames``, bool ``(K, M)``). Two more outputs: ``alone``, float32 ``(K,)``, is 1 for
    slots that do not learn from the model's loss, whose gradients may be scaled down on the way
    here; ``sane``, bool ``(K,)``, says of which slots all parameters are finite.
``reconstruct(f, rows, trainees, loss_scale, alone, ran)``
    The identity on ``f`` ``(K, M, ...)``. Backward adds the gradient of ``loss_scale`` times the
    mean squared difference of ``f`` from ``rows``, a sum over the places in ``trainees``: an
    auxiliary loss that needs no change of the training loop, as mixture-of-experts layers inject
    theirs. Slots that did not run (``ran``, bool ``(K,)``) and elements that are not finite add
    nothing. In float16 a GradScaler's scale is for the model's loss, and would overflow this one:
    slots that are ``alone`` get a power of two less, and guard multiplies it in again. How much
    comes there as the gradient of ``alone``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from kasmina_fx._torch.tracing import known_one, known_same
from kasmina_fx.lifecycle import Mode
from kasmina_fx.physical.moves import flat, unchecked
from kasmina_fx.physical.rows import beside, finite_rows, inside, kept, sane_slots


@torch.library.custom_op(
    "kasmina::guard",
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor modes, Tensor positions, Tensor faults, Tensor blames) "
    "-> Tensor[]",
)
def _guard(
    tensors: Sequence[Tensor], modes: Tensor, positions: Tensor, faults: Tensor, blames: Tensor
) -> list[Tensor]:
    return [*(t.clone() for t in in_use(tensors)), *of_slots(tensors, modes)]


@_guard.register_fake
def _(
    tensors: Sequence[Tensor], modes: Tensor, positions: Tensor, faults: Tensor, blames: Tensor
) -> list[Tensor]:
    return [*(torch.empty_like(t) for t in in_use(tensors)), *of_slots(tensors, modes)]


def in_use(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a bank's rows, and of its parameters those of the slots in use."""
    rows, *params = tensors
    return [rows, *(p.narrow(0, 0, rows.shape[0]) for p in params)]


def of_slots(tensors: Sequence[Tensor], modes: Tensor) -> tuple[Tensor, Tensor]:
    """Return guard's last outputs: ``alone`` and ``sane``."""
    alone = all_places(modes != int(Mode.LEARNS)).to(torch.float32)
    return alone, sane_slots(in_use(tensors)[1:], modes)


def all_places(said: Tensor) -> Tensor:
    """Say of slots, bool ``(K,)``, whether it is said of all their places, bool ``(K, M)``."""
    return said.squeeze(1) if known_one(said.shape[1]) else said.all(1)


def _save_modes(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2], inputs[4], output[-1])
    ctx.set_materialize_grads(False)
    ctx.capacities = [p.shape[0] for p in inputs[0][1:]]


def _guard_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    modes, positions, blames, ran = ctx.saved_tensors
    # None of values that are no parameters (counters of a user's module) or that nothing used.
    rows, *params, less, _ = grads
    if less is not None:
        by = 1 + less
        params = [g if g is None else g * beside(by, g).to(g.dtype) for g in params]
    sane = sane_slots([g for g in params if g is not None], modes)
    idle = all_places(modes == int(Mode.FROZEN))  # nobody asked for the gradients of its parameters
    taken, fine = sane & ~idle, sane | idle
    passed: list[Any] = [None]
    if rows is not None:
        finite = rows.abs() < torch.inf
        passed = [kept(rows, finite & beside(modes != int(Mode.RECONSTRUCTS), rows))]
        fine = fine & finite_rows(rows)
    for g, capacity in zip(params, ctx.capacities, strict=True):
        passed.append(g if g is None else _padded(kept(g, beside(taken, g)), capacity))
    blamed = beside((~fine & ran & all_places(blames)).float(), modes).expand(modes.shape)
    return passed, None, None, torch.ops.kasmina.pull.default(blamed, positions, modes, -1), None


def _padded(used: Tensor, capacity: Any) -> Tensor:
    """Add zeros for the slots that are not in use."""
    if known_same(capacity, used.shape[0]):
        return used
    return F.pad(used, [0, 0] * (used.dim() - 1) + [0, capacity - used.shape[0]])


_guard.register_autograd(_guard_backward, setup_context=_save_modes)


# reconstruct


@torch.library.custom_op(
    "kasmina::reconstruct",
    mutates_args=(),
    schema="(Tensor f, Tensor rows, Tensor trainees, Tensor loss_scale, Tensor alone, "
    "Tensor ran) -> Tensor",
)
def _reconstruct(
    f: Tensor, rows: Tensor, trainees: Tensor, loss_scale: Tensor, alone: Tensor, ran: Tensor
) -> Tensor:
    return f.clone()


@_reconstruct.register_fake
def _(
    f: Tensor, rows: Tensor, trainees: Tensor, loss_scale: Tensor, alone: Tensor, ran: Tensor
) -> Tensor:
    return torch.empty_like(f)


def as_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert; values of that dtype are what is returned, and no node of a graph."""
    # Called for, .to() of the same dtype gives its input, which a schema may not say.
    return values if values.dtype == dtype else values.to(dtype)


def wide_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return a dtype that holds both, float32 or more."""
    # torch.promote_types would be a node of an exported graph.
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def overflows(made: Tensor, host: Tensor) -> bool:
    """Say whether what was made may be finite, and not in the host's dtype."""
    return torch.finfo(made.dtype).max > torch.finfo(host.dtype).max


def _save_errors(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    f, rows, trainees, loss_scale, alone, ran = inputs
    wide, places = wide_dtype(f, rows), f.shape[1]
    f, rows = (unchecked(flat(t), [trainees]) for t in (f, rows))
    error = as_dtype(f, wide) - as_dtype(rows, wide)
    slots = trainees if known_one(places) else trainees // places
    counts = error.abs() < torch.inf
    if overflows(f, rows):
        counts = counts & (f.to(rows.dtype).abs() < torch.inf)
    counts = counts & beside(unchecked(ran, [slots]) & (trainees >= 0), error)
    ctx.save_for_backward(kept(error, counts), trainees, loss_scale, alone)


#: Of a slot in float16: the sum of the magnitudes of the gradient that enters it, and so about the
#: largest that a weight's gradient is for inputs of 1; float16 ends at 65,504.
_ENTERS_AT_MOST: Final = 64.0


def _scaled_down(added: Tensor, slots: Tensor, alone: Tensor) -> tuple[Tensor, Tensor]:
    """Divide ``added`` ``(T, ...)`` by a power of two each slot; return these too, ``(K,)``."""
    totals = torch.zeros_like(alone).index_add(0, slots, added.abs().sum(inside(added)).float())
    excess = (totals / _ENTERS_AT_MOST).log2().ceil().clamp_min(0.0) * alone
    by = excess.exp2()
    return added / beside(by.index_select(0, slots), added), by


def _reconstruct_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor, None, None, None, Tensor | None, None]:
    error, trainees, loss_scale, alone = ctx.saved_tensors
    # A gradient that comes in as NaN or Inf (an overflow of a scaled loss) is not the blueprint's
    # fault: it goes no further, and the host's own gradient shows it anyway.
    taken = flat(kept(grad, grad.abs() < torch.inf))
    added = error * (2.0 / error[0].numel()) * loss_scale
    places, less = trainees.clamp_min(0), None
    if grad.dtype == torch.float16:
        added, by = _scaled_down(added, places // grad.shape[1], alone)
        less = by - 1
    # Padding adds 0 to place 0; every other place occurs once, so the order does not matter.
    out = taken.index_add(0, places, added.to(grad.dtype)).view(grad.shape)
    return out, None, None, None, less, None


_reconstruct.register_autograd(_reconstruct_backward, setup_context=_save_errors)
