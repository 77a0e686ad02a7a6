"""One pass over the output, with the activation that follows the layer, where most seeds run."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kasmina_fx._torch.triton import launches_on
from kasmina_fx.lowerings.base import Lowering, Site, Wanted
from kasmina_fx.lowerings.fused import Fused, plan_of, plans_of, run_bank, tables_of
from kasmina_fx.lowerings.plan import KERNELS
from kasmina_fx.lowerings.rows import BLENDED_ROWS, KEEP_THEIR_INPUT, ROWS
from kasmina_fx.physical.blend import no_notes
from kasmina_fx.physical.graph_inputs import BlendArguments, LayerTables
from kasmina_fx.physical.layout import ChunkLayout

#: Of the features, the share that makes one pass over all of them the cheaper way: at all of them
#: it moves two tensors forward where active chunks are read, put aside and written.
MOST: Final = 0.75
#: Whether "auto" may take it. On an H100 its kernels took two to five times as long as those of
#: tiles where few seeds run (docs/performance.md); with all it has not been measured.
AUTO: Final = False


class Dense(Lowering):
    """The lowering that reads and writes all features once, active or not.

    Where an activation that keeps its input for backward uses the output alone, that pass happens
    anyway and this one takes its place, whatever the share of active seeds. Elsewhere
    :class:`Fused` touches active chunks alone, unless most seeds run when the graph is compiled:
    either computes the same whatever comes later, so nothing is compiled anew for it.
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
        if not AUTO:
            return "it is taken where it is asked for by name"
        if site.then in KEEP_THEIR_INPUT or site.share >= MOST:
            return None
        if site.then:
            return f"few seeds run, and {site.then} keeps no input for backward"
        return "few seeds run, and no activation that keeps its input for backward rides along"

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
