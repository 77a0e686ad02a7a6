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

from kasmina_fx import moves
from kasmina_fx._torch_compat import known_empty
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.layout import BankSpec, ChunkLayout, Run, parse_banks
from kasmina_fx.lifecycle import Mode, Role
from kasmina_fx.tables import NO_LOSS, BankTables, LayerTables
from kasmina_fx.telemetry import merge_statistics


def blend(
    y: Tensor,
    layer: Sequence[Tensor],
    seeds: Sequence[Tensor],
    positions: Sequence[Tensor],
    modes: Sequence[Tensor],
    trainees: Sequence[Tensor],
    params: Sequence[Tensor],
    chunks: str,
    banks: str,
) -> tuple[Tensor, Tensor]:
    """``kasmina::blend``; shapes in :mod:`kasmina_fx.ops`."""
    layout, specs = ChunkLayout.parse(chunks), parse_banks(banks)
    if not specs or known_empty(y):
        return y.clone(), _no_notes(y, layout.num_seeds)
    dim = layout.feature_dim % y.dim() - y.dim()
    whole = LayerTables(*layer)
    tables = [BankTables(*t) for t in zip(seeds, positions, modes, trainees, strict=True)]
    stacks, first = [], 0
    for spec in specs:
        stacks.append(params[first : first + spec.num_params])
        first += spec.num_params
    parts, notes = [], []
    for index, run in enumerate(layout.runs):
        host = chunks_of(y, run, dim)
        outcomes = [
            _run_bank(host, spec, whole.of(run), bank, params_of_bank, dim)
            for spec, bank, params_of_bank in zip(specs, tables, stacks, strict=True)
            if spec.run == index
        ]
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
    """What blueprints made of a run's chunks, seed by seed; zeros where none did.

    ``made`` is ``(n, ..., size, ...)``, ``finite`` bool ``(n,)``: a blueprint ran and can be
    blended; ``faulty`` bool ``(n,)``: it ran, on a finite chunk, and can't; ``loss`` float32
    ``(n,)``: its mean squared difference from the chunk.
    """

    made: Tensor
    finite: Tensor
    faulty: Tensor
    loss: Tensor

    def over(self, other: _Outcome) -> _Outcome:
        """This one where a blueprint ran, the ``other`` elsewhere: a seed has one blueprint."""
        mine = self.finite.view(_column(self.made))
        # A where, not a sum: what is not finite stays out.
        made = torch.where(mine, self.made, other.made)
        finite, faulty = self.finite | other.finite, self.faulty | other.faulty
        return _Outcome(made, finite, faulty, self.loss + other.loss)


def _run_bank(
    host: Tensor,
    spec: BankSpec,
    layer: LayerTables,
    bank: BankTables,
    params: Sequence[Tensor],
    dim: int,
) -> _Outcome:
    """Run a bank's blueprints on their chunks of ``host`` ``(n, ..., size, ...)``."""
    index, positions = bank.seeds.view(-1), bank.positions
    move = moves.current()
    rows = move.gather(host, index, positions)
    sound = moves.finite_rows(rows)
    # Overflow in the backward of a scaled loss is how a GradScaler finds its scale.
    blames = (sound & (layer.loss_scale == 1)).view(bank.modes.shape)
    made, alone = _run(spec, layer, bank, params, rows.unflatten(0, bank.seeds.shape), blames, dim)
    made = made.flatten(0, 1)
    made = move.reconstruct(made, rows.detach(), bank.trainees, layer.loss_scale, alone)
    difference = difference_of(made.detach(), rows.detach())
    finite = _finite(difference, made, rows)
    loss = difference.square().mean(moves.inside(rows)).float().masked_fill(~finite, 0.0)
    outcome = (made, finite, sound & ~finite, loss)
    return _Outcome(*(move.pull(t, positions, index) for t in outcome))


