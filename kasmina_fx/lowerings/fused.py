"""One kernel a bank, forward and backward, that touches the chunks of active seeds alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from kasmina_fx._torch.triton import launches_on
from kasmina_fx.lowerings.base import Lowering, Site, Wanted, Work
from kasmina_fx.lowerings.launches import natively
from kasmina_fx.lowerings.native.library import why_none
from kasmina_fx.lowerings.plan import (
    KERNELS,
    LARGEST_HIDDEN,
    LARGEST_ON_CPU,
    LARGEST_SIZE,
    Plan,
    hidden_size,
    plans_of,
)
from kasmina_fx.lowerings.share import why_no_pass, why_tiles
from kasmina_fx.lowerings.tiles import FUSED
from kasmina_fx.physical.blend import no_notes
from kasmina_fx.physical.graph_inputs import BankInputs, BlendArguments, LayerTables
from kasmina_fx.physical.layout import ChunkLayout, Run

#: Numbers of a weight beyond which Triton's backward keeps its sums in memory, and from how many
#: rows on that costs more than products do: four to six times as much on an H100.
_SPILLS: Final = 4096
_MANY_ROWS: Final = 4096


class Fused(Lowering):
    """The lowering for built-in blueprints: kernels of Triton on GPUs, in C++ on CPUs."""

    name = "fused"

    def why_not(self, site: Site) -> str | None:
        """See :meth:`Lowering.why_not`."""
        native = natively(site.device)
        if not (native or launches_on(site.device)):
            return f"no Triton kernel runs on {site.device.type} here"
        if native and site.dtype != torch.float32:
            return f"kernels for a CPU compute in float32, not in {site.dtype}"
        if site.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"kernels compute in float32, bfloat16 and float16, not in {site.dtype}"
        if not site.features_last:
            return "kernels read features of the last dim of a contiguous output"
        return _why_no_bank(site, native) or (_why_not_native(site) if native else None)

    def why_rather_not(self, site: Site) -> str | None:
        """See :meth:`Lowering.why_rather_not`."""
        if natively(site.device):
            return None
        if why_no_pass(site) is None and why_tiles(site) is None:
            return f"{site.share:.0%} of the features run: one pass over all takes less"
        if site.training and site.rows >= _MANY_ROWS:
            for plan in plans_of(site):
                if plan.tiling.columns * plan.tiling.hidden > _SPILLS:
                    return f"sums of gradients of {plan.size} features are more than registers hold"
        return None

    def work(self, site: Site) -> Work:
        """See :meth:`Lowering.work`: of active chunks, in whole tiles on a GPU."""
        work = site.work(site.running, launches=len(site.banks))
        return work if natively(site.device) else in_tiles(site, work, site.running)

    def blend(self, asked: BlendArguments, wanted: Wanted) -> tuple[Tensor, ...]:
        """See :mod:`kasmina_fx.lowerings.tiles`: banks act on one output, one after the other."""
        layout, whole = ChunkLayout.parse(asked.chunks), LayerTables(*asked.layer)
        banks, out, notes = asked.bank_inputs(), asked.y, []
        left = len(banks)
        for index, run in enumerate(layout.runs):
            told: Tensor | None = None
            for bank in (bank for bank in banks if bank.spec.run == index):
                left -= 1
                out, told = run_bank(out, told, bank, whole, run, wanted, followed=left > 0)
            notes.append(no_notes(asked.y, run.count) if told is None else told)
        return out, torch.cat(notes, 1) if len(notes) > 1 else notes[0]


def _why_no_bank(site: Site, native: bool) -> str | None:
    for bank, shapes in zip(site.banks, site.sizes, strict=True):
        if bank.kind not in KERNELS:
            return f"blueprint {bank.kind} has no kernel"
        size, hidden = site.chunks.runs[bank.run].size, hidden_size(bank.kind, shapes)
        if native and size > LARGEST_ON_CPU:
            most = f"the {LARGEST_ON_CPU:,} of kernels for a CPU"
            return f"chunks of {size:,} features are more than {most}"
        if not native and (size > LARGEST_SIZE or hidden > LARGEST_HIDDEN):
            return f"chunks of {size} features are more than a program's registers hold"
    return None


def _why_not_native(site: Site) -> str | None:
    others = sorted(map(str, site.dtypes - {torch.float32}))
    if others:
        return f"kernels for a CPU read parameters in float32, not in {' and '.join(others)}"
    return why_none()  # asked last: it may have to compile


def run_bank(
    out: Tensor,
    told: Tensor | None,
    bank: BankInputs,
    whole: LayerTables,
    run: Run,
    wanted: Wanted,
    followed: bool,
) -> tuple[Tensor, Tensor]:
    """Blend one bank in place; return the output and notes, ``told`` being those so far.

    ``followed``: a kernel of another bank takes the output next.
    """
    given, plan = tables_of(bank, whole, run), str(plan_of(out, bank, run))
    how = (plan, wanted.backward, wanted.notes, followed)
    out, _, told = FUSED(out, given, list(bank.params), told, *how)
    return out, told


def plan_of(out: Tensor, bank: BankInputs, run: Run) -> Plan:
    """Return the plan of a bank's kernels on such an output."""
    return Plan(
        bank.spec.kind,
        size=run.size,
        hidden=hidden_size(bank.spec.kind, [p.shape[1:] for p in bank.params]),
        offset=run.offset,
        first_seed=run.first_seed,
        count=run.count,
        dot=str(_product_dtype(out, bank.params[0])).removeprefix("torch."),
    )


def in_tiles(site: Site, work: Work, seeds: Sequence[int]) -> Work:
    """Return a work whose chunks, so many of each bank, fill tiles block-diagonally."""
    elements = products = 0
    for plan, many in zip(plans_of(site), seeds, strict=True):
        tile = plan.tiling
        columns = site.rows * -(-many // tile.seeds) * tile.columns
        elements += columns
        products += columns * tile.hidden * 2 if plan.hidden else 0
    return work._replace(elements=elements, products=products)


def tables_of(bank: BankInputs, whole: LayerTables, run: Run) -> list[Tensor]:
    """Return what operators of one bank take as ``tables``."""
    tables = bank.tables
    given = [tables.order, tables.seeds, tables.positions, tables.modes]
    return [*given, whole.alpha, whole.roles, whole.of(run).faults, whole.loss_scale]


def _product_dtype(y: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(y.device.type):
        return torch.get_autocast_dtype(y.device.type)
    return torch.promote_types(y.dtype, weight.dtype)
