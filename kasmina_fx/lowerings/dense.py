"""One pass over the output, with the activation that follows the layer, where most seeds run."""

from __future__ import annotations

import torch
from torch import Tensor

from kasmina_fx._torch.triton import launches_on
from kasmina_fx.lowerings.base import Lowering, Site, Wanted, Work
from kasmina_fx.lowerings.fused import Fused, in_tiles, plan_of, run_bank, tables_of
from kasmina_fx.lowerings.plan import plans_of
from kasmina_fx.lowerings.rows import BLENDED_ROWS, ROWS
from kasmina_fx.lowerings.share import why_no_pass, why_tiles
from kasmina_fx.physical.blend import no_notes
from kasmina_fx.physical.graph_inputs import BlendArguments, LayerTables
from kasmina_fx.physical.layout import ChunkLayout


class Dense(Lowering):
    """The lowering that reads and writes all features once, active or not.

    Where an activation that keeps its input for backward uses the output alone, that pass happens
    anyway and this one takes its place. :class:`Fused` touches active chunks alone. The share of
    seeds with a slot when the graph is compiled decides; either computes the same whatever comes
    later, so nothing is compiled anew for it.
    """

    name = "dense"
    absorbs = True

    def why_not(self, site: Site) -> str | None:
        """See :meth:`Lowering.why_not`: the kernels are of the same kinds, but on CPUs."""
        if not launches_on(site.device):
            return f"no Triton kernel runs on {site.device.type} here"
        return why_no_pass(site) or Fused().why_not(site)

    def why_rather_not(self, site: Site) -> str | None:
        """See :meth:`Lowering.why_rather_not`."""
        return why_tiles(site)

    def work(self, site: Site) -> Work:
        """See :meth:`Lowering.work`: tiles are of neighbours, and seeds that run lie anywhere."""
        work = site.work(site.running, launches=len(site.banks), full=site.numbers)
        plans = zip(plans_of(site), site.running, strict=True)
        return in_tiles(site, work, [min(p.count, n * p.tiling.seeds) for p, n in plans])

    def blend(self, asked: BlendArguments, wanted: Wanted) -> tuple[Tensor, ...]:
        """See :mod:`kasmina_fx.lowerings.rows`.

        The bank of the widest run is last and takes the pass; those before it act in place.
        """
        layout, whole = ChunkLayout.parse(asked.chunks), LayerTables(*asked.layer)
        banks, out = asked.bank_inputs(), asked.y
        told: list[Tensor | None] = [None] * len(layout.runs)
        banks.sort(key=lambda bank: layout.runs[bank.spec.run].width)  # stable
        for bank in banks[:-1]:
            run, before = layout.runs[bank.spec.run], told[bank.spec.run]
            out, told[bank.spec.run] = run_bank(
                out, before, bank, whole, run, wanted, followed=True
            )
        last = banks[-1]
        run, before = layout.runs[last.spec.run], told[last.spec.run]
        tables, plan = tables_of(last, whole, run), str(plan_of(out, last, run))
        seen: list[Tensor] = []
        if wanted.sample is not None:
            seen.append(BLENDED_ROWS(out, tables, list(last.params), plan, *wanted.sample))
        out, told[last.spec.run] = ROWS(
            out, tables, list(last.params), before, plan, wanted.then, wanted.notes
        )
        notes = [
            no_notes(asked.y, run.count) if said is None else said
            for run, said in zip(layout.runs, told, strict=True)
        ]
        return out, torch.cat(notes, 1) if len(notes) > 1 else notes[0], *seen
