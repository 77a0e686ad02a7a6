"""The physical view: a layer's seeds as a handful of tensor operations, however many it has.

These functions are the meaning of the markers. Eager execution calls them; the passes trace them
once per layout and splice the graph in place of the marker.

    y --narrow, unflatten--> chunks (n, ..., size, ...) --gather--> (K, M, ..., size, ...)
      --guard--> stacked blueprints --reconstruct--> --pull--> f, chunks + alpha * (f - chunks)

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

from kasmina_fx._torch.tracing import known_empty
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
        return y.clone(), _no_notes(y, layout.num_seeds)
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

    ``made`` is ``(n, ..., size, ...)``, ``finite`` bool ``(n,)``: a blueprint ran and can be
    blended; ``faulty`` bool ``(n,)``: it ran, on a finite chunk, and can't; ``loss`` float32
    ``(n,)``: its mean squared difference from the chunk.
    """

    made: Tensor
    finite: Tensor
    faulty: Tensor
    loss: Tensor

    def over(self, other: _Outcome) -> _Outcome:
        """Take this one where a blueprint ran, ``other`` elsewhere: a seed has one blueprint."""
        mine = self.finite.view(column(self.made))
        # A where, not a sum: what is not finite stays out.
        made = torch.where(mine, self.made, other.made)
        finite, faulty = self.finite | other.finite, self.faulty | other.faulty
        return _Outcome(made, finite, faulty, self.loss + other.loss)


def _run_bank(host: Tensor, bank: BankInputs, layer: LayerTables, dim: int) -> _Outcome:
    """Run a bank's blueprints on their chunks of ``host`` ``(n, ..., size, ...)``."""
    tables = bank.tables
    index, positions = tables.seeds.view(-1), tables.positions
    move = operators.current()
    rows = move.gather(host, index, positions)
    sound = finite_rows(rows)
    # Overflow in the backward of a scaled loss is how a GradScaler finds its scale.
    blames = (sound & (layer.loss_scale == 1)).view(tables.modes.shape)
    made, alone = _run(bank, rows.unflatten(0, tables.seeds.shape), layer.faults, blames, dim)
    made = made.flatten(0, 1)
    made = move.reconstruct(made, rows.detach(), tables.trainees, layer.loss_scale, alone)
    difference = _difference_of(made.detach(), rows.detach())
    finite = _finite(difference, made, rows)
    loss = difference.square().mean(inside(rows)).float().masked_fill(~finite, 0.0)
    outcome = (made, finite, sound & ~finite, loss)
    return _Outcome(*(move.pull(t, positions, index) for t in outcome))


def _difference_of(made: Tensor, rows: Tensor) -> Tensor:
    """Subtract in float32 or more."""
    wide = torch.promote_types(torch.promote_types(rows.dtype, made.dtype), torch.float32)
    return made.to(wide) - rows.to(wide)


def _finite(difference: Tensor, made: Tensor, rows: Tensor) -> Tensor:
    """Say, bool ``(P,)``, whether every blend with the chunk is finite in the host's dtype."""
    finite = finite_rows(difference)  # and so are both
    if torch.finfo(made.dtype).max > torch.finfo(rows.dtype).max:
        finite = finite & finite_rows(made.to(rows.dtype))
    return finite


def _blend_run(
    host: Tensor, outcomes: Sequence[_Outcome], layer: LayerTables
) -> tuple[Tensor, Tensor]:
    """Return a run's chunks after the blend, and the notes on its seeds."""
    if not outcomes:
        return host, _no_notes(host, len(host))
    outcome = reduce(_Outcome.over, outcomes)
    beside = column(host)
    # float32 for half types: the difference of two close values has few correct bits in them.
    wide = torch.promote_types(torch.promote_types(host.dtype, outcome.made.dtype), torch.float32)
    exact = host.to(wide)
    grown = exact + layer.alpha.view(beside).to(wide) * (outcome.made.to(wide) - exact)
    # A where, not a product with 0: an unblended chunk keeps its bits, NaN, Inf and -0 included.
    blended = outcome.finite & (layer.roles == Role.BLENDS)
    out = torch.where(blended.view(beside), grown.to(host.dtype), host)
    added = (layer.alpha * layer.alpha * outcome.loss).masked_fill(~blended, 0.0)
    loss = outcome.loss.masked_fill(~outcome.finite, NO_LOSS)
    return out, torch.stack([outcome.faulty.float(), loss, added])


def _run(
    bank: BankInputs, rows: Tensor, faults: Tensor, blames: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Run the stacked blueprints on guarded rows ``(K, M, ..., size, ...)``.

    Returned are what they made and ``alone``, guard's last output.
    """
    spec, tables = bank.spec, bank.tables
    blueprint = lookup(spec.kind).in_mode(spec.training)
    stacks = [p[: rows.shape[0]] for p in bank.params]
    rows, *stacks, alone = operators.current().guard(
        [rows, *stacks], tables.modes, tables.positions, faults, blames
    )
    outcome = blueprint.stacked(stacks, rows, dim)
    if not spec.shared:
        return outcome, alone
    # Seeds that share parameters may be in different stages: what a frozen one sends back must not
    # train them. The two products are one in forward, after common subexpressions are merged.
    frozen = blueprint.stacked([p.detach() for p in stacks], rows, dim)
    learns = (tables.modes != Mode.FROZEN).view(*tables.modes.shape, *[1] * (rows.dim() - 2))
    return torch.where(learns, outcome, frozen), alone


def _no_notes(y: Tensor, count: int) -> Tensor:
    """Return notes of ``count`` seeds whose blueprint did not run."""
    zeros = y.new_zeros(count, dtype=torch.float32)
    return torch.stack([zeros, torch.full_like(zeros, NO_LOSS), zeros])
