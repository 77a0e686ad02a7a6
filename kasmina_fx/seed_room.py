"""Room for blueprints: what a layer may grow, and where it goes.

Allocation is shown to forwards at once, empty; who sits there is published with the transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kasmina_fx.bank import Bank
from kasmina_fx.blueprints import Blueprint
from kasmina_fx.blueprints.registry import DEFAULT, lookup
from kasmina_fx.blueprints.trial import register_for, require_fit, why_unfit
from kasmina_fx.chunk_manager import ChunkManager
from kasmina_fx.colony import Colony
from kasmina_fx.errors import InvalidArgument, InvalidType, UnknownBlueprint
from kasmina_fx.features import Features, floating_tensor
from kasmina_fx.gate import GATE
from kasmina_fx.seating import SMALLEST
from kasmina_fx.seed_ids import as_seed_ids
from kasmina_fx.seed_store import SeedStore
from kasmina_fx.staging import LOCK
from kasmina_fx.state_tensor import StateTensor

if TYPE_CHECKING:
    from kasmina_fx.layer import KasminaLayer


class SeedRoom(nn.Module):
    """The part of a :class:`~kasmina_fx.KasminaLayer` that allocates."""

    layer_id: str
    base: nn.Module
    kasmina: SeedStore
    colony: Colony
    _chunks: ChunkManager
    _features: Features

    @property
    def state(self) -> StateTensor:
        """The state of all seeds."""
        return self.kasmina.state

    @property
    def num_seeds(self) -> int:
        """Seeds of the layer."""
        return self._chunks.num_chunks

    def accepts(self, seed_id: int, blueprint: str | None = None) -> bool:
        """Does a blueprint, by name (None: the default), fit a seed's chunk?"""
        seed = int(as_seed_ids(seed_id, self.num_seeds, self.layer_id))
        chosen = lookup(DEFAULT if blueprint is None else blueprint)
        like = self.host_weight()
        return why_unfit(chosen, self._chunks.sizes[seed], self._features, like) is None

    def register_blueprint(
        self, blueprint: str | Blueprint | Any, *, name: str | None = None
    ) -> int:
        """An id for one set of parameters (a chunk size) that all seeds using it share.

        Args:
            blueprint: A registered name, a factory ``chunk_size -> nn.Module``, a
                :class:`Blueprint`, or a module (then only for the chunks that it fits; its values
                are copied). Supported are modules that keep a chunk's shape and dtype, with buffers
                that forward only reads.
            name: Register it under this name too, for germinations that give each seed its own
                copy.

        Returns:
            The id, 1 or more. Allocation waits for the first germination.

        Raises:
            InvalidBlueprint: It changes the shape or dtype, or writes to a buffer.
            UnknownBlueprint: No such name.
        """
        sizes = dict.fromkeys(self._chunks.sizes)
        kind = register_for(blueprint, name, sizes, self._features, self.host_weight())
        number = int(self.kasmina.take_ids(1))
        self.kasmina.blueprints[number] = kind
        return number

    def reserve(self, slots: int, blueprint: str | None = None) -> None:
        """Make room ahead of time, so that growth within it replaces no Parameter.

        Args:
            slots: Blueprints, each with parameters of its own, in every run of equal chunks.
            blueprint: Its name; None is the default one.

        Raises:
            InvalidArgument, InvalidType, UnknownBlueprint: Nothing has changed.
        """
        given: Any = slots  # from callers without a type checker, anything
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise InvalidArgument(f"{self.layer_id}: reserve({slots!r}): give 1 slot or more")
        kind = DEFAULT if blueprint is None else lookup(blueprint).kind
        require_fit(lookup(kind), self._chunks.sizes, self._features, self.host_weight())
        with self.transaction():
            self._start_growing(kind, shared=False)
            with GATE.publication():
                for bank in self._banks():
                    wanted = bank.spec.kind == kind and not bank.spec.shared
                    if wanted and bank.capacity < slots:
                        bank.grow(slots)
                self._as_layer().publish_stacks()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside become visible at once, at the end; an exception undoes them all."""
        with self.state.transaction():
            before = {bank: bank.held for bank in self._banks()}
            try:
                yield
            except BaseException:
                for bank in self._banks():  # some of them newer than the transaction
                    bank.give_back(before.get(bank, bank.held[:0]))
                layer = self._as_layer()
                if layer.stacks_changed():  # they grew, and stay as large
                    with GATE.publication():
                        layer.publish_stacks()
                raise

    def _as_layer(self) -> KasminaLayer:
        return self  # type: ignore[return-value]  # the only subclass is KasminaLayer

    # Banks.

    def _banks(self) -> list[Bank]:
        return self.kasmina.bank_list()

    def host_weight(self) -> Tensor | None:
        """A floating-point tensor of the base: its dtype and device are those of what grows."""
        return floating_tensor(self.base)

    def main_weight(self) -> Tensor | None:
        """The base's weight; of a base without one, its first floating-point tensor."""
        weight = getattr(self.base, "weight", None)
        return weight if isinstance(weight, Tensor) else self.host_weight()

    def _resolve(self, blueprint_id: int | str | None) -> tuple[int | None, str]:
        """Id of a shared blueprint (None: a copy for each seed), and its name."""
        if blueprint_id is None:
            return None, DEFAULT
        if isinstance(blueprint_id, str):
            return None, lookup(blueprint_id).kind
        if isinstance(blueprint_id, bool) or not isinstance(blueprint_id, int):
            raise InvalidType(
                f"{self.layer_id}: blueprint {blueprint_id!r}; give an id, a name or None"
            )
        kind = self.kasmina.blueprints.get(blueprint_id)
        if kind is None:
            known = sorted(self.kasmina.blueprints) or "none: call register_blueprint first"
            raise UnknownBlueprint(
                f"{self.layer_id}: no blueprint has the id {blueprint_id}; registered: {known}"
            )
        return blueprint_id, kind

    def _start_growing(self, kind: str, shared: bool) -> None:
        """Allocate the smallest banks for a blueprint that has none yet: once for the whole model.

        Blueprints registered before are allocated with it, so that they cost no compile of their
        own later.
        """
        if self.kasmina.has_bank(kind, shared):
            return
        self.colony.add(self._as_layer())
        for layer in self.colony:
            wanted = {(name, True) for name in layer.kasmina.blueprints.values()}
            if not shared:
                wanted.add((kind, False))
            with LOCK, GATE.publication():
                for name, is_shared in sorted(wanted):
                    layer.allocate(name, shared=is_shared)
                layer.publish_stacks()

    def allocate(self, kind: str, *, shared: bool = False, capacity: int = SMALLEST) -> None:
        """Banks for one blueprint in every run that it fits; those that exist are left alone."""
        like, blueprint = self.host_weight(), lookup(kind)
        for index, run in enumerate(self._chunks.layout.runs):
            if why_unfit(blueprint, run.size, self._features, like) is not None:
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
            if bank.key not in self.kasmina.banks:
                self.kasmina.banks[bank.key] = bank
