"""What a controller calls: germinate, advance, blend, cancel.

All is checked on the host before anything changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kasmina_fx import epochs, snapshots
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.blueprints.trial import why_unfit
from kasmina_fx.errors import UnknownBlueprint
from kasmina_fx.grafting.registry import strategy_number
from kasmina_fx.lifecycle import GraftingStrategy, SeedLifecycle
from kasmina_fx.seed_ids import SeedIds, as_seed_ids
from kasmina_fx.seed_room import SeedRoom
from kasmina_fx.snapshots import Snapshot


class SeedControl(SeedRoom):
    """The part of a :class:`~kasmina_fx.KasminaLayer` that changes seeds."""

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
                ``mlp``.
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
        shared, kind = self._resolve(blueprint_id)
        for size in {self._chunks.sizes[seed] for seed in ids.tolist()}:
            reason = why_unfit(lookup(kind), size, self._features, self.host_weight())
            if reason is not None:
                raise UnknownBlueprint(
                    f"{self.layer_id}: blueprint {kind!r} does not fit seeds {ids.tolist()[:8]} "
                    f"with chunks of {size} features: {reason}"
                )
        if not len(ids):
            return True
        with self.transaction():
            if bool((self.state.stages[ids] != SeedLifecycle.DORMANT).any()):
                return False
            self._start_growing(kind, shared is not None)
            own = self.kasmina.take_ids(len(ids)) if shared is None else None
            wanted = torch.tensor([shared], device="cpu") if own is None else own
            for bank in self._banks():
                if bank.spec.kind != kind or bank.spec.shared != (shared is not None):
                    continue
                local = ids - bank.run.first_seed
                mine = (local >= 0) & (local < bank.run.count)
                if own is not None:
                    bank.acquire(own[mine])
                elif bool(mine.any()) and int(bank.slot_of(wanted)) < 0:
                    bank.acquire(wanted)
            self.state.set_rows(
                ids,
                lifecycle_state=SeedLifecycle.GERMINATED,
                blueprint_id=wanted,
                epochs_in_state=0,
                grafting_strategy=strategy,
            )
            self.state.set_alpha(ids, 0.0)
            telemetry = self.kasmina.telemetry
            self.state.at_publication(lambda: telemetry.forget_blueprints(ids))
        return True

    def cancel_germination(self, seed_ids: SeedIds) -> bool:
        """GERMINATED or TRAINING seeds become CANCELLED: all, or (False) none."""
        ids = as_seed_ids(seed_ids, self.num_seeds, self.layer_id)
        early = torch.tensor([SeedLifecycle.GERMINATED, SeedLifecycle.TRAINING], device="cpu")
        with self.transaction():
            if not bool(torch.isin(self.state.stages[ids], early).all()):
                return False
            self.state.advance(ids, SeedLifecycle.CANCELLED)
        return True

    def advance(self, seed_ids: SeedIds, stage: SeedLifecycle | int) -> None:
        """One legal transition for all the seeds, or IllegalTransition and none."""
        with self.transaction():
            self.state.advance(seed_ids, stage)
            if stage == SeedLifecycle.TRAINING:
                self.colony.find_scaler()

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
        epochs.step_epoch(self._as_layer())

    def snapshot(self, seed_ids: SeedIds | None = None) -> Snapshot:
        """Blueprints, alphas and states of some seeds, or all, to go back to.

        Optimizer state is not part of it.
        """
        return snapshots.take(self._as_layer(), seed_ids)

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
        snapshots.restore(self._as_layer(), snapshot, seed_ids, mark)
