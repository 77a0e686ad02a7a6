"""The physical view: a layer's seeds as a handful of tensor operations, however many it has.

These functions are the meaning of the markers. Eager execution calls them; the passes trace them
once per layout and splice the graph in place of the marker.

    y --narrow, unflatten--> chunks (n, ..., size, ...) --gather--> (K, M, ..., size, ...)
      --guard--> stacked blueprints --reconstruct--> --pull--> f, chunks + alpha * (f - chunks)

Two things keep NaN and Inf from the host. A slot with one in its parameters does not run; else each
element decides for itself, where what was made or its blend does not fit the host's dtype. Nothing
in between looks at a whole batch: that would be a pass over memory between blueprint and blend.

Three of the moves exist for what they do in backward: ``guard`` decides which gradients leave a
blueprint (to its parameters, to its chunk), ``reconstruct`` adds the gradient of the reconstruction
loss of seeds in TRAINING, ``gather`` and ``pull`` turn into each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import known_empty, known_one
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.lifecycle import Mode, Role
from kasmina_fx.physical import operators
from kasmina_fx.physical.graph_inputs import NO_LOSS, BankInputs, BlendArguments, LayerTables
from kasmina_fx.physical.layout import ChunkLayout, Run
from kasmina_fx.physical.rows import column, finite_rows, inside


def blend(asked: BlendArguments) -> tuple[Tensor, Tensor]:
    """Compute ``kasmina::blend``: the output, like ``y``, and the notes, float32 ``(3, S)``."""
    y, layout, banks = asked.y, ChunkLayout.parse(asked.chunks), asked.bank_inputs()
    if not banks or known_empty(y):
        return y.clone(), no_notes(y, layout.num_seeds)
    dim = layout.feature_dim % y.dim() - y.dim()
    whole = LayerTables(*asked.layer)
    parts, notes = [], []
    for index, run in enumerate(layout.runs):
        host, mine = chunks_of(y, run, dim), [bank for bank in banks if bank.spec.run == index]
        outcomes = [_run_bank(host, bank, whole.of(run), dim) for bank in mine]
        part, said = _blend_run(host, outcomes, whole.of(run))
        parts.append(part.movedim(0, dim - 1).flatten(dim - 1, dim))
        notes.append(said)
    return (torch.cat(parts, dim), torch.cat(notes, 1)) if len(parts) > 1 else (parts[0], notes[0])


def chunks_of(y: Tensor, run: Run, dim: int) -> Tensor:
    """View ``(count, ..., size, ...)`` of a run's chunks; ``dim`` is the feature dim, negative."""
    view = y.narrow(dim, run.offset, run.width)
    chunks: Tensor = view.unflatten(dim, (run.count, run.size))
    return chunks.movedim(dim - 1, 0)


class _Outcome(NamedTuple):
    """Holds what blueprints made of a run's chunks, seed by seed; zeros where none did.

    ``made`` is ``(n, ..., size, ...)``; ``ran`` bool ``(n,)``: a blueprint ran, its parameters are
    finite; ``said`` float32 ``(n, 3)``: 1 where it made something that can't be blended of a
    finite chunk, its mean squared difference from the chunk, and 1 where that is finite.
    """

    made: Tensor
    ran: Tensor
    said: Tensor

    def over(self, other: _Outcome) -> _Outcome:
        """Take this one where a blueprint ran, ``other`` elsewhere: a seed has one blueprint."""
        mine = self.ran.view(column(self.made))
        # A where, not a sum: what is not finite stays out.
        made = torch.where(mine, self.made, other.made)
        return _Outcome(made, self.ran | other.ran, self.said + other.said)


def _run_bank(host: Tensor, bank: BankInputs, layer: LayerTables, dim: int) -> _Outcome:
    """Run a bank's blueprints on their chunks of ``host`` ``(n, ..., size, ...)``."""
    tables = bank.tables
    index, positions = tables.seeds.view(-1), tables.positions
    move = operators.current()
    rows = move.gather(host, index, positions)
    sound = finite_rows(rows)
    # Overflow in the backward of a scaled loss is how a GradScaler finds its scale.
    blames = (sound & (layer.loss_scale == 1)).view(tables.modes.shape)
    made, alone, sane = _run(bank, rows.unflatten(0, tables.seeds.shape), layer.faults, blames, dim)
    made, ran = made.flatten(0, 1), _in_places(sane, tables.seeds)
    made = move.reconstruct(made, rows.detach(), tables.trainees, layer.loss_scale, alone, ran)
    said = _said(made.detach(), rows.detach(), ran, sound)
    return _Outcome(*(move.pull(t, positions, index) for t in (made, ran, said)))


