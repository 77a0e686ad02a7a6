"""Take seeds back to where they were: blueprint, alpha and state, to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kasmina_fx.arguments import SeedIds, as_seed_ids, check_instance
from kasmina_fx.banks.bank import Bank
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.state_columns import COLUMN_NAMES


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

    def check(self, store: SeedStore, ids: Tensor) -> Tensor:
        """Refuse what is not a snapshot of these seeds of this layer.

        Returns:
            Their places in the snapshot, int64 ``(n,)``.

        Raises:
            InvalidArgument: It is of another layout or layer, lacks a seed, or the layer lacks a
                bank.
        """
        if self.layout != str(store.layout):
            raise InvalidArgument(
                f"{store.name}: the snapshot is of chunks [{self.layout}]; this layer has "
                f"[{store.layout}]"
            )
        if self.layer_id != store.name:
            raise InvalidArgument(f"{store.name}: the snapshot is of {self.layer_id}")
        places = {seed: place for place, seed in enumerate(self.seeds.tolist())}
        missing = [seed for seed in ids.tolist() if seed not in places]
        if missing:
            raise InvalidArgument(
                f"{store.name}: the snapshot does not hold seed {missing[0]}; it holds "
                f"{self.seeds.tolist()[:8]}"
            )
        lost = {key for key, _ in self.blueprints.values()} - store.banks.keys()
        if lost:
            raise InvalidArgument(f"{store.name}: the layer has no banks {sorted(lost)} any more")
        found = [places[seed] for seed in ids.tolist()]
        return torch.tensor(found, dtype=torch.int64, device="cpu")


@torch.no_grad()
def take(store: SeedStore, seed_ids: SeedIds | None = None) -> Snapshot:
    """See :meth:`KasminaLayer.snapshot`."""
    ids = _ids(store, seed_ids)
    blueprints = {}
    with store.siblings.threads.commands:  # one moment's
        for seed in ids.tolist():
            held = store.bank_of(seed)
            if held is not None:
                bank, slot = held
                tensors = tuple(t[slot].detach().clone() for t in bank.tensors())
                blueprints[seed] = (bank.key, tensors)
        return Snapshot(
            store.name,
            str(store.layout),
            ids,
            store.state.rows[ids].clone(),
            store.state.alphas[ids].clone(),
            blueprints,
        )


@torch.no_grad()
@torch.inference_mode(False)
def restore(
    store: SeedStore, snapshot: Snapshot, seed_ids: SeedIds | None, mark: bool | None
) -> None:
    """See :meth:`KasminaLayer.rollback`."""
    check_instance("snapshot", snapshot, Snapshot)
    if mark is not None:
        check_instance("mark", mark, bool)
    mark = seed_ids is not None if mark is None else mark
    ids = snapshot.seeds if seed_ids is None else _ids(store, seed_ids)
    where = snapshot.check(store, ids)
    rows, state, telemetry = snapshot.rows[where], store.state, store.telemetry
    _refuse_strangers(store, snapshot, ids, rows)
    store.highest_id = max(store.highest_id, *rows[:, state.BLUEPRINT_ID_IDX].tolist(), 0)
    keys = {snapshot.blueprints[s][0] for s in ids.tolist() if s in snapshot.blueprints}
    with store.transaction():
        if mark:
            state.advance(ids, SeedLifecycle.ROLLED_BACK)
            rows[:, state.LIFECYCLE_STATE_IDX] = SeedLifecycle.ROLLED_BACK
        # At publication, in this order: what went wrong since is not the restored blueprint's
        # fault; then new stacks, where a backward still to run reads the old ones; then, below,
        # what is written to these.
        state.at_publication(lambda: telemetry.forget_blueprints(ids))
        state.at_publication(lambda: _renew(store, keys))
        for seed, row in zip(ids.tolist(), rows, strict=True):
            _restore_blueprint(store, snapshot, seed, row)
        state.set_rows(ids, **dict(zip(COLUMN_NAMES, rows.unbind(1), strict=True)))
        state.set_alpha(ids, snapshot.alpha[where])


def _refuse_strangers(store: SeedStore, snapshot: Snapshot, ids: Tensor, rows: Tensor) -> None:
    """Refuse a private blueprint id that another seed has now."""
    others = torch.ones(store.num_seeds, dtype=torch.bool, device="cpu")
    others[ids] = False
    taken = store.state.blueprint_ids.where(others & store.state.holding, 0)
    for seed, number in zip(ids.tolist(), rows[:, store.state.BLUEPRINT_ID_IDX], strict=True):
        if int(number) in store.blueprints or seed not in snapshot.blueprints:
            continue
        owners = (taken == number).nonzero().flatten().tolist()
        if owners:
            raise InvalidArgument(
                f"{store.name}: the snapshot's blueprint {int(number)} of seed {seed} now is "
                f"that of seed {owners[0]}: an older state was loaded after the snapshot; take a "
                "new one"
            )


def _renew(store: SeedStore, keys: set[str]) -> None:
    """New stacks to write to, where a backward still to run reads the old ones."""
    for bank in store.bank_list():
        if bank.key in keys and bank.awaits_backward:
            bank.grow(bank.capacity)


def _restore_blueprint(store: SeedStore, snapshot: Snapshot, seed: int, row: Tensor) -> None:
    if seed not in snapshot.blueprints:
        return
    key, values = snapshot.blueprints[seed]
    bank: Bank = store.banks[key]  # type: ignore[assignment]  # holds nothing but banks
    number = row[store.state.BLUEPRINT_ID_IDX : store.state.BLUEPRINT_ID_IDX + 1].long()
    if int(bank.slot_of(number)) < 0:
        bank.acquire(number)

    def write() -> None:
        where = bank.slot_of(number)
        if int(where) >= 0:  # the same transaction may have let go of it
            for stack, value in zip(bank.tensors(), values, strict=True):
                stack.write_rows(where, value.unsqueeze(0))
            bank.restart(where)  # momenta of what went wrong would bring it back

    store.state.at_publication(write)


def _ids(store: SeedStore, seed_ids: SeedIds | None) -> Tensor:
    if seed_ids is None:
        return torch.arange(store.num_seeds, device="cpu")
    return as_seed_ids(seed_ids, store.num_seeds, store.name)
