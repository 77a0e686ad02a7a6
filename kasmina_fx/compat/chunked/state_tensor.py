"""The state of a layer's seeds, as older chunked layers read and write it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kasmina_fx.arguments import SeedIds, as_seed_id, as_seed_ids, check_count
from kasmina_fx.compat.chunked.figures import NOTED, forget_measurements
from kasmina_fx.compat.chunked.readable_state import ReadableState
from kasmina_fx.compat.chunked.states import RAMP, STAGES, SeedLifecycle, as_state
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.lifecycle import MOST_EPOCHS
from kasmina_fx.lifecycle import SeedLifecycle as Stage

_SAVED: Final = ("state_tensor", "alpha_blend", *NOTED)


class StateTensor(ReadableState):
    """Reads and writes the seeds of a layer, or seeds of its own where it was made by hand.

    ``state_tensor``, int32 ``(num_seeds, 4)``, and ``alpha_blend``, float32 ``(num_seeds,)``, are
    made when asked for: assignment to elements goes through to the seeds, other writes in place
    raise. ``health_scores`` float32, ``error_counts`` int16, ``telemetry_sum`` and
    ``telemetry_sum_sq`` float32, ``telemetry_count`` int32 are ``(num_seeds,)``; of a layer they
    are what it measured, and can't be assigned to.

    Args:
        num_seeds: Seeds, at least 1.
        device: Of the tensors; the CPU unless given.

    >>> state = StateTensor(3)
    >>> state.set_lifecycle_state(1, SeedLifecycle.LOADING)
    >>> state.increment_epochs()
    >>> state.apply_grafting_ramp(2)
    >>> state.alpha_blend.tolist(), state.get_active_seeds().tolist()
    ([0.0, 0.5, 0.0], [False, True, False])
    """

    def _write_rows(self, wanted: Tensor) -> None:
        new, now = wanted.cpu(), self._rows()
        with self._change():
            for seed in (new != now).any(1).nonzero().flatten().tolist():
                state, blueprint, epochs, strategy = new[seed].tolist()
                if state != int(now[seed, 0]):
                    self.set_lifecycle_state(seed, as_state(state))
                if blueprint != int(now[seed, 1]) or strategy != int(now[seed, 3]):
                    self.set_blueprint(seed, blueprint, strategy)
                if epochs != int(now[seed, 2]):
                    self._state.set_rows(seed, epochs_in_state=epochs)

    def _write_alphas(self, wanted: Tensor) -> None:
        new = wanted.cpu()
        changed = (new != self._state.alphas).nonzero().flatten()
        self._state.set_alpha(changed, new[changed])

    # Writing.

    def set_lifecycle_state(self, seed_id: int, state: SeedLifecycle | int) -> None:
        """Put a seed into a state; its epochs start again. None is refused."""
        self.batch_set_lifecycle_state(as_seed_id(seed_id, self.num_seeds, "state"), state)

    def batch_set_lifecycle_state(self, seed_ids: SeedIds, state: SeedLifecycle | int) -> None:
        """Put seeds into a state; their epochs start again. None is refused.

        Seeds of a layer that hold no blueprint and need one grow one that starts as the identity.
        A seed that becomes DORMANT lets go of its blueprint.
        """
        ids, to = as_seed_ids(seed_ids, self.num_seeds, "state"), as_state(state)
        with self._change():
            if self._layer is not None:
                self._layer.fill(ids, STAGES[to])
            if to is SeedLifecycle.DORMANT:
                self._state.reset(ids)
            else:
                self._state.batch_set_lifecycle_state(ids, STAGES[to])

    def set_blueprint(self, seed_id: int, blueprint_id: int, grafting_strategy: int = 0) -> None:
        """Name a seed's blueprint and strategy; a seed of a layer grows it in the old one's place.

        Raises:
            InvalidArgument: A DORMANT seed of a layer: call ``request_germination``.
        """
        seed = as_seed_id(seed_id, self.num_seeds, "state")
        if self._layer is None:
            self._state.set_blueprint(seed, blueprint_id, grafting_strategy)
        else:
            self._layer.replace_blueprint(seed, blueprint_id, grafting_strategy)

    def increment_epochs(self) -> None:
        """One epoch more for every seed (of a layer: that is not DORMANT); alphas stay."""
        older = (self._state.epochs + 1).clamp_max(MOST_EPOCHS)
        counted = self._state.stages >= (Stage.DORMANT if self._layer is None else Stage.GERMINATED)
        ids = counted.nonzero().flatten()
        self._state.set_rows(ids, epochs_in_state=older[ids])

    def apply_grafting_ramp(self, ramp_duration: int = RAMP) -> None:
        """Set the alpha of every seed that is LOADING to its epochs over ``ramp_duration``."""
        check_count("ramp_duration", ramp_duration, least=1)
        ids = (self._state.stages == Stage.GRAFTING).nonzero().flatten()
        self._state.set_alpha(ids, self._state.epochs[ids] / ramp_duration)

    def update_alpha_blend(self, seed_ids: SeedIds, alpha_values: Tensor | float) -> None:
        """Set alphas of seeds, clamped to [0, 1]."""
        self._state.set_alpha(seed_ids, alpha_values)

    def update_health_scores(self, seed_ids: SeedIds, health_scores: Tensor | float) -> None:
        """Write health scores; a layer's take the place of measured ones until a reset."""
        where = as_seed_ids(seed_ids, self.num_seeds, "state")
        scores = torch.as_tensor(health_scores, dtype=torch.float32).to(self._notes_device)
        self._notes.health_scores[where.to(self._notes_device)] = scores

    @property
    def _notes_device(self) -> torch.device:
        return self._notes.health_scores.device

    def increment_error_count(self, seed_id: int) -> int:
        """Count an error of a seed; return how many it has."""
        seed = as_seed_id(seed_id, self.num_seeds, "state")
        self._notes.error_counts[seed] += 1
        return int(self.error_counts[seed])

    def accumulate_telemetry(
        self, seed_id: int, chunk_sum: float, chunk_sum_sq: float, count: int
    ) -> None:
        """Add to the sums of a seed's values.

        Raises:
            InvalidArgument: Of a layer, which measures them itself.
        """
        seed = as_seed_id(seed_id, self.num_seeds, "state")
        if self._layer is not None:
            raise InvalidArgument("telemetry of a layer is measured: its forward does it")
        self._notes.telemetry_sum[seed] += chunk_sum
        self._notes.telemetry_sum_sq[seed] += chunk_sum_sq
        self._notes.telemetry_count[seed] += count

    def get_telemetry_stats(self, seed_id: int) -> tuple[float, float]:
        """Mean and biased variance of a seed's values; (0.0, 0.0) before the first."""
        seed = as_seed_id(seed_id, self.num_seeds, "state")
        if self._layer is not None:
            known = self._measured()
            return float(known.mean[seed]), float(known.variance[seed])
        count = int(self.telemetry_count[seed])
        if not count:
            return 0.0, 0.0
        mean = float(self.telemetry_sum[seed]) / count
        return mean, max(0.0, float(self.telemetry_sum_sq[seed]) / count - mean * mean)

    def reset_telemetry(self) -> None:
        """Start all statistics anew; of a layer, health scores that were written too."""
        if self._layer is not None:
            forget_measurements(self._layer)
            self._notes.health_scores.fill_(torch.nan)
        for name in ("telemetry_sum", "telemetry_sum_sq", "telemetry_count"):
            getattr(self._notes, name).zero_()

    def forget(self, seed_id: int) -> None:
        """Forget what was noted of a seed: its errors and its health."""
        seed = as_seed_id(seed_id, self.num_seeds, "state")
        self._notes.error_counts[seed] = 0
        self._notes.health_scores[seed] = 1.0 if self._layer is None else torch.nan

    # Keeping it.

    def save_checkpoint(self) -> dict[str, Tensor]:
        """Copies of all tensors, on the CPU, by name."""
        return {name: getattr(self, name).as_subclass(Tensor).cpu().clone() for name in _SAVED}

    def load_checkpoint(self, checkpoint: dict[str, Tensor]) -> None:
        """Take what :meth:`save_checkpoint` returned, or an older one without telemetry.

        Raises:
            InvalidArgument: Of a layer, whose state dict has blueprints as well, or a tensor that
                is missing or of another size; nothing has changed.
            LayoutMismatch: A state that is out of range.
        """
        if self._layer is not None:
            raise InvalidArgument(
                "load the state dict of the layer, which holds its blueprints too"
            )
        missing = {"state_tensor", "alpha_blend", "health_scores", "error_counts"} - set(checkpoint)
        if missing:
            raise InvalidArgument(f"the checkpoint lacks {sorted(missing)}")
        rows, alpha = checkpoint["state_tensor"].cpu(), checkpoint["alpha_blend"].cpu()
        self._state.check_values(rows, alpha)
        for state in rows[:, self.LIFECYCLE_STATE_IDX].tolist():
            as_state(state)
        notes = {
            name: self._as_note(name, checkpoint[name]) for name in NOTED if name in checkpoint
        }
        for name, note in notes.items():
            setattr(self._notes, name, note)
        with self._state.transaction():
            self._write_rows(rows)
            self._write_alphas(alpha)

    def to(self, device: torch.device | str) -> StateTensor:
        """Itself, with its tensors, or its layer, on another device."""
        if self._layer is not None:
            self._layer.to(device)
        else:
            self._state.to(device)
            self._notes.move(self.device)
        return self
