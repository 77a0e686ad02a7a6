"""The physical view: a layer's seeds as a handful of tensor operations, however many it has.

These functions are the meaning of the markers. Eager execution calls them; the passes trace them
once per layout and splice the graph in place of the marker.

    y --narrow, unflatten--> chunks (..., n, size, ...) --gather--> (K, M, ..., size, ...)
      --guard--> stacked blueprints --reconstruct--> f --mix--> chunks + alpha * (f - chunks)

Two things keep NaN and Inf from the host. A slot with one in its parameters does not run; else each
element decides for itself, where what was made or its blend does not fit the host's dtype. Nothing
in between looks at a whole batch: that would be a pass over memory between blueprint and blend.

The steps are operators (:mod:`kasmina_fx.physical.operators`) for what they do in backward:
``guard`` decides which gradients leave a blueprint (to its parameters, to its chunk),
``reconstruct`` adds the gradient of the reconstruction loss of seeds in TRAINING, ``mix`` sends
back to slots what ``gather`` took from seeds. ``notes`` has no backward: nobody's blend waits for
what is said of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import known_empty, size_of
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.lifecycle import Mode
from kasmina_fx.physical import operators
from kasmina_fx.physical.graph_inputs import NO_LOSS, BankInputs, BlendArguments, LayerTables
from kasmina_fx.physical.layout import ChunkLayout, Run
from kasmina_fx.physical.rows import beside, finite_rows


def blend(asked: BlendArguments) -> tuple[Tensor, Tensor]:
    """Compute ``kasmina::blend``: the output, like ``y``, and the notes, float32 ``(3, S)``."""
    y, layout, banks = asked.y, ChunkLayout.parse(asked.chunks), asked.bank_inputs()
    if not banks or known_empty(y):
        return y.clone(), no_notes(y, layout.num_seeds)
    dim = layout.feature_dim % y.dim() - y.dim()
    whole = LayerTables(*asked.layer)
    parts, notes = [], []
    for index, run in enumerate(layout.runs):
        mine = [bank for bank in banks if bank.spec.run == index]
        part, said = _blend_run(y, run, mine, whole.of(run), dim)
        parts.append(part)
        notes.append(said)
    return (torch.cat(parts, dim), torch.cat(notes, 1)) if len(parts) > 1 else (parts[0], notes[0])


def _blend_run(
    y: Tensor, run: Run, banks: Sequence[BankInputs], layer: LayerTables, dim: int
) -> tuple[Tensor, Tensor]:
    """Return a run's features after the blend, and the notes on its seeds."""
    own = y if run.width == size_of(y, dim) else y.narrow(dim, run.offset, run.width)
    if not banks:
        return own, no_notes(y, run.count)
    host = own.unflatten(dim, (run.count, run.size))
    outcomes = [_run_bank(host, bank, layer, dim) for bank in banks]
    rows, made, ran, positions, seeds = (list(column) for column in zip(*outcomes, strict=True))
    move = operators.current()
    out, _ = move.mix(host, made, ran, positions, seeds, layer.alpha, layer.roles, dim - 1)
    said = move.notes(made, rows, ran, positions, layer.alpha, layer.roles)
    return out.flatten(dim - 1, dim), said


class _Outcome(NamedTuple):
    """Holds what a bank's blueprints made of their chunks.

    ``rows`` are the chunks, and ``made`` what they made of these, ``(K, M, ..., size, ...)``;
    ``ran``, bool ``(K,)``, says which slots' parameters are finite. The tables are the bank's.
    """

    rows: Tensor
    made: Tensor
    ran: Tensor
    positions: Tensor
    seeds: Tensor


def _run_bank(host: Tensor, bank: BankInputs, layer: LayerTables, dim: int) -> _Outcome:
    """Run a bank's blueprints on their chunks of ``host`` ``(..., n, size, ...)``."""
    tables, move = bank.tables, operators.current()
    rows = move.gather(host, tables.seeds, tables.positions, dim - 1)
    # Overflow in the backward of a scaled loss is how a GradScaler finds its scale.
    blames = finite_rows(rows, 2) & (layer.loss_scale == 1)
    guarded, *stacks, alone, ran = move.guard(
        [rows, *bank.params], tables.modes, tables.positions, layer.faults, blames
    )
    made = _run(bank, guarded, stacks, dim)
    made = move.reconstruct(made, rows, tables.trainees, layer.loss_scale, alone, ran)
    return _Outcome(rows, made, ran, tables.positions, tables.seeds)


def _run(bank: BankInputs, rows: Tensor, stacks: list[Tensor], dim: int) -> Tensor:
    """Run the stacked blueprints on rows ``(K, M, ..., size, ...)``."""
    spec, modes = bank.spec, bank.tables.modes
    blueprint = lookup(spec.kind).in_mode(spec.training)
    outcome = blueprint.stacked(stacks, rows, dim)
    if not spec.shared:
        return outcome
    # Seeds that share parameters may be in different stages: what a frozen one sends back must not
    # train them. The two products are one in forward, after common subexpressions are merged.
    frozen = blueprint.stacked([p.detach() for p in stacks], rows, dim)
    return torch.where(beside(modes != int(Mode.FROZEN), outcome), outcome, frozen)


def no_notes(y: Tensor, count: int) -> Tensor:
    """Return notes of ``count`` seeds whose blueprint did not run."""
    zeros = y.new_zeros(count, dtype=torch.float32)
    return torch.stack([zeros, torch.full_like(zeros, NO_LOSS), zeros])
