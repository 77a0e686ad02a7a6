"""The wider state tensor of older code: eight columns, a history and metrics for each seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import SeedIds, as_seed_id, as_seed_ids, check_count
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.lifecycle import LEGAL, SeedLifecycle, as_stage

_METRICS: Final = ("loss", "accuracy", "stability", "efficiency")
_ACTIVE: Final = (SeedLifecycle.TRAINING, SeedLifecycle.GRAFTING, SeedLifecycle.FINE_TUNING)


class ExtendedStateTensor(nn.Module):
    """Registered buffers, saved and moved with the module that holds them.

    ``state_tensor``, int32 ``(S, 8)``; ``transition_history``, int32 ``(S, 10, 2)``: the last
    stages left and entered, in a ring that ``history_pointers``, int32 ``(S,)``, counts;
    ``performance_metrics``, float32 ``(S, 4)``: loss, accuracy, stability, efficiency;
    ``telemetry_buffer``, float32 ``(S, 2)``.

    Args:
        num_seeds: Seeds, at least 1.
        device: Of the buffers; the CPU unless given.

    >>> state = ExtendedStateTensor(3)
    >>> state.set_state(torch.tensor([1]), torch.tensor([SeedLifecycle.GERMINATED]))
    >>> state.get_state_summary(), state.get_transition_history(1)
    ({'DORMANT': 2, 'GERMINATED': 1}, [(0, 1)])
    """

    LIFECYCLE_STATE: Final = 0
    BLUEPRINT_ID: Final = 1
    EPOCHS_IN_STATE: Final = 2
    GRAFTING_STRATEGY: Final = 3
    PARENT_STATE: Final = 4
    CHECKPOINT_ID: Final = 5
    EVALUATION_SCORE: Final = 6
    ERROR_COUNT: Final = 7
    NUM_STATE_VARS: Final = 8
    HISTORY_DEPTH: Final = 10

    state_tensor: Tensor
    transition_history: Tensor
    history_pointers: Tensor
    performance_metrics: Tensor
    telemetry_buffer: Tensor

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_count("num_seeds", num_seeds, least=1)
        self.num_seeds = num_seeds
        #: Puts seeds of a layer into stages, where this is a view of one.
        self.put: Callable[[Tensor, Tensor], None] | None = None
        ints = {"dtype": torch.int32, "device": device or "cpu"}
        floats = {"dtype": torch.float32, "device": device or "cpu"}
        rows: Tensor = torch.zeros(num_seeds, self.NUM_STATE_VARS, **ints)  # type: ignore[call-overload]  # both fit
        rows[:, [self.BLUEPRINT_ID, self.CHECKPOINT_ID]] = -1
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "transition_history": ((num_seeds, self.HISTORY_DEPTH, 2), ints),
            "history_pointers": ((num_seeds,), ints),
            "performance_metrics": ((num_seeds, len(_METRICS)), floats),
            "telemetry_buffer": ((num_seeds, 2), floats),
        }
        self.register_buffer("state_tensor", rows)
        for name, (shape, options) in shapes.items():
            self.register_buffer(name, torch.zeros(shape, **options))

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.state_tensor.device

    def _ids(self, seed_indices: SeedIds) -> Tensor:
        return as_seed_ids(seed_indices, self.num_seeds, "extended state").to(self.device)

    def _write(self, seed_indices: SeedIds, column: int, values: Tensor | int) -> None:
        ids = self._ids(seed_indices)
        given = torch.as_tensor(values, device=self.device)
        if given.is_floating_point() or given.numel() not in (1, len(ids)):
            raise InvalidArgument(f"{shown(values)} for {len(ids)} seeds: give ints, one for each")
        self.state_tensor[ids, column] = given.to(torch.int32).flatten()

    # Stages.

    def get_state(self, seed_indices: SeedIds | None = None) -> Tensor:
        """int32 ``(n,)``: stages of some seeds, or all."""
        column = self.state_tensor[:, self.LIFECYCLE_STATE]
        return column if seed_indices is None else column[self._ids(seed_indices)]

    def set_state(
        self, seed_indices: SeedIds, new_states: Tensor, record_transition: bool = True
    ) -> None:
        """Put seeds into stages; their epochs start again. None is refused.

        Args:
            seed_indices: Seeds.
            new_states: int ``(n,)``.
            record_transition: Keep stages left as PARENT_STATE and in the history.

        Raises:
            InvalidArgument: A number that is no stage; nothing has changed.
        """
        ids, new = self._ids(seed_indices), torch.as_tensor(new_states, device=self.device)
        for stage in new.flatten().tolist():
            as_stage(stage, "extended state")
        before = self.state_tensor[ids, self.LIFECYCLE_STATE]
        if self.put is not None:
            self.put(ids.cpu(), new.flatten().cpu())
        self._write(ids, self.LIFECYCLE_STATE, new)
        self._write(ids, self.EPOCHS_IN_STATE, 0)
        if record_transition:
            self.record(ids, before)

    def record(self, ids: Tensor, before: Tensor) -> None:
        """Note in the history that seeds went from stages to those that they are in now."""
        where = (self.history_pointers[ids] % self.HISTORY_DEPTH).long()
        now = self.state_tensor[ids, self.LIFECYCLE_STATE]
        self.transition_history[ids, where] = torch.stack([before, now], 1)
        self.history_pointers[ids] += 1
        self.state_tensor[ids, self.PARENT_STATE] = before

    def take(self, rows: Tensor, errors: Tensor) -> None:
        """Take the state of a layer: int32 ``(S, 4)`` and errors ``(S,)``; note who has moved."""
        moved = (rows[:, 0] != self.get_state()).nonzero().flatten()
        before = self.state_tensor[moved, self.LIFECYCLE_STATE]
        ids = rows[:, self.BLUEPRINT_ID]
        self.state_tensor[:, :4] = rows
        self.state_tensor[:, self.BLUEPRINT_ID] = torch.where(ids == 0, -1, ids)
        self.state_tensor[:, self.ERROR_COUNT] = errors.to(torch.int32)
        self.record(moved, before)

    def increment_epochs(self, active_mask: Tensor | None = None) -> None:
        """One epoch more for seeds of a bool mask ``(S,)``, or all.

        Raises:
            InvalidArgument: Of a layer, whose ``step_epoch()`` counts.
        """
        self._by_hand("step_epoch()")
        mask = slice(None) if active_mask is None else active_mask.to(self.device)
        self.state_tensor[mask, self.EPOCHS_IN_STATE] += 1

    def _by_hand(self, instead: str) -> None:
        if self.put is not None:
            raise InvalidArgument(f"this is the state of a layer: call its {instead}")

    def get_seeds_in_state(self, state: SeedLifecycle | int | str) -> Tensor:
        """int64 ``(n,)``: ids of the seeds in a stage."""
        return (self.get_state() == as_stage(state, "extended state")).nonzero().flatten()

    def get_rollback_states(self, seed_indices: SeedIds) -> Tensor:
        """int32 ``(n,)``: the stages that seeds were in before."""
        return self.state_tensor[self._ids(seed_indices), self.PARENT_STATE]

    def get_state_summary(self) -> dict[str, int]:
        """Seeds in each stage that has any, by name."""
        counts = torch.bincount(self.get_state().long(), minlength=len(SeedLifecycle)).tolist()
        return {stage.name: counts[stage] for stage in SeedLifecycle if counts[stage]}

    def get_transition_history(
        self, seed_id: int, limit: int | None = None
    ) -> list[tuple[int, int]]:
        """Stages left and entered, the newest first, at most ten."""
        seed = as_seed_id(seed_id, self.num_seeds, "extended state")
        pointer = int(self.history_pointers[seed])
        most = min(pointer, self.HISTORY_DEPTH if limit is None else min(limit, self.HISTORY_DEPTH))
        ring = self.transition_history[seed].tolist()
        found = (ring[(pointer - 1 - back) % self.HISTORY_DEPTH] for back in range(most))
        return [(left, entered) for left, entered in found]

    def get_active_seeds_mask(self) -> Tensor:
        """Bool ``(S,)``: TRAINING, GRAFTING or FINE_TUNING."""
        return torch.isin(self.get_state(), torch.tensor(_ACTIVE, device=self.device))

    def validate_transitions(
        self, seed_indices: SeedIds, target_states: Tensor
    ) -> tuple[Tensor, list[str]]:
        """Say which transitions the lifecycle has: bool ``(n,)``, and a line for each other."""
        ids, targets = self._ids(seed_indices).tolist(), torch.as_tensor(target_states).tolist()
        valid, errors = [], []
        for seed, target in zip(ids, targets, strict=True):
            now, to = SeedLifecycle(int(self.get_state()[seed])), as_stage(target, "extended state")
            valid.append(to in LEGAL[now])
            if not valid[-1]:
                errors.append(f"Seed {seed}: Cannot transition from {now.name} to {to.name}")
        return torch.tensor(valid, dtype=torch.bool, device=self.device), errors

    # What is noted.

    def update_blueprint(
        self,
        seed_indices: SeedIds,
        blueprint_ids: Tensor,
        grafting_strategies: Tensor | None = None,
    ) -> None:
        """Name blueprints, and strategies, of seeds.

        Raises:
            InvalidArgument: Of a layer, whose ``request_germination()`` grows them.
        """
        self._by_hand("request_germination()")
        self._write(seed_indices, self.BLUEPRINT_ID, blueprint_ids)
        if grafting_strategies is not None:
            self._write(seed_indices, self.GRAFTING_STRATEGY, grafting_strategies)

    def update_performance(self, seed_indices: SeedIds, metrics: Mapping[str, Tensor]) -> None:
        """Note metrics ``(n,)`` of seeds by name, and ``evaluation_score`` in thousandths.

        Raises:
            InvalidArgument: A metric that there isn't; nothing has changed.
        """
        unknown = set(metrics) - {*_METRICS, "evaluation_score"}
        if unknown:
            raise InvalidArgument(f"metrics {sorted(unknown)}; known are {', '.join(_METRICS)}")
        ids = self._ids(seed_indices)
        for name, values in metrics.items():
            given = torch.as_tensor(values, dtype=torch.float32, device=self.device)
            if name == "evaluation_score":
                self._write(ids, self.EVALUATION_SCORE, (given * 1000).round().to(torch.int32))
            else:
                self.performance_metrics[ids, _METRICS.index(name)] = given

    def increment_error_count(self, seed_indices: SeedIds) -> None:
        """Count an error of seeds."""
        self.state_tensor[self._ids(seed_indices), self.ERROR_COUNT] += 1

    def reset_error_count(self, seed_indices: SeedIds) -> None:
        """Forget the errors of seeds."""
        self._write(seed_indices, self.ERROR_COUNT, 0)

    def set_checkpoint(self, seed_indices: SeedIds, checkpoint_ids: Tensor) -> None:
        """Note the numbers of seeds' checkpoints."""
        self._write(seed_indices, self.CHECKPOINT_ID, checkpoint_ids)

    def reset_telemetry(self) -> None:
        """Start the sums anew."""
        self.telemetry_buffer.zero_()

    # Keeping it.

    def to_dict(self) -> dict[str, Any]:
        """All buffers as numpy arrays, by name, and ``num_seeds``."""
        arrays = {name: buffer.cpu().numpy().copy() for name, buffer in self.named_buffers()}
        return {"num_seeds": self.num_seeds, **arrays}

    def from_dict(self, data: Mapping[str, Any]) -> None:
        """Take what :meth:`to_dict` returned.

        Raises:
            InvalidArgument: A buffer that is missing or of another shape; nothing has changed.
        """
        self._by_hand("load_state_dict()")
        buffers = dict(self.named_buffers())
        missing = sorted(set(buffers) - set(data))
        if missing:
            raise InvalidArgument(f"the dict lacks {missing}")
        given = {n: torch.as_tensor(data[n]).to(b.device, b.dtype) for n, b in buffers.items()}
        for name, values in given.items():
            if values.shape != buffers[name].shape:
                raise InvalidArgument(f"{name} of {tuple(values.shape)} for {self.num_seeds} seeds")
        for name, values in given.items():
            buffers[name].copy_(values)