def _in_places(of_slots: Tensor, seeds: Tensor) -> Tensor:
    """Repeat ``(K,)`` of slots for their places, ``(K * M,)``; ``seeds`` is ``(K, M)``."""
    if known_one(seeds.shape[1]):
        return of_slots
    return of_slots.unsqueeze(1).expand(seeds.shape).reshape(-1)


def _said(made: Tensor, rows: Tensor, ran: Tensor, sound: Tensor) -> Tensor:
    """Return ``said`` of :class:`_Outcome` in the slots' places: nobody's blend waits for it."""
    wide = _wide(rows, made)
    difference = made.to(wide) - rows.to(wide)
    finite = finite_rows(difference)  # and so are both
    if _overflows(made, rows):
        finite = finite & finite_rows(made.to(rows.dtype))
    fine = ran & finite
    loss = difference.square().mean(inside(rows)).float().masked_fill(~fine, 0.0)
    return torch.stack([(sound & ~fine).float(), loss, fine.float()], 1)


def _wide(host: Tensor, made: Tensor) -> torch.dtype:
    """Return a dtype that holds both, float32 or more."""
    return torch.promote_types(torch.promote_types(host.dtype, made.dtype), torch.float32)


def _overflows(made: Tensor, host: Tensor) -> bool:
    """Say whether what was made may be finite, and not in the host's dtype."""
    return torch.finfo(made.dtype).max > torch.finfo(host.dtype).max


def _blend_run(
    host: Tensor, outcomes: Sequence[_Outcome], layer: LayerTables
) -> tuple[Tensor, Tensor]:
    """Return a run's chunks after the blend, and the notes on its seeds."""
    if not outcomes:
        return host, no_notes(host, len(host))
    made, ran, said = reduce(_Outcome.over, outcomes)
    # float32 for half types: the difference of two close values has few correct bits in them.
    wide = _wide(host, made)
    exact = host.to(wide)
    alpha = layer.alpha.view(column(host)).to(wide)
    grown = (exact + alpha * (made.to(wide) - exact)).to(host.dtype)
    blends = ran & (layer.roles == Role.BLENDS)
    # A where, not a product with 0: what is not blended keeps its bits, NaN, Inf and -0 included.
    blended = blends.view(column(host)) & (grown.abs() < torch.inf)
    if _overflows(made, host):
        blended = blended & (made.to(host.dtype).abs() < torch.inf)
    out = torch.where(blended, grown, host)
    faulty, loss, fine = said.unbind(1)
    added = (layer.alpha * layer.alpha * loss).masked_fill(~blends, 0.0)
    return out, torch.stack([faulty, loss.masked_fill(fine == 0, NO_LOSS), added])


def _run(
    bank: BankInputs, rows: Tensor, faults: Tensor, blames: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the stacked blueprints on guarded rows ``(K, M, ..., size, ...)``.

    Returned are what they made, ``alone`` and ``sane``, guard's last outputs.
    """
    spec, tables = bank.spec, bank.tables
    blueprint = lookup(spec.kind).in_mode(spec.training)
    stacks = [p[: rows.shape[0]] for p in bank.params]
    rows, *stacks, alone, sane = operators.current().guard(
        [rows, *stacks], tables.modes, tables.positions, faults, blames
    )
    outcome = blueprint.stacked(stacks, rows, dim)
    if not spec.shared:
        return outcome, alone, sane
    # Seeds that share parameters may be in different stages: what a frozen one sends back must not
    # train them. The two products are one in forward, after common subexpressions are merged.
    frozen = blueprint.stacked([p.detach() for p in stacks], rows, dim)
    learns = (tables.modes != Mode.FROZEN).view(*tables.modes.shape, *[1] * (rows.dim() - 2))
    return torch.where(learns, outcome, frozen), alone, sane


def no_notes(y: Tensor, count: int) -> Tensor:
    """Return notes of ``count`` seeds whose blueprint did not run."""
    zeros = y.new_zeros(count, dtype=torch.float32)
    return torch.stack([zeros, torch.full_like(zeros, NO_LOSS), zeros])
