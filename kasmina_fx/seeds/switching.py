"""Seeds of a layer are put away as a whole, and others put in their places."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from kasmina_fx.banks.bank import Bank
from kasmina_fx.banks.stack import Follower, StackedParameter
from kasmina_fx.seeds.packs import KeptBank, KeptPack, KeptStack
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.buffers import to_device


@torch.no_grad()
@torch.inference_mode(False)
def keep(store: SeedStore) -> KeptPack:
    """A copy of the seeds in use, with what optimizers know of their parameters.

    On CUDA it waits for the device where a ramp has moved alphas since they were last asked for.
    """
    rows, alphas = store.state.rows, store.state.alphas
    seeds = ((rows != 0).any(1) | (alphas != 0)).nonzero().flatten()
    banks = {b.key: _kept(b) for b in store.bank_list() if bool(b.held.any())}
    return KeptPack(seeds, rows[seeds].clone(), alphas[seeds].clone(), banks)


def _kept(bank: Bank) -> KeptBank:
    slots = bank.held.nonzero().flatten()
    height, where = int(slots.max()) + 1, to_device(slots, bank.slots.device)
    stacks = [
        KeptStack(stack.detach().index_select(0, where), _known(stack, slots.tolist()))
        for stack in bank.tensors()
    ]
    return KeptBank(bank.held[:height].clone(), stacks)


def _known(stack: StackedParameter, slots: list[int]) -> weakref.WeakKeyDictionary[Follower, Any]:
    found = {follower: follower.known_of(stack, slots) for follower in list(stack.followers or ())}
    return weakref.WeakKeyDictionary(found)


@torch.no_grad()
@torch.inference_mode(False)
def put_in(store: SeedStore, pack: KeptPack) -> None:
    """Stage seeds that were put away in the place of those in use, which are gone.

    Call it inside a transaction. A bank grows if it has too few slots; what is written to its
    stacks, in place, is written at publication.
    """
    state, everywhere = store.state, torch.arange(store.num_seeds, device="cpu")
    rows, alpha = pack.rows_of_all(store.num_seeds)
    store.highest_id = max(store.highest_id, *pack.rows[:, state.BLUEPRINT_ID_IDX].tolist(), 0)
    used = {bank: frozenset(bank.held.nonzero().flatten().tolist()) for bank in store.bank_list()}
    for bank in used:
        _make_room(bank, pack.banks.get(bank.key))
    telemetry = store.telemetry
    state.at_publication(lambda: telemetry.forget_blueprints(everywhere))
    state.at_publication(lambda: _write(used, pack))
    state.stage_all(rows, alpha)


def _make_room(bank: Bank, kept: KeptBank | None) -> None:
    held = bank.held[:0] if kept is None else kept.held
    room = bank.capacity
    while room < len(held):
        room *= 2
    if room > bank.capacity:
        bank.grow(room)
    bank.give_back(held)


def _write(used: dict[Bank, frozenset[int]], pack: KeptPack) -> None:
    for bank, before in used.items():
        kept = pack.banks.get(bank.key)
        now = torch.zeros(0, dtype=torch.int64, device="cpu") if kept is None else kept.slots
        touched = before.union(now.tolist())
        if not touched:
            continue
        _leave_to_backward(bank)
        bank.restart(torch.tensor(sorted(touched), dtype=torch.int64, device="cpu"))
        bank.forget()
        for stack, own in zip(bank.tensors(), () if kept is None else kept.stacks, strict=False):
            stack.write_rows(now, own.values)
            for follower, known in list(own.known.items()):
                follower.knew(stack, now.tolist(), known)


def _leave_to_backward(bank: Bank) -> None:
    """Put new stacks in the places of those that a backward still to run reads, or hands on."""
    if bank.training_loop.awaits_gradients:
        before = bank.tensors()
        bank.grow(bank.capacity)
        for stack in before:
            stack.swapped = True
