"""What older code reads of the state of a layer's seeds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from kasmina_fx import state_tensor
from kasmina_fx.arguments import as_seed_id
from kasmina_fx.compat.chunked.figures import NOTED, Figures, Notes
from kasmina_fx.compat.chunked.seed_owner import SeedOwner
from kasmina_fx.compat.chunked.seed_state import LogicalSeedState, logical_states
from kasmina_fx.compat.chunked.states import COOLDOWN, SeedLifecycle, as_state, five_of
from kasmina_fx.compat.state_layout import Column
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.lifecycle import SeedLifecycle as Stage

if TYPE_CHECKING:
    from typing_extensions import Self


class ReadableState(ABC):
    """The half of :class:`~kasmina_fx.compat.chunked.StateTensor` that changes nothing."""

    LIFECYCLE_STATE_IDX: Final = 0
    BLUEPRINT_ID_IDX: Final = 1
    EPOCHS_IN_STATE_IDX: Final = 2
    GRAFTING_STRATEGY_IDX: Final = 3

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        self._layer: SeedOwner | None = None
        self._state = state_tensor.StateTensor(num_seeds, device, embargo_epochs=COOLDOWN)
        self._notes = Notes.of(num_seeds)
        self._notes.move(self.device)

    @classmethod
    def of_layer(cls, layer: SeedOwner, notes: Notes) -> Self:
        """Return a view of a layer's seeds."""
        view = cls.__new__(cls)
        view._layer, view._state, view._notes = layer, layer.state, notes
        return view

    @property
    def num_seeds(self) -> int:
        """Seeds."""
        return self._state.num_seeds

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._state.state_tensor.device

    def _change(self) -> AbstractContextManager[None]:
        return self._state.transaction() if self._layer is None else self._layer.transaction()

    # The tensors.

    @property
    def state_tensor(self) -> Tensor:
        """int32 ``(num_seeds, 4)``: the five states, blueprint ids, epochs, strategies."""
        return Column.of(self._rows().to(self.device), self._write_rows)

    @property
    def alpha_blend(self) -> Tensor:
        """float32 ``(num_seeds,)``: 0 to 1, clamped when written."""
        return Column.of(self._state.alphas.to(self.device), self._write_alphas)

    def __getattr__(self, name: str) -> Tensor:
        """What is noted, or of a layer what is measured, on the device."""
        if name not in NOTED:
            raise AttributeError(f"StateTensor has no attribute {name!r}")
        if self._layer is None:
            noted: Tensor = getattr(self._notes, name)
            return noted
        values: Tensor = getattr(self._measured(), name)
        return Column.of(values.to(self.device), self._refuse(name))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; notes of seeds that belong to no layer may be replaced."""
        if name not in NOTED:
            super().__setattr__(name, value)
        elif self._layer is not None:
            self._refuse(name)(self._state.alpha)
        else:
            setattr(self._notes, name, self._as_note(name, value))

    def _as_note(self, name: str, value: Any) -> Tensor:
        now: Tensor = getattr(self._notes, name)
        given = torch.as_tensor(value, dtype=now.dtype, device=self.device)
        if given.shape != now.shape:
            raise InvalidArgument(f"{name} of {tuple(given.shape)} for {self.num_seeds} seeds")
        return given.clone()

    def _refuse(self, name: str) -> Callable[[Tensor], None]:
        def refuse(_: Tensor) -> None:
            raise InvalidArgument(f"{name} of a layer is measured: it can't be assigned to")

        return refuse

    def _measured(self) -> Figures:
        assert self._layer is not None  # asked of layers alone
        return Figures.of(self._layer, self._notes)

    def _rows(self) -> Tensor:
        rows = self._state.rows.clone()
        rows[:, self.LIFECYCLE_STATE_IDX] = five_of(self._state.stages)
        return rows

    @abstractmethod
    def _write_rows(self, wanted: Tensor) -> None:
        """Take what was assigned to elements of ``state_tensor``."""

    @abstractmethod
    def _write_alphas(self, wanted: Tensor) -> None:
        """Take what was assigned to elements of ``alpha_blend``."""

    # Reading.

    def get_lifecycle_states(self) -> Tensor:
        """int32 ``(num_seeds,)`` on the device: which of the five each seed is in."""
        return self._states().to(self.device)

    def _states(self) -> Tensor:
        return five_of(self._state.stages)

    def get_active_seeds(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the device: LOADING or ACTIVE."""
        states = self.get_lifecycle_states()
        return (states == SeedLifecycle.LOADING) | (states == SeedLifecycle.ACTIVE)

    def get_dormant_seeds(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the device."""
        return self.get_lifecycle_states() == SeedLifecycle.DORMANT

    def get_seed_state(self, seed_id: int) -> dict[str, Any]:
        """State, blueprint, epochs, strategy, health, errors and alpha of a seed.

        Raises:
            SeedIndexError: There is no such seed (a ValueError).
        """
        seed = as_seed_id(seed_id, self.num_seeds, "state")
        state, blueprint_id, epochs, strategy = self._rows()[seed].tolist()
        noted = self._notes if self._layer is None else self._measured()
        return {
            "lifecycle_state": state,
            "blueprint_id": blueprint_id,
            "epochs_in_state": epochs,
            "grafting_strategy": strategy,
            "health_score": float(noted.health_scores[seed]),
            "error_count": int(noted.error_counts[seed]),
            "alpha_blend": float(self._state.alphas[seed]),
        }

    def get_state_distribution(self) -> dict[str, int]:
        """Seeds in each of the five states, by name."""
        counts = torch.bincount(self._states(), minlength=len(SeedLifecycle)).tolist()
        return {state.name: counts[state] for state in SeedLifecycle}

    def find_seeds_by_state(self, state: SeedLifecycle | int) -> Tensor:
        """int64 ``(n,)`` on the device: ids of the seeds in a state."""
        return (self._states() == as_state(state)).nonzero().flatten().to(self.device)

    def find_unhealthy_seeds(self, threshold: float = 0.7) -> Tensor:
        """int64 ``(n,)`` on the device: ids of seeds whose health is below the threshold."""
        return (self.health_scores.as_subclass(Tensor) < threshold).nonzero().flatten()

    def transition_ready_seeds(self) -> dict[str, list[int]]:
        """Seeds whose ramp is over, and seeds in ERROR_RECOVERY for 100 epochs; none is moved.

        ``active_to_fossilized`` is empty: that is a controller's to say.
        """
        states = self._states()
        grafted = (self._state.stages == Stage.GRAFTING) & (self._state.alphas >= 1.0)
        rested = (states == SeedLifecycle.ERROR_RECOVERY) & (self._state.epochs >= COOLDOWN)
        return {
            "loading_to_active": grafted.nonzero().flatten().tolist(),
            "active_to_fossilized": [],
            "error_to_dormant": rested.nonzero().flatten().tolist(),
        }

    def get_summary_stats(self) -> dict[str, Any]:
        """Counts, and figures over all seeds; of a layer one device copy."""
        noted = self._notes if self._layer is None else self._measured()
        active = self.get_active_seeds().cpu()
        return {
            "total_seeds": self.num_seeds,
            "state_distribution": self.get_state_distribution(),
            "active_count": int(active.sum()),
            "avg_health_score": float(noted.health_scores.mean()),
            "min_health_score": float(noted.health_scores.min()),
            "max_error_count": int(noted.error_counts.max()),
            "avg_alpha_blend": float(self._state.alphas[active].mean()) if active.any() else 0.0,
        }

    def to_logical_seeds(self, layer_id: str, chunk_sizes: Sequence[int]) -> list[LogicalSeedState]:
        """What is known of every seed; of a layer one device copy.

        Raises:
            InvalidArgument: Not one size for each seed.
        """
        if len(chunk_sizes) != self.num_seeds:
            raise InvalidArgument(f"{len(chunk_sizes)} chunk sizes for {self.num_seeds} seeds")
        noted = self._notes if self._layer is None else self._measured()
        return logical_states(layer_id, self._rows(), noted.health_scores, noted.error_counts)
