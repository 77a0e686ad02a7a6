"""The state of a layer's seeds as older code reads and writes it: one tensor a column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx.compat.states import OLD_STATES, STAGES, SeedLifecycleState, old_states
from kasmina_fx.errors import InvalidArgument, SeedIndexError, shown
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import HOLDS_BLUEPRINT, SeedLifecycle
from kasmina_fx.state_tensor import StateTensor

#: What a seed grows that is made active with no kernel: it starts as the identity.
UNNAMED: Final = "residual_mlp"
#: Errors that put a seed into ERROR_RECOVERY.
MOST_ERRORS: Final = 3
_NEWEST: Final = 0.1  # the share of the newest score in the moving average of a seed's health
_MOST_LATENCY: Final = 2**16 - 1


def checked_index(seed_idx: object, num_seeds: int) -> int:
    """Return a seed's index if it is one.

    Raises:
        SeedIndexError: It is no int from 0 to ``num_seeds - 1``; a ValueError, as older code
            expects, with its words.
    """
    index = int(seed_idx) if isinstance(seed_idx, Tensor) and seed_idx.numel() == 1 else seed_idx
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < num_seeds:
        raise SeedIndexError(
            f"Invalid seed index: {shown(seed_idx)}; allowed are 0 to {num_seeds - 1}"
        )
    return index


def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(count, dtype=dtype, device="cpu")


@dataclass
class Notes:
    """What older code keeps of each seed beside its stage and alpha.

    Plain tensors ``(S,)`` that may be written to. They are notes for people: no forward reads them,
    and they are in no state dict.
    """

    active_kernel_id: Tensor  # int64
    health_accumulator: Tensor  # float32
    last_update_epoch: Tensor  # int32
    exec_latency_us: Tensor  # uint16, microseconds
    error_count: Tensor  # int16
    fallback_active: Tensor  # bool
    loading: set[int] = field(default_factory=set)  # seeds whose kernel is being read

    @staticmethod
    def of(num_seeds: int) -> Notes:
        """Return notes on seeds of which nothing is known."""
        return Notes(
            active_kernel_id=_zeros(num_seeds, torch.int64),
            health_accumulator=_zeros(num_seeds, torch.float32),
            last_update_epoch=_zeros(num_seeds, torch.int32),
            exec_latency_us=_zeros(num_seeds, torch.uint16),
            error_count=_zeros(num_seeds, torch.int16),
            fallback_active=_zeros(num_seeds, torch.bool),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Nothing is loading in a copy; pickle can't take uint16 apart (torch 2.13)."""
        latency = self.exec_latency_us.to(torch.int32)
        return self.__dict__ | {"exec_latency_us": latency, "loading": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__getstate__`."""
        self.__dict__.update(state)
        self.exec_latency_us = self.exec_latency_us.to(torch.uint16)


NOTED: Final = tuple(name for name in Notes.__dataclass_fields__ if name != "loading")


class Column(Tensor):
    """A copy of a column; ``column[i] = value`` goes through to the seeds.

    Any other write in place raises a RuntimeError (it is an inference tensor): no write is lost.
    """

    _through: Callable[[Tensor], None] | None = None

    @staticmethod
    def of(values: Tensor, through: Callable[[Tensor], None]) -> Tensor:
        """Return a column that hands itself to ``through`` after each assignment."""
        with torch.inference_mode():
            column = values.clone().as_subclass(Column)
        column._through = through
        return column

    def __setitem__(self, where: Any, value: Any) -> None:
        """Write here and to the seeds, which clamp an alpha."""
        with torch.inference_mode():
            super().__setitem__(where, value)
        if self._through is not None:
            self._through(self.as_subclass(Tensor))


class KasminaStateLayout:
    """One tensor a column, ``(num_seeds,)`` on ``device``.

    Columns ``lifecycle_states`` uint8 (:class:`SeedLifecycleState`) and ``alpha_blend`` float16 are
    made when asked for, from the one state that there is, the layer's: assignment to an element or
    slice goes through to it. The others are notes: ``active_kernel_id`` int64,
    ``health_accumulator`` float32, ``last_update_epoch`` int32, ``exec_latency_us`` uint16,
    ``error_count`` int16, ``fallback_active`` bool.

    Args:
        num_seeds: Seeds, at least 1.
        device: Of the tensors; the CPU unless given.

    >>> layout = KasminaStateLayout(2)
    >>> layout.transition_seed_state(1, SeedLifecycleState.ACTIVE, kernel_id=7)
    >>> layout.alpha_blend[1] = 0.5
    >>> layout.get_active_seeds(), layout.get_active_count()
    (tensor([False,  True]), 1)
    """

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        self._layer: KasminaLayer | None = None
        self._state = StateTensor(num_seeds, device)
        self._notes = Notes.of(num_seeds)

    @classmethod
    def of_layer(cls, layer: KasminaLayer, notes: Notes) -> KasminaStateLayout:
        """Return a view of a layer's seeds, and of notes on them."""
        layout = cls.__new__(cls)
        layout._layer, layout._state, layout._notes = layer, layer.state, notes
        return layout

    def __getattr__(self, name: str) -> Any:
        """The notes, on the device where the seeds are now."""
        if name not in NOTED:
            raise AttributeError(f"KasminaStateLayout has no attribute {name!r}")
        notes = self._notes
        here: Tensor = getattr(notes, name)
        if here.device != self.device:
            here = here.to(self.device)
            setattr(notes, name, here)
        return here

    @property
    def num_seeds(self) -> int:
        """Seeds."""
        return self._state.num_seeds

    @property
    def device(self) -> torch.device:
        """Where the seeds' state is."""
        return self._state.state_tensor.device

    @property
    def lifecycle_states(self) -> Tensor:
        """uint8 ``(num_seeds,)``, see :class:`SeedLifecycleState`."""
        return Column.of(self._states().to(self.device), self._write_states)

    @property
    def alpha_blend(self) -> Tensor:
        """float16 ``(num_seeds,)``: 0 to 1, clamped when written."""
        values = self._state.alphas.to(self.device, torch.float16)
        return Column.of(values, self._write_alphas)

    def _states(self) -> Tensor:
        states = old_states(self._state.stages)
        for seed in self._notes.loading:
            states[seed] = int(SeedLifecycleState.LOADING)
        return states

    def _write_states(self, wanted: Tensor) -> None:
        now = self._states()
        for seed, state in enumerate(wanted.tolist()):
            if state != int(now[seed]):
                self._enter(seed, _state(state))

    def _write_alphas(self, wanted: Tensor) -> None:
        new = wanted.cpu()
        changed = (new != self._state.alphas.to(torch.float16)).nonzero().flatten()
        self._state.set_alpha(changed, new[changed].float())

    # What existing code calls.

    def get_active_seeds(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the device: which are ACTIVE."""
        return (self._states() == SeedLifecycleState.ACTIVE).to(self.device)

    def get_dormant_seeds(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the device: which are DORMANT."""
        return (self._states() == SeedLifecycleState.DORMANT).to(self.device)

    def has_active_seeds(self) -> bool:
        """Say whether any seed is ACTIVE; no device copy."""
        return self.get_active_count() > 0

    def get_active_count(self) -> int:
        """Count the seeds that are ACTIVE; no device copy."""
        return int((self._states() == SeedLifecycleState.ACTIVE).sum())

    @property
    def _active_seed_count(self) -> int:
        return self.get_active_count()

    def transition_seed_state(
        self, seed_idx: int, new_state: SeedLifecycleState | int, kernel_id: int | None = None
    ) -> None:
        """Put a seed into a state; none is refused.

        A seed of a layer that is made ACTIVE (LOADING, FOSSILIZED) with no kernel grows a blueprint
        that starts as the identity.

        Raises:
            SeedIndexError, InvalidArgument: No such seed, or no such state.
        """
        seed = checked_index(seed_idx, self.num_seeds)
        state = _state(new_state)
        self._enter(seed, state)
        if kernel_id is not None:
            self.active_kernel_id[seed] = kernel_id
        if state is SeedLifecycleState.ACTIVE:
            self.error_count[seed], self.fallback_active[seed] = 0, False

    def _enter(self, seed: int, state: SeedLifecycleState) -> None:
        stage, now = STAGES[state], SeedLifecycle(int(self._state.stages[seed]))
        if OLD_STATES[now] is state is not SeedLifecycleState.DORMANT:
            return  # it stays in whichever of the finer stages it is
        with self._state.transaction() if self._layer is None else self._layer.transaction():
            layer = self._layer
            if layer is not None and stage in HOLDS_BLUEPRINT and layer.bank_of(seed) is None:
                alpha = float(self._state.alphas[seed])
                layer.reset(seed)
                layer.request_germination(seed, UNNAMED)
                layer.set_alpha(seed, alpha)
            if stage is SeedLifecycle.DORMANT:
                self._state.reset(seed)
            else:
                self._state.batch_set_lifecycle_state([seed], stage)

    def increment_error_count(self, seed_idx: int) -> int:
        """Count an error; the third puts the seed into ERROR_RECOVERY. Returns the count."""
        seed = checked_index(seed_idx, self.num_seeds)
        count = int(self.error_count[seed]) + 1
        self.error_count[seed] = count
        if count >= MOST_ERRORS:
            self.fallback_active[seed] = True
            self._enter(seed, SeedLifecycleState.ERROR_RECOVERY)
        return count

    def update_telemetry(self, seed_idx: int, latency_us: int, health_score: float) -> None:
        """Note a latency (microseconds, at most 65,535) and a health (moving average)."""
        seed = checked_index(seed_idx, self.num_seeds)
        self.exec_latency_us[seed] = max(0, min(int(latency_us), _MOST_LATENCY))
        before = float(self.health_accumulator[seed])
        fresh = abs(before) < 1e-6  # the first is taken as it is
        mean = health_score if fresh else before + _NEWEST * (health_score - before)
        self.health_accumulator[seed] = mean

    def reset_seed(self, seed_idx: int) -> None:
        """Make a seed what it was at first: DORMANT, and nothing noted."""
        seed = checked_index(seed_idx, self.num_seeds)
        self._state.reset(seed)
        self._notes.loading.discard(seed)
        for name in NOTED:
            getattr(self, name)[seed] = 0

    def get_stats(self) -> dict[str, int | float]:
        """Counts of seeds by state, and means of the notes."""
        counts = torch.bincount(self._states().long(), minlength=len(SeedLifecycleState)).tolist()
        return {
            "num_seeds": self.num_seeds,
            "dormant_seeds": counts[SeedLifecycleState.DORMANT],
            "active_seeds": counts[SeedLifecycleState.ACTIVE],
            "loading_seeds": counts[SeedLifecycleState.LOADING],
            "error_recovery_seeds": counts[SeedLifecycleState.ERROR_RECOVERY],
            "fossilized_seeds": counts[SeedLifecycleState.FOSSILIZED],
            "avg_health": float(self.health_accumulator.mean()),
            "avg_latency_us": float(self.exec_latency_us.float().mean()),
            "total_errors": int(self.error_count.sum()),
            "fallback_active_count": int(self.fallback_active.sum()),
        }


def _state(given: Any) -> SeedLifecycleState:
    try:
        return SeedLifecycleState(given)
    except ValueError:
        allowed = ", ".join(f"{state.name} ({state.value})" for state in SeedLifecycleState)
        raise InvalidArgument(f"state {shown(given)}; allowed are {allowed}") from None
