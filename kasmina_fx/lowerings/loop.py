"""One small subgraph a chunk, one after the other: for layers of few seeds, and users' modules.

Each chunk of a run that a bank acts on is blended as a layer of that one chunk would be, by
:mod:`kasmina_fx.physical.blend`. Chunks are cut out of ``y`` and parameters out of stacks that are
in the seeds' order, so that nothing is stacked: a user's module sees its own chunk, and no ``vmap``
asks it for a batching rule. The number of nodes follows the number of *chunks*, which a layout
fixes, and not that of slots in use: a germination is data here, too. Chunks whose seeds sleep are
computed as well, and left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kasmina_fx.lifecycle import Mode
from kasmina_fx.lowerings.base import Lowering, Site, Wanted, Work
from kasmina_fx.lowerings.matmul import pulled
from kasmina_fx.physical import blend, operators
from kasmina_fx.physical.graph_inputs import BankInputs, BlendArguments, LayerTables
from kasmina_fx.physical.layout import ChunkLayout, Run, format_banks

#: Subgraphs of a layer at most: each is some 60 nodes, and all are compiled.
MOST: Final = 4


class Loop(Lowering):
    """The lowering that takes seeds one by one."""

    name = "loop"

    def why_not(self, site: Site) -> str | None:
        """See :meth:`Lowering.why_not`."""
        if any(bank.shared for bank in site.banks):
            return "seeds that share parameters go through one product"
        chunks = sum(_chunks(site))
        if chunks > MOST:
            return f"a subgraph for each of {chunks} chunks: {MOST} are the most"
        return None

    def work(self, site: Site) -> Work:
        """See :meth:`Lowering.work`: all chunks are computed, active or not."""
        chunks = _chunks(site)
        return site.work(chunks, launches=sum(chunks), full=pulled(site))

    def blend(self, asked: BlendArguments, wanted: Wanted) -> tuple[Tensor, ...]:
        """See :meth:`Lowering.blend`."""
        y, layout = asked.y, ChunkLayout.parse(asked.chunks)
        dim, whole, banks = layout.feature_dim, LayerTables(*asked.layer), asked.bank_inputs()
        parts, notes = [], []
        # Splits, not slices: the backward of a split is one concatenation.
        widths = [run.width for run in layout.runs]
        for index, (run, part) in enumerate(zip(layout.runs, y.split(widths, dim), strict=True)):
            mine = [bank for bank in banks if bank.spec.run == index]
            if not mine:
                parts.append(part)
                notes.append(blend.no_notes(y, run.count))
            for one in _one_by_one(part, mine, whole.of(run), run, dim):
                out, said = blend.blend(one)
                parts.append(out)
                notes.append(said)
        if len(parts) == 1:
            return parts[0], notes[0]
        return torch.cat(parts, dim), torch.cat(notes, 1)


def _chunks(site: Site) -> list[int]:
    """Return of how many chunks each bank's blueprints are computed."""
    return [site.chunks.runs[bank.run].count for bank in site.banks]


class _OfSeeds(NamedTuple):
    """Holds a bank's tables and parameters in the order of the run's seeds, one each.

    ``sits`` and ``trains`` are 0 where a blueprint sits there, and reconstructs, else -1; of seeds
    without one, parameters are zeros.
    """

    sits: Sequence[Tensor]
    modes: Sequence[Tensor]
    trains: Sequence[Tensor]
    params: Sequence[Sequence[Tensor]]


def _one_by_one(
    part: Tensor, banks: list[BankInputs], layer: LayerTables, run: Run, dim: int
) -> Iterator[BlendArguments]:
    """Yield, for each chunk of a run, what a layer of that chunk alone would ask for."""
    if not banks:
        return
    chunks = str(ChunkLayout.of([run.size], dim))
    specs = format_banks([replace(bank.spec, run=0) for bank in banks])
    of_banks = [_of_seeds(bank) for bank in banks]
    alphas, roles, faults = (t.split(1) for t in layer[:3])
    for i, chunk in enumerate(part.split(run.size, dim)):
        sits = [own.sits[i] for own in of_banks]
        yield BlendArguments(
            chunk,
            [alphas[i], roles[i], faults[i], layer.loss_scale],
            [place.unsqueeze(0) for place in sits],
            sits,
            [own.modes[i].unsqueeze(0) for own in of_banks],
            [own.trains[i] for own in of_banks],
            sits,
            [stack[i] for own in of_banks for stack in own.params],
            chunks,
            specs,
        )


def _of_seeds(bank: BankInputs) -> _OfSeeds:
    tables = bank.tables
    positions, slots = tables.positions, tables.seeds.view(-1, 1)
    empty = positions < 0
    modes = tables.modes.view(-1).index_select(0, positions.clamp_min(0))
    modes = modes.masked_fill(empty, Mode.FROZEN)
    sits = torch.where(empty, -1, 0)
    trains = torch.where(modes == Mode.RECONSTRUCTS, 0, -1)
    pull, used = operators.current().pull, slots.shape[0]
    whole = [pull(p[:used].unsqueeze(1), positions, slots, -p.dim()) for p in bank.params]
    params = [p.split(1) for p in whole]
    return _OfSeeds(sits.split(1), modes.split(1), trains.split(1), params)
