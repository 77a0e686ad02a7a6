"""The physical view: a layer's seeds as a handful of tensor operations, however many it has.

These functions are the meaning of the markers. Eager execution calls them; the passes trace them
once per layout and splice the graph in place of the marker.

    y --narrow, unflatten--> chunks (n, ..., size, ...) --gather--> (K, M, ..., size, ...)
      --guard--> stacked blueprints --reconstruct--> --pull--> chunks + alpha * (f - chunks)

Three of the moves exist for what they do in backward: ``guard`` decides which gradients leave a
blueprint (to its parameters, to its chunk), ``reconstruct`` adds the gradient of the reconstruction
loss of seeds in TRAINING, ``gather`` and ``pull`` turn into each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kasmina_fx import moves
from kasmina_fx._torch_compat import known_empty
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.layout import BankSpec, ChunkLayout, Run, parse_banks
from kasmina_fx.lifecycle import Mode
from kasmina_fx.tables import NO_LOSS, BankTables, LayerTables
from kasmina_fx.telemetry import merge_statistics

#: Weights of places whose blueprint does not reach the host.
NOT_BLENDED: Final = -1.0
REJECTED: Final = -2.0


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
        part, said = chunks_of(y, run, dim), _no_notes(y, run.count)
        host, mine = part, whole.of(run)
        for spec, bank, params_of_bank in zip(specs, tables, stacks, strict=True):
            if spec.run == index:
                part, said = _blend_bank(part, said, host, spec, mine, bank, params_of_bank, dim)
        parts.append(part.movedim(0, dim - 1).flatten(dim - 1, dim))
        notes.append(said)
    return (torch.cat(parts, dim), torch.cat(notes, 1)) if len(parts) > 1 else (parts[0], notes[0])


def chunks_of(y: Tensor, run: Run, dim: int) -> Tensor:
    """View ``(count, ..., size, ...)`` of a run's chunks; ``dim`` is the feature dim, negative."""
    view = y.narrow(dim, run.offset, run.width)
    chunks: Tensor = view.unflatten(dim, (run.count, run.size))
    return chunks.movedim(dim - 1, 0)


def _blend_bank(
    part: Tensor,
    said: Tensor,
    host: Tensor,
    spec: BankSpec,
    layer: LayerTables,
    bank: BankTables,
    params: Sequence[Tensor],
    dim: int,
) -> tuple[Tensor, Tensor]:
    """Blend one bank into ``part`` ``(n, ..., size, ...)``; add to the notes on its n seeds.

    ``host`` is the run before any bank, what blueprints read: a seed has one blueprint, so that for
    the seeds of this bank ``part`` still equals it.
    """
    index, positions = bank.seeds.view(-1), bank.positions
    move = moves.current()
    rows = move.gather(host, index, positions)
    stacked = rows.unflatten(0, bank.seeds.shape)
    outcome = _run(spec, layer, bank, params, stacked, dim).flatten(0, 1)
    outcome = move.reconstruct(outcome, rows.detach(), bank.trainees, layer.loss_scale)
    # One number a place: alpha, or why its blueprint does not reach the host.
    finite = moves.finite_rows(outcome)
    blends = (index >= 0) & (bank.modes.view(-1) != Mode.RECONSTRUCTS)
    weights = layer.alpha.index_select(0, index.clamp_min(0)).masked_fill(~blends, NOT_BLENDED)
    weights = weights.masked_fill(~finite, REJECTED)
    weight, mine = move.pull(weights, positions, index), positions >= 0
    blended = (mine & (weight >= 0)).view(column := (-1, *[1] * (part.dim() - 1)))
    pulled = move.pull(outcome, positions, index)
    # float32 for half types: the difference of two close values has few correct bits in them.
    wide = torch.promote_types(torch.promote_types(part.dtype, pulled.dtype), torch.float32)
    exact = part.to(wide)
    grown = exact + weight.view(column).to(wide) * (pulled.to(wide) - exact)
    # A where, not a product with 0: an unblended chunk keeps its bits, NaN, Inf and -0 included.
    out = torch.where(blended, grown.to(part.dtype), part)
    loss = _losses(outcome.detach(), rows.detach()).masked_fill(~finite, NO_LOSS)
    loss = move.pull(loss, positions, index)
    share = weight.clamp_min(0.0)
    mine_says = torch.stack([(weight == REJECTED).float(), loss, share * share * loss])
    return out, torch.where(mine, mine_says, said)


def _run(
    spec: BankSpec,
    layer: LayerTables,
    bank: BankTables,
    params: Sequence[Tensor],
    rows: Tensor,
    dim: int,
) -> Tensor:
    """The stacked blueprints on guarded rows ``(K, M, ..., size, ...)``."""
    blueprint = lookup(spec.kind).in_mode(spec.training)
    stacks = [p[: rows.shape[0]] for p in params]
    rows, *stacks = moves.current().guard([rows, *stacks], bank.modes, bank.positions, layer.faults)
    outcome = blueprint.stacked(stacks, rows, dim)
    if not spec.shared:
        return outcome
    # Seeds that share parameters may be in different stages: what a frozen one sends back must not
    # train them. The two products are one in forward, after common subexpressions are merged.
    frozen = blueprint.stacked([p.detach() for p in stacks], rows, dim)
    learns = (bank.modes != Mode.FROZEN).view(*bank.modes.shape, *[1] * (rows.dim() - 2))
    return torch.where(learns, outcome, frozen)


def _losses(outcome: Tensor, rows: Tensor) -> Tensor:
    """Mean squared difference of each place's outcome from its chunk: float32 ``(P,)``."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (outcome.to(wide) - rows.to(wide)).square().flatten(1).mean(1).float()


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