def difference_of(made: Tensor, rows: Tensor) -> Tensor:
    """In float32 or more."""
    wide = torch.promote_types(torch.promote_types(rows.dtype, made.dtype), torch.float32)
    return made.to(wide) - rows.to(wide)


def _finite(difference: Tensor, made: Tensor, rows: Tensor) -> Tensor:
    """Bool ``(P,)``: is any blend of what was made with its chunk finite in the host's dtype?"""
    finite = moves.finite_rows(difference)  # and so are both
    if torch.finfo(made.dtype).max > torch.finfo(rows.dtype).max:
        finite = finite & moves.finite_rows(made.to(rows.dtype))
    return finite


def can_be_blended(made: Tensor, chunk: Tensor) -> bool:
    """For one chunk: is what a blueprint made of it finite, and any blend of the two?"""
    rows, made = chunk.detach().unsqueeze(0), made.detach().unsqueeze(0)
    return bool(_finite(difference_of(made, rows), made, rows))


def _blend_run(
    host: Tensor, outcomes: Sequence[_Outcome], layer: LayerTables
) -> tuple[Tensor, Tensor]:
    """A run's chunks after the blend, and the notes on its seeds."""
    if not outcomes:
        return host, _no_notes(host, len(host))
    outcome = reduce(_Outcome.over, outcomes)
    column = _column(host)
    # float32 for half types: the difference of two close values has few correct bits in them.
    wide = torch.promote_types(torch.promote_types(host.dtype, outcome.made.dtype), torch.float32)
    exact = host.to(wide)
    grown = exact + layer.alpha.view(column).to(wide) * (outcome.made.to(wide) - exact)
    # A where, not a product with 0: an unblended chunk keeps its bits, NaN, Inf and -0 included.
    blended = outcome.finite & (layer.roles == Role.BLENDS)
    out = torch.where(blended.view(column), grown.to(host.dtype), host)
    added = (layer.alpha * layer.alpha * outcome.loss).masked_fill(~blended, 0.0)
    loss = outcome.loss.masked_fill(~outcome.finite, NO_LOSS)
    return out, torch.stack([outcome.faulty.float(), loss, added])


def _run(
    spec: BankSpec,
    layer: LayerTables,
    bank: BankTables,
    params: Sequence[Tensor],
    rows: Tensor,
    blames: Tensor,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """The stacked blueprints on guarded rows ``(K, M, ..., size, ...)``; what guard says more."""
    blueprint = lookup(spec.kind).in_mode(spec.training)
    stacks = [p[: rows.shape[0]] for p in params]
    rows, *stacks, alone = moves.current().guard(
        [rows, *stacks], bank.modes, bank.positions, layer.faults, blames
    )
    outcome = blueprint.stacked(stacks, rows, dim)
    if not spec.shared:
        return outcome, alone
    # Seeds that share parameters may be in different stages: what a frozen one sends back must not
    # train them. The two products are one in forward, after common subexpressions are merged.
    frozen = blueprint.stacked([p.detach() for p in stacks], rows, dim)
    learns = (bank.modes != Mode.FROZEN).view(*bank.modes.shape, *[1] * (rows.dim() - 2))
    return torch.where(learns, outcome, frozen), alone


def _column(like: Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (like.dim() - 1))


def _no_notes(y: Tensor, count: int) -> Tensor:
    """Notes of ``count`` seeds whose blueprint did not run."""
    zeros = y.new_zeros(count, dtype=torch.float32)
    return torch.stack([zeros, torch.full_like(zeros, NO_LOSS), zeros])


def observe(y: Tensor, notes: Tensor | None, telemetry: Tensor, chunks: str, one_in: int) -> None:
    """``kasmina::observe``; shapes in :mod:`kasmina_fx.ops`."""
    if known_empty(y):
        return
    layout = ChunkLayout.parse(chunks)
    with torch.no_grad():
        telemetry.copy_(merge_statistics(y.detach(), notes, telemetry, layout, one_in))
