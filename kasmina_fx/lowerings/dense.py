"""One pass over the output, with the activation that follows the layer, where most seeds run."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kasmina_fx._torch.triton import launches_on
from kasmina_fx.lowerings.base import Lowering, Site, Wanted, Work
from kasmina_fx.lowerings.fused import Fused, in_tiles, plan_of, plans_of, run_bank, tables_of
from kasmina_fx.lowerings.plan import KERNELS
from kasmina_fx.lowerings.rows import BLENDED_ROWS, KEEP_THEIR_INPUT, ROWS
from kasmina_fx.physical.blend import no_notes
from kasmina_fx.physical.graph_inputs import BlendArguments, LayerTables
from kasmina_fx.physical.layout import ChunkLayout, power_of_two

#: From which share of the features on "auto" passes over all of them: where an activation rides
#: along that keeps its input for backward, the same where chunks fill tiles (of 4, 8, 16, ...
#: features, loaded several at a time), and where none does. An H100 breaks even there, by
#: ``kernels.py``: of 4,096 features, half of them active, a step took 460 us where tiles and a
#: GELU took 940.
SHARE: Final = 0.25
FILLED: Final = 0.05
ALONE: Final = 0.35


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
        for bank in site.banks:
            if bank.kind in KERNELS and not KERNELS[bank.kind].rows:
                return f"blueprint {bank.kind} has no kernel of whole rows"
        if site.dtype == torch.float32 and any(plan.wide for plan in plans_of(site)):
            return "float32 products of wide chunks are more than a program's registers hold"
        return Fused().why_not(site)

    def why_rather_not(self, site: Site) -> str | None:
        """See :meth:`Lowering.why_rather_not`."""
        rides = site.then in KEEP_THEIR_INPUT
        filled = all(p.size >= 4 and p.size == power_of_two(p.size) for p in plans_of(site))
        if site.share >= (ALONE if not rides else FILLED if filled else SHARE):
            return None
        beside = "" if rides else ", and no activation that keeps its input rides along"
        return f"{site.share:.0%} of the features run: tiles touch these alone{beside}"

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
            out, told[bank.spec.run] = run_bank(out, before, bank, whole, run, wanted)
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
