"""All that a controller may call: germinate, advance, blend, cancel, go back.

All is checked on the host before anything changes. What is needed of a layer is its seeds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kasmina_fx.arguments import SeedIds, as_seed_id, as_seed_ids, check_count, check_instance
from kasmina_fx.banks.bank import Bank
from kasmina_fx.blueprints import Blueprint
from kasmina_fx.blueprints.registry import DEFAULT, lookup
from kasmina_fx.blueprints.trial import register_for, require_fit, why_unfit
from kasmina_fx.chunk_manager import ChunkManager
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.errors import UnknownBlueprint
from kasmina_fx.grafting.registry import strategy_number
from kasmina_fx.lifecycle import GraftingStrategy, SeedLifecycle
from kasmina_fx.seeds import epochs, snapshots
from kasmina_fx.seeds.allocation import identities, resolve, start_growing, take_slots
from kasmina_fx.seeds.siblings import Siblings
from kasmina_fx.seeds.snapshots import Snapshot
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.state_tensor import StateTensor


class SeedCommands:
    """Views and commands of a layer's seeds, for whatever holds their store."""

    kasmina: SeedStore

    @property
    def layer_id(self) -> str:
        """Name in messages and reports."""
        return self.kasmina.name

    @property
    def config(self) -> SeedConfig:
        """Ramps, embargo and error limit."""
        return self.kasmina.config

    @property
    def chunks(self) -> ChunkManager:
        """The layer's chunks."""
        return self.kasmina.chunks

    @property
    def state(self) -> StateTensor:
        """The state of all seeds."""
        return self.kasmina.state

    @property
    def siblings(self) -> Siblings[SeedStore]:
        """The layers that start to grow together."""
        return self.kasmina.siblings

    @siblings.setter
    def siblings(self, siblings: Siblings[SeedStore]) -> None:
        self.kasmina.join(siblings)

    @property
    def telemetry_enabled(self) -> bool:
        """Forwards keep statistics; compiled in, so that a change costs a compile."""
        return self.kasmina.observed

    @telemetry_enabled.setter
    def telemetry_enabled(self, enabled: bool) -> None:
        check_instance("telemetry_enabled", enabled, bool)
        self.kasmina.observed = enabled

    def set_telemetry(self, policy: bool | TelemetryPolicy) -> None:
        """Statistics of every step (True), none (False: another graph), or as a policy says."""
        store, threads = self.kasmina, self.siblings.threads
        with threads.commands:
            store.observe(policy)
            if (store.telemetry.gradients is None) == bool(store.shown.gradients):
                with threads.forwards.publication():
                    store.publish_stacks()

    @property
    def num_seeds(self) -> int:
        """Seeds of the layer."""
        return self.kasmina.num_seeds

    @property
    def loss_scale(self) -> Tensor:
        """What multiplies the gradient of reconstruction losses, float32 ``()``."""
        return self.kasmina.scale()

    def bank_of(self, seed_id: int) -> tuple[Bank, int] | None:
        """The bank and slot that hold a seed's blueprint, or None."""
        return self.kasmina.bank_of(as_seed_id(seed_id, self.num_seeds, self.layer_id))

    def main_weight(self) -> Tensor | None:
        """The base's weight; of a base without one, its first floating-point tensor."""
        return self.kasmina.host.weight

    def transaction(self) -> AbstractContextManager[None]:
        """All changes inside become visible at once, at the end; an exception undoes them all."""
        return self.kasmina.transaction()

    def accepts(self, seed_id: int, blueprint: str | None = None) -> bool:
        """Say whether a blueprint, by name (None: the default), fits a seed's chunk."""
        seed = as_seed_id(seed_id, self.num_seeds, self.layer_id)
        chosen = lookup(DEFAULT if blueprint is None else blueprint)
        like = self.kasmina.host.like
        return (
            why_unfit(chosen, self.kasmina.chunks.sizes[seed], self.kasmina.host.features, like)
            is None
        )

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
        sizes = dict.fromkeys(self.kasmina.chunks.sizes)
        kind = register_for(
            blueprint, name, sizes, self.kasmina.host.features, self.kasmina.host.like
        )
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
        check_count(f"{self.layer_id}: slots", slots, least=1)
        kind = DEFAULT if blueprint is None else lookup(blueprint).kind
        require_fit(
            lookup(kind),
            self.kasmina.chunks.sizes,
            self.kasmina.host.features,
            self.kasmina.host.like,
        )
        with self.transaction():
            start_growing(self.kasmina, kind, shared=False)
            with self.siblings.threads.forwards.publication():
                for bank in self.kasmina.bank_list():
                    wanted = bank.spec.kind == kind and not bank.spec.shared
                    if wanted and bank.capacity < slots:
                        bank.grow(slots)
                self.siblings.let_all_grow(self.kasmina)
                self.kasmina.publish_stacks()

    def request_germination(
        self,
        seed_id: SeedIds,
        blueprint_id: int | str | None = None,
        grafting_strategy: int | str = GraftingStrategy.FIXED_RAMP,
    ) -> bool:
        """Germinate dormant seeds: all of them, or none.

        Args:
            seed_id: One id, a sequence or a tensor of ids.
            blueprint_id: An id from :meth:`register_blueprint`, whose parameters the seeds share; a
                registered name, which gives each seed a copy of its own; None for the default name,
                ``residual_mlp``.
            grafting_strategy: A :class:`GraftingStrategy`, or the number or name of one that
                :func:`kasmina_fx.grafting.register_strategy` took.

        Returns:
            False, with nothing changed, if one of the seeds isn't dormant.

        Raises:
            SeedIndexError, InvalidType, InvalidArgument: Bad ids or strategy.
            UnknownBlueprint: No such id or name, or one that doesn't fit the seeds' chunk size.
        """
        ids = as_seed_ids(seed_id, self.num_seeds, self.layer_id)
        strategy = strategy_number(grafting_strategy, self.layer_id)
        shared, kind = resolve(self.kasmina, blueprint_id)
        self._require_fit(kind, ids)
        if not len(ids):
            return True
        with self.transaction():
            if bool((self.state.stages[ids] != SeedLifecycle.DORMANT).any()):
                return False
            start_growing(self.kasmina, kind, shared is not None)
            self.state.set_rows(
                ids,
                lifecycle_state=SeedLifecycle.GERMINATED,
                blueprint_id=take_slots(self.kasmina, ids, kind, shared),
                epochs_in_state=0,
                grafting_strategy=strategy,
            )
            self.state.set_alpha(ids, 0.0)
            telemetry = self.kasmina.telemetry
            self.state.at_publication(lambda: telemetry.forget_blueprints(ids))
        return True

    def _require_fit(self, kind: str, ids: Tensor) -> None:
        host = self.kasmina.host
        for size in {self.kasmina.chunks.sizes[seed] for seed in ids.tolist()}:
            reason = why_unfit(lookup(kind), size, host.features, host.like)
            if reason is not None:
                raise UnknownBlueprint(
                    f"{self.layer_id}: blueprint {kind!r} does not fit seeds {ids.tolist()[:8]} "
                    f"with chunks of {size} features: {reason}"
                )

    def cancel_germination(self, seed_ids: SeedIds) -> bool:
        """GERMINATED or TRAINING seeds become CANCELLED: all, or (False) none."""
        ids = as_seed_ids(seed_ids, self.num_seeds, self.layer_id)
        early = torch.tensor([SeedLifecycle.GERMINATED, SeedLifecycle.TRAINING], device="cpu")
        with self.transaction():
            if not bool(torch.isin(self.state.stages[ids], early).all()):
                return False
            self.state.advance(ids, SeedLifecycle.CANCELLED)
        return True

    def advance(self, seed_ids: SeedIds, stage: SeedLifecycle | int | str) -> None:
        """One legal transition for all the seeds, or IllegalTransition and none.

        A stage may be given by its name. GERMINATED seeds may become GRAFTING at once if each has a
        blueprint of its own that starts as the identity (:class:`Blueprint`).
        """
        with self.transaction():
            self.state.advance(seed_ids, stage, identities=lambda: identities(self.kasmina))

    def reset(self, seed_ids: SeedIds) -> None:
        """Make seeds DORMANT from any stage, without their blueprints.

        The one way out of FOSSILIZED and ROLLED_BACK.
        """
        self.state.reset(seed_ids)

    def set_alpha(self, seed_ids: SeedIds, alpha: float | Tensor) -> None:
        """Blend factors, a number or ``(n,)``, clamped to [0, 1]; NaN is refused.

        A ramp goes on from there.
        """
        self.state.set_alpha(seed_ids, alpha)

    def step_epoch(self) -> None:
        """An epoch has passed; never called by forward.

        Seeds over their error limit are culled. Every seed that isn't DORMANT is one epoch older,
        culled ones whose embargo is over become DORMANT. Ramps make a step, unless they do so at
        every optimizer step. On CUDA it waits for the work queued so far if a seed holds a
        blueprint and there is an error limit: for the error counts.
        """
        epochs.step_epoch(self.kasmina)

    def snapshot(self, seed_ids: SeedIds | None = None) -> Snapshot:
        """Blueprints, alphas and states of some seeds, or all, to go back to.

        Optimizer state is not part of it.
        """
        return snapshots.take(self.kasmina, seed_ids)

    def rollback(
        self, snapshot: Snapshot, seed_ids: SeedIds | None = None, *, mark: bool | None = None
    ) -> None:
        """Put seeds back to a snapshot, to the bit.

        Args:
            snapshot: From :meth:`snapshot`.
            seed_ids: Those to put back; None is all that the snapshot holds.
            mark: Seeds become ROLLED_BACK, with all else as it was: they are out, and keep what
                the snapshot held until they are reset. Else their stages are the snapshot's as
                well, and they go on from there. Not given: mark if ``seed_ids`` are named.

        Raises:
            IllegalTransition: A seed to be marked is in a stage that ROLLED_BACK can't follow.
            InvalidArgument: The snapshot is of another layout or lacks a seed.
        """
        snapshots.restore(self.kasmina, snapshot, seed_ids, mark)
