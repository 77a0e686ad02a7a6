"""The chunked layer of older code that knows the eleven stages, and its kin that ran in Triton."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import SeedIds, as_seed_id, check_instance, is_int
from kasmina_fx.compat.chunked.extended_state import ExtendedStateTensor
from kasmina_fx.compat.chunked.figures import Figures
from kasmina_fx.compat.chunked.grafting import (
    GRAFTING_STRATEGIES,
    GraftingConfig,
    ramp_config,
    ramp_of,
)
from kasmina_fx.compat.chunked.older_calls import OlderCalls, fitting_seeds
from kasmina_fx.compat.chunked.seed_checkpoints import SeedCheckpoints
from kasmina_fx.compat.chunked.states import COOLDOWN
from kasmina_fx.config import SeedConfig
from kasmina_fx.errors import KasminaError
from kasmina_fx.lifecycle import SeedLifecycle as Stage
from kasmina_fx.lifecycle import as_stage

_LOG: Final = logging.getLogger(__name__)

#: Epochs that a seed spends in a stage before it may go on; the ways out are open at any time.
MIN_EPOCHS: Final = {
    Stage.TRAINING: 100,
    Stage.GRAFTING: 50,
    Stage.STABILIZATION: 20,
    Stage.EVALUATING: 30,
    Stage.FINE_TUNING: 50,
}
_WAYS_OUT: Final = (Stage.CULLED, Stage.CANCELLED, Stage.ROLLED_BACK)
#: Errors that cull a seed are more than these.
_ERRORS: Final = 4


class ChunkedKasminaLayerV2(OlderCalls):
    """A :class:`kasmina_fx.ChunkedKasminaLayer` by the calls of before, with eleven stages.

    Args:
        base_layer: The module to watch; it is used, not copied.
        num_seeds: Seeds; no more than the features out are made.
        layer_id: Name in messages, reports and checkpoints.
        enable_telemetry: Keep statistics of every chunk.
        device: Move base and seeds there; None leaves it where it is.
        checkpoint_dir: Of :meth:`save_checkpoint`; ``checkpoints/<layer_id>`` unless given.
        grafting_config: Of the ramps. A layer knows its duration, drift threshold and bounds.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_seeds: int = 1000,
        layer_id: str | None = None,
        enable_telemetry: bool = True,
        device: torch.device | str | None = None,
        checkpoint_dir: str | Path | None = None,
        grafting_config: GraftingConfig | None = None,
    ) -> None:
        ramp = GraftingConfig() if grafting_config is None else grafting_config
        check_instance("grafting_config", ramp, GraftingConfig)
        seeds = fitting_seeds(base_layer, num_seeds, layer_id)
        config = SeedConfig(ramp_config(ramp), error_limit=_ERRORS, embargo_epochs=COOLDOWN)
        super().__init__(base_layer, seeds, layer_id, enable_telemetry, device, config=config)
        self._begin()
        ramp_of("adaptive")  # registered before a state dict names its number
        self.grafting_config, self._full_alpha = ramp, ramp.max_alpha
        folder = Path("checkpoints", self.layer_id) if checkpoint_dir is None else checkpoint_dir
        self.checkpoint_manager = SeedCheckpoints(folder)
        # No submodule: its entries would be missing from everybody's checkpoints.
        self.__dict__["_extended"] = ExtendedStateTensor(self.num_seeds)

    @property
    def extended_state(self) -> ExtendedStateTensor:
        """The seeds' state as eight columns, on the CPU, of now; one device copy.

        ``set_state`` goes through to the seeds. Metrics and checkpoint numbers are notes.
        """
        return self._extended_with(Figures.of(self, self._notes))

    def _extended_with(self, figures: Figures) -> ExtendedStateTensor:
        known: ExtendedStateTensor = self.__dict__["_extended"]
        known.put = self._put
        known.take(self.state.rows, figures.error_counts)
        return known

    def _put(self, ids: Tensor, stages: Tensor) -> None:
        with self.transaction():
            for seed, stage in zip(ids.tolist(), stages.tolist(), strict=True):
                self.fill(torch.tensor([seed], device="cpu"), Stage(stage))
                self.state.batch_set_lifecycle_state([seed], stage)

    # Lives.

    def request_germination(
        self,
        seed_id: SeedIds,
        blueprint_id: int | str | None = None,
        grafting_strategy: int | str = "linear",
    ) -> bool:
        """Let a dormant seed grow a blueprint: it is GERMINATED.

        Args:
            seed_id: One id, or several.
            blueprint_id: As of :meth:`ChunkedKasminaLayer.request_germination`.
            grafting_strategy: "linear", "drift_controlled", "momentum", "adaptive" or "stability";
                another name is told, and "linear" taken.

        Returns:
            False, with nothing changed, if a seed isn't DORMANT, or there is no such seed.

        Raises:
            UnknownBlueprint: No such blueprint, or one that does not fit (a ValueError).
        """
        if is_int(seed_id) and seed_id < 0:  # type: ignore[operator]  # an int
            _LOG.error("%s: there is no seed %d", self.layer_id, seed_id)
            return False
        if grafting_strategy not in GRAFTING_STRATEGIES:
            text = "%s: no grafting strategy %r, linear is taken; known are %s"
            _LOG.warning(text, self.layer_id, grafting_strategy, ", ".join(GRAFTING_STRATEGIES))
            grafting_strategy = "linear"
        return super().request_germination(seed_id, blueprint_id, ramp_of(str(grafting_strategy)))

    def _start(self, seed_ids: SeedIds) -> None:
        """A seed waits, GERMINATED."""

    def request_state_transition(
        self,
        seed_id: int,
        target_state: Stage | int | str,
        metadata: Mapping[str, Any] | None = None,
    ) -> bool:
        """Go on to a stage, if the lifecycle has it and the seed was long enough in the last one.

        CULLED, CANCELLED and ROLLED_BACK wait for nothing.

        Args:
            seed_id: The seed.
            target_state: The stage.
            metadata: For the log.

        Returns:
            Whether it went on; if not, the reason is logged.

        Raises:
            SeedIndexError, InvalidArgument: No such seed, or stage.
        """
        seed, to = as_seed_id(seed_id, self.num_seeds, self.layer_id), as_stage(target_state, "")
        now, epochs = Stage(int(self.state.stages[seed])), int(self.state.epochs[seed])
        least = 0 if to in _WAYS_OUT else MIN_EPOCHS.get(now, 0)
        if epochs < least:
            text = "%s: seed %d was %d epochs %s, of at least %d %s"
            _LOG.warning(text, self.layer_id, seed, epochs, now.name, least, metadata or "")
            return False
        try:
            self.advance(seed, to)
        except KasminaError as error:
            _LOG.warning("%s %s", error, metadata or "")
            return False
        return True

    def step_epoch(self) -> None:
        """See :meth:`kasmina_fx.KasminaLayer.step_epoch`; where a ramp is over: STABILIZATION."""
        with self.transaction():
            super().step_epoch()
            config, alphas = self.grafting_config, self.state.alphas
            low = (self.state.stages == Stage.GRAFTING) & (alphas < config.min_alpha)
            self.set_alpha(low.nonzero().flatten(), config.min_alpha)

    def _grafted(self, ids: Tensor) -> None:
        self.advance(ids, Stage.STABILIZATION)
        self.set_alpha(ids, self._full_alpha)

    # Checkpoints of one seed.

    def save_checkpoint(self, seed_id: int, priority: str = "normal") -> str | None:
        """Write a seed's state and blueprint to a file.

        Args:
            seed_id: The seed.
            priority: "low", "normal", "high" or "critical": of a seed's files those of a lower
                priority go first, where it has more than five.

        Returns:
            Its id; None, with the reason in the log, where it could not be written.

        Raises:
            SeedIndexError, InvalidArgument: No such seed or priority.
        """
        try:
            return self.checkpoint_manager.save(self, seed_id, priority)
        except OSError as error:
            _LOG.error("%s: seed %d not saved: %s", self.layer_id, seed_id, error)
            return None

    def restore_checkpoint(self, seed_id: int, checkpoint_id: str | None = None) -> bool:
        """Put a seed back to a checkpoint, None for its newest; False, and a log, if that can't be.

        Raises:
            SeedIndexError: No such seed.
        """
        seed = as_seed_id(seed_id, self.num_seeds, self.layer_id)
        there = self.checkpoint_manager.list_checkpoints(self.layer_id, seed)
        if checkpoint_id is None and not there:
            return False
        try:
            self.checkpoint_manager.restore(self, seed, checkpoint_id or there[-1])
        except KasminaError as error:
            _LOG.error("%s: seed %d not restored: %s", self.layer_id, seed, error)
            return False
        return True

    # Reports.

    def get_layer_stats(self) -> dict[str, Any]:
        """See :meth:`ChunkedKasminaLayer.get_layer_stats`; states are the eleven."""
        state = self.extended_state
        return super().get_layer_stats() | {
            "state_distribution": state.get_state_summary(),
            "active_seeds": int(state.get_active_seeds_mask().sum()),
            "total_errors": int(state.state_tensor[:, state.ERROR_COUNT].sum()),
        }

    def get_health_report(self) -> dict[str, Any]:
        """See :meth:`ChunkedKasminaLayer.get_health_report`; ``seeds`` are of the eleven stages.

        A seed's ``performance``: its reconstruction loss (0 where it never trained), the share of
        its values that are not 0, ``1 / (1 + variance)``, and its root mean square, at most 1.
        """
        report = super().get_health_report()
        state = self._extended_with(Figures.of_report(report, self._notes))
        mean, variance = report["mean"].nan_to_num(0.0), report["variance"].nan_to_num(0.0)
        loss = report["reconstruction_loss"].nan_to_num(0.0)
        lively = 1.0 - report["dead_fraction"].nan_to_num(0.0)
        size = (mean.square() + variance).sqrt().clamp_max(1.0)
        names = ("loss", "accuracy", "stability", "efficiency")
        figures = torch.stack([loss, lively, 1.0 / (1.0 + variance), size], 1).tolist()
        seeds = []
        for seed, row in enumerate(state.state_tensor.tolist()):
            history = state.get_transition_history(seed, limit=5)
            seeds.append(
                {
                    "seed_id": seed,
                    "state": Stage(row[state.LIFECYCLE_STATE]).name,
                    "epochs_in_state": row[state.EPOCHS_IN_STATE],
                    "blueprint_id": row[state.BLUEPRINT_ID],
                    "error_count": row[state.ERROR_COUNT],
                    "performance": dict(zip(names, figures[seed], strict=True)),
                    "recent_transitions": [
                        {"from": Stage(left).name, "to": Stage(entered).name}
                        for left, entered in history
                    ],
                }
            )
        saved = self.checkpoint_manager
        checkpoints = {
            "total_saved": len(saved.list_checkpoints(self.layer_id)),
            "checkpoint_dir": str(saved.checkpoint_dir),
        }
        return report | {"seeds": seeds, "checkpoints": checkpoints}
