"""Samples of one batch go through different packs of a layer: each through its own blueprints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kasmina_fx._torch.dynamo import mark_dynamic
from kasmina_fx.banks.bank import Bank
from kasmina_fx.banks.placement import SMALLEST
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.lifecycle import roles
from kasmina_fx.physical import markers
from kasmina_fx.physical.graph_inputs import BankTables, GraphInputs, LayerTables
from kasmina_fx.physical.layout import BankSpec
from kasmina_fx.seeds.packs import KeptBank, KeptPack
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.buffers import to_device


@dataclass(frozen=True, eq=False)
class MixedPacks:
    """What the samples of a batch go through in one layer.

    Attributes:
        name: Of the layer.
        samples: In a batch.
        groups: For each pack its samples, a bool tensor ``(samples,)`` on the device, and what a
            blend reads; those that are in no group are the host's alone.
    """

    name: str
    samples: int
    groups: tuple[tuple[Tensor, GraphInputs], ...]

    def blend(self, y: Tensor, chunks: str, training: bool) -> Tensor:
        """Return what the packs make of a layer's output.

        Raises:
            InvalidArgument: The first dimension of ``y`` is not that of the samples.
        """
        if not y.dim() or len(y) != self.samples:
            raise InvalidArgument(
                f"{self.name} returned {tuple(y.shape)}; per_sample named {self.samples} samples, "
                "which have to be its first dimension"
            )
        out = y
        for samples, inputs in self.groups:
            # All go through each pack: sizes are the same whoever names it, and nothing recompiles.
            own = markers.BLEND(*inputs.blend_arguments(y, chunks, training))[0]
            out = torch.where(samples.view(-1, *[1] * (y.dim() - 1)), own, out)
        return out


@torch.no_grad()
@torch.inference_mode(False)
def mixed(store: SeedStore, packs: Mapping[str, KeptPack], names: list[str | None]) -> MixedPacks:
    """Return what samples go through, each of which names its pack, or None for the host alone."""
    device, groups = store.state.alpha.device, []
    for name, pack in packs.items():
        if pack.banks:
            samples = torch.tensor([own == name for own in names], dtype=torch.bool, device="cpu")
            own = to_device(samples, device)
            mark_dynamic(own, 0)
            groups.append((own, _inputs(store, pack)))
    return MixedPacks(store.name, len(names), tuple(groups))


def _inputs(store: SeedStore, pack: KeptPack) -> GraphInputs:
    """What a blend reads if the pack's own tensors are its stacks."""
    device = store.state.alpha.device
    rows, alpha = pack.rows_of_all(store.num_seeds)
    specs: list[BankSpec] = []
    tables: list[BankTables] = []
    params: list[Tensor] = []
    for bank in store.bank_list():
        kept = pack.banks.get(bank.key)
        if kept is not None:
            specs.append(bank.spec)
            tables.append(_tables(bank, kept, rows[bank.run.seeds], device))
            params += [_padded(own.values) for own in kept.stacks]
    faults = torch.zeros_like(store.telemetry.faults)
    layer = LayerTables(
        to_device(alpha, device), to_device(roles(rows[:, 0]), device), faults, store.scale()
    )
    return GraphInputs(layer, specs, tables, params)


def _tables(bank: Bank, kept: KeptBank, rows: Tensor, device: torch.device) -> BankTables:
    held = _padded(kept.held[kept.slots])
    tables = bank.placement(rows[:, 1], rows[:, 0], held).tables
    return BankTables(*(to_device(table, device) for table in tables))


def _padded(rows: Tensor) -> Tensor:
    """At least as many rows as a stack has."""
    more = max(0, SMALLEST - len(rows))
    return nn.functional.pad(rows, (*[0, 0] * (rows.dim() - 1), 0, more))
