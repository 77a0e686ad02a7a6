"""Room for blueprints: allocated once for all layers of a model, and shown at once, empty."""

from __future__ import annotations

import torch
from torch import Tensor

from kasmina_fx.arguments import is_int
from kasmina_fx.banks.bank import Bank
from kasmina_fx.banks.placement import SMALLEST
from kasmina_fx.blueprints.registry import DEFAULT, lookup
from kasmina_fx.blueprints.trial import why_unfit
from kasmina_fx.errors import InvalidType, UnknownBlueprint, shown
from kasmina_fx.seeds.store import SeedStore


def resolve(store: SeedStore, blueprint_id: int | str | None) -> tuple[int | None, str]:
    """Id of a shared blueprint (None: a copy for each seed), and its name."""
    if blueprint_id is None:
        return None, DEFAULT
    if isinstance(blueprint_id, str):
        return None, lookup(blueprint_id).kind
    if not is_int(blueprint_id):
        raise InvalidType(
            f"{store.name}: blueprint {shown(blueprint_id)}; give an id, a name or None"
        )
    kind = store.blueprints.get(blueprint_id)
    if kind is None:
        known = sorted(store.blueprints) or "none: call register_blueprint first"
        raise UnknownBlueprint(
            f"{store.name}: no blueprint has the id {shown(blueprint_id)}; registered: {known}"
        )
    return blueprint_id, kind


def identities(store: SeedStore) -> Tensor:
    """Return whose blueprint is its own and starts as the identity: bool ``(S,)`` on the CPU."""
    found = torch.zeros(store.num_seeds, dtype=torch.bool, device="cpu")
    for bank in store.bank_list():
        if bank.blueprint.starts_as_identity and not bank.spec.shared:
            mine = slice(bank.run.first_seed, bank.run.first_seed + bank.run.count)
            found[mine] |= bank.slot_of(store.state.blueprint_ids[mine]) >= 0
    return found


def start_growing(store: SeedStore, kind: str, shared: bool) -> None:
    """Allocate the smallest banks for a blueprint that has none yet: once for the whole model.

    Blueprints registered before are allocated with it, so that they cost no compile of their own.
    """
    if store.has_bank(kind, shared):
        return
    store.siblings.add(store)
    threads = store.siblings.threads
    for member in store.siblings:
        wanted = {(name, True) for name in member.blueprints.values()}
        if not shared:
            wanted.add((kind, False))
        with threads.commands, threads.forwards.publication():
            for name, is_shared in sorted(wanted):
                allocate(member, name, shared=is_shared)
            member.publish_stacks()


def take_slots(store: SeedStore, ids: Tensor, kind: str, shared: int | None) -> Tensor:
    """Give seeds slots in the banks of a blueprint, inside a transaction.

    Args:
        store: The seeds' layer, which has started to grow the blueprint.
        ids: int64 ``(n,)`` on the CPU: the seeds.
        kind: Name of the blueprint.
        shared: Id of the one set of parameters that all of them use; None: each gets its own.

    Returns:
        Their blueprint ids, int64 ``(n,)``, or ``(1,)`` for all.
    """
    wanted = store.take_ids(len(ids)) if shared is None else torch.tensor([shared], device="cpu")
    for bank in store.bank_list():
        if bank.spec.kind != kind or bank.spec.shared != (shared is not None):
            continue
        local = ids - bank.run.first_seed
        mine = (local >= 0) & (local < bank.run.count)
        if shared is None:
            bank.acquire(wanted[mine], store.name)
        elif bool(mine.any()) and int(bank.slot_of(wanted)) < 0:
            bank.acquire(wanted, store.name)
    return wanted


def allocate(
    store: SeedStore, kind: str, *, shared: bool = False, capacity: int = SMALLEST
) -> None:
    """Banks for one blueprint in every run that it fits; those that exist are left alone."""
    like, blueprint = store.host.like, lookup(kind)
    for index, run in enumerate(store.layout.runs):
        if why_unfit(blueprint, run.size, store.host.features, like) is not None:
            continue
        bank = Bank(
            kind,
            index,
            run,
            shared=shared,
            capacity=1 if shared else capacity,
            dtype=torch.get_default_dtype() if like is None else like.dtype,
            device=torch.device("cpu") if like is None else like.device,
        )
        if bank.key not in store.banks:
            store.banks[bank.key] = bank
