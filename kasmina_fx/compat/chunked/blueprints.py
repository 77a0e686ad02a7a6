"""A layer's blueprints by id, as modules: what older code keeps in a dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.blueprints.trial import why_unfit
from kasmina_fx.seeds.store import SeedStore


class Blueprints(Mapping[int, nn.Module]):
    """Blueprints that are registered, and those that seeds hold, by id.

    A module is made when asked for, with the values of now: what is written to it changes nothing.
    """

    def __init__(self, store: SeedStore) -> None:
        self._store = store

    def __iter__(self) -> Iterator[int]:
        """Ids in order."""
        held = self._store.state.blueprint_ids[self._store.state.holding].tolist()
        return iter(sorted({*self._store.blueprints, *held}))

    def __len__(self) -> int:
        """How many there are."""
        return len(list(iter(self)))

    def __getitem__(self, blueprint_id: int) -> nn.Module:
        """One of them, a copy."""
        if blueprint_id not in list(iter(self)):
            raise KeyError(blueprint_id)
        number = torch.tensor([blueprint_id], device="cpu")
        for bank in self._store.bank_list():
            slot = int(bank.slot_of(number))
            if slot >= 0:
                module = bank.blueprint.module(bank.run.size)
                values = bank.slot_tensors(slot)
                module.to(self._store.state.alpha.device)
                module.load_state_dict({n: v.detach().clone() for n, v in values.items()})
                return module
        return self._never_used(blueprint_id)

    def _never_used(self, blueprint_id: int) -> nn.Module:
        blueprint, host = lookup(self._store.blueprints[blueprint_id]), self._store.host
        fits = (
            size
            for size in self._store.chunks.sizes
            if why_unfit(blueprint, size, host.features, host.like) is None
        )
        return blueprint.module(next(fits))
