"""Take seeds back to where they were: blueprint, alpha and state, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kasmina_fx.errors import InvalidArgument
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.seed_ids import SeedIds, as_seed_ids
from kasmina_fx.staging import LOCK
from kasmina_fx.state_tensor import COLUMN_NAMES

if TYPE_CHECKING:
    from kasmina_fx.bank import Bank
    from kasmina_fx.layer import KasminaLayer


@dataclass(frozen=True)
class Snapshot:
    """Some seeds of a layer at one moment.

    Attributes:
        layer_id: Whose.
        layout: Of the layer's chunks.
        seeds: int64 ``(n,)``; this and the next two are on the CPU.
        rows: int32 ``(n, 4)``: their rows of the state tensor.
        alpha: float32 ``(n,)``.
        blueprints: By seed that held one: the bank's key, and a copy of the slot's tensors.
    """

    layer_id: str
    layout: str
    seeds: Tensor
    rows: Tensor
    alpha: Tensor
    blueprints: dict[int, tuple[str, tuple[Tensor, ...]]]


@torch.no_grad()
def take(layer: KasminaLayer, seed_ids: SeedIds | None = None) -> Snapshot:
    """See :meth:`KasminaLayer.snapshot`."""
    ids = _ids(layer, seed_ids)
    blueprints = {}
    with LOCK:  # one moment's
        for seed in ids.tolist():
            held = layer.bank_of(seed)
            if held is not None:
                bank, slot = held
                tensors = tuple(t[slot].detach().clone() for t in bank.tensors())
                blueprints[seed] = (bank.key, tensors)
        return Snapshot(
            layer.layer_id,
            str(layer.kasmina.layout),
            ids,
            layer.state.rows[ids].clone(),
            layer.state.alphas[ids].clone(),
            blueprints,
        )


@torch.no_grad()
@torch.inference_mode(False)
def restore(
    layer: KasminaLayer, snapshot: Snapshot, seed_ids: SeedIds | None, mark: bool | None
) -> None:
    """See :meth:`KasminaLayer.rollback`."""
    mark = seed_ids is not None if mark is None else mark
    if snapshot.layout != str(layer.kasmina.layout):
        raise InvalidArgument(
            f"{layer.layer_id}: the snapshot is of chunks [{snapshot.layout}]; this layer has "
            f"[{layer.kasmina.layout}]"
        )
    if snapshot.layer_id != layer.layer_id:
        raise InvalidArgument(f"{layer.layer_id}: the snapshot is of {snapshot.layer_id}")
    ids = snapshot.seeds if seed_ids is None else _ids(layer, seed_ids)
    places = {seed: place for place, seed in enumerate(snapshot.seeds.tolist())}
    missing = [seed for seed in ids.tolist() if seed not in places]
    if missing:
        raise InvalidArgument(
            f"{layer.layer_id}: the snapshot does not hold seed {missing[0]}; it holds "
            f"{snapshot.seeds.tolist()[:8]}"
        )
    where = torch.tensor([places[seed] for seed in ids.tolist()], dtype=torch.int64, device="cpu")
    rows = snapshot.rows[where]
    lost = {key for key, _ in snapshot.blueprints.values()} - layer.kasmina.banks.keys()
    if lost:
        raise InvalidArgument(f"{layer.layer_id}: the layer has no banks {sorted(lost)} any more")
    _refuse_strangers(layer, snapshot, ids, rows)
    store = layer.kasmina
    store.highest_id = max(store.highest_id, *rows[:, layer.state.BLUEPRINT_ID_IDX].tolist(), 0)
    telemetry = store.telemetry
    with layer.transaction():
        # What went wrong since is not the restored blueprint's fault.
        layer.state.at_publication(lambda: telemetry.forget_blueprints(ids))
        if bool((rows[:, layer.state.LIFECYCLE_STATE_IDX] == SeedLifecycle.TRAINING).any()):
            layer.colony.find_scaler()
        if mark:
            layer.state.advance(ids, SeedLifecycle.ROLLED_BACK)
            rows[:, layer.state.LIFECYCLE_STATE_IDX] = SeedLifecycle.ROLLED_BACK
        keys = {snapshot.blueprints[s][0] for s in ids.tolist() if s in snapshot.blueprints}
        layer.state.at_publication(lambda: _renew(layer, keys))
        for seed, row in zip(ids.tolist(), rows, strict=True):
            _restore_blueprint(layer, snapshot, seed, row)
        layer.state.set_rows(ids, **dict(zip(COLUMN_NAMES, rows.unbind(1), strict=True)))
        layer.state.set_alpha(ids, snapshot.alpha[where])


def _refuse_strangers(layer: KasminaLayer, snapshot: Snapshot, ids: Tensor, rows: Tensor) -> None:
    """Refuse a private blueprint id that another seed has now."""
    others = torch.ones(layer.num_seeds, dtype=torch.bool, device="cpu")
    others[ids] = False
    taken = layer.state.blueprint_ids.where(others & layer.state.holding, 0)
    for seed, number in zip(ids.tolist(), rows[:, layer.state.BLUEPRINT_ID_IDX], strict=True):
        if int(number) in layer.kasmina.blueprints or seed not in snapshot.blueprints:
            continue
        owners = (taken == number).nonzero().flatten().tolist()
        if owners:
            raise InvalidArgument(
                f"{layer.layer_id}: the snapshot's blueprint {int(number)} of seed {seed} now is "
                f"that of seed {owners[0]}: an older state was loaded after the snapshot; take a "
                "new one"
            )


def _renew(layer: KasminaLayer, keys: set[str]) -> None:
    """New stacks to write to, where a backward still to run reads the old ones."""
    for bank in layer.kasmina.bank_list():
        if bank.key in keys and bank.awaits_backward:
            bank.grow(bank.capacity)


def _restore_blueprint(layer: KasminaLayer, snapshot: Snapshot, seed: int, row: Tensor) -> None:
    if seed not in snapshot.blueprints:
        return
    from kasmina_fx.optim.growth import clear_slots, write_rows  # which imports layers

    key, values = snapshot.blueprints[seed]
    bank: Bank = layer.kasmina.banks[key]  # type: ignore[assignment]  # holds nothing but banks
    number = row[layer.state.BLUEPRINT_ID_IDX : layer.state.BLUEPRINT_ID_IDX + 1].long()
    if int(bank.slot_of(number)) < 0:
        bank.acquire(number)

    def write() -> None:
        where = bank.slot_of(number)
        if int(where) >= 0:  # the same transaction may have let go of it
            for stack, value in zip(bank.tensors(), values, strict=True):
                write_rows(stack, where, value.unsqueeze(0))
            clear_slots(bank, where)  # momenta of what went wrong would bring it back

    layer.state.at_publication(write)


def _ids(layer: KasminaLayer, seed_ids: SeedIds | None) -> Tensor:
    if seed_ids is None:
        return torch.arange(layer.num_seeds, device="cpu")
    return as_seed_ids(seed_ids, layer.num_seeds, layer.layer_id)
