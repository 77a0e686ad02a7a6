"""Slots and rows of a state dict that could not be of one layer are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from kasmina_fx.banks.bank import Bank
from kasmina_fx.lifecycle import SeedLifecycle, holds_blueprint
from kasmina_fx.seeds.entry_names import BANKS, STATE
from kasmina_fx.state_tensor import StateTensor

#: Ids are int32 in the state tensor.
LAST_ID: Final = torch.iinfo(torch.int32).max


def check_slots(
    blueprints: Mapping[int, str], banks: Sequence[Bank], entries: Mapping[str, Any]
) -> None:
    """Every id is in a bank of its blueprint, once; a private one in one bank alone."""
    private = set(blueprints)
    for bank in banks:
        name = f"{BANKS}{bank.key}.slots"
        slots = entries[name].tolist()
        held = [number for number in slots if number]
        if any(not 0 <= number <= LAST_ID for number in slots) or len(set(held)) < len(held):
            raise ValueError(f"{name} holds {slots[:8]}; ids are 1 to {LAST_ID}, each once, or 0")
        if bank.spec.shared:
            strange = {n for n in held if blueprints.get(n) != bank.spec.kind}
        else:
            strange = private.intersection(held)
            private.update(held)
        if strange:
            raise ValueError(f"{name} holds ids {sorted(strange)[:8]} of another blueprint")


def check_rows(banks: Sequence[Bank], entries: Mapping[str, Any]) -> None:
    """Every seed that holds a blueprint has a slot, private ones for itself; dormant ones none.

    A seed advanced by hand has none: its id is 0.
    """
    state = entries[STATE].cpu().long()
    stages = state[:, StateTensor.LIFECYCLE_STATE_IDX]
    ids = state[:, StateTensor.BLUEPRINT_ID_IDX]
    holding, found = holds_blueprint(stages), torch.zeros_like(ids, dtype=torch.bool)
    unclaimed: set[int] = set()
    for bank in banks:
        seeds = slice(bank.run.first_seed, bank.run.first_seed + bank.run.count)
        slots = entries[f"{BANKS}{bank.key}.slots"].cpu()
        mine = holding[seeds] & (ids[seeds] > 0) & torch.isin(ids[seeds], slots)
        found[seeds] |= mine
        used = ids[seeds][mine].tolist()
        if bank.spec.shared:
            continue
        if len(set(used)) < len(used):
            raise ValueError(f"{STATE}: several seeds have one slot of {BANKS}{bank.key}")
        unclaimed |= set(slots[slots > 0].tolist()).difference(used)
    lost = (holding & (ids > 0) & ~found).nonzero().flatten().tolist()
    if lost:
        raise ValueError(f"{STATE}: seeds {lost[:8]} hold blueprints that are in no bank of theirs")
    idle = ((stages == SeedLifecycle.DORMANT) & (ids != 0)).nonzero().flatten().tolist()
    if idle:
        raise ValueError(f"{STATE}: seeds {idle[:8]} are DORMANT and name a blueprint")
    if unclaimed:
        raise ValueError(f"{STATE}: no seed has the ids {sorted(unclaimed)[:8]} that slots hold")
