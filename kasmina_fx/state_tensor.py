"""The state of every seed of a layer: one int32 row and one alpha each.

The device buffers are what is saved and reported. A host mirror of the same numbers is what is
checked and changed: no change waits for the device, and nothing is read back from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.errors import IllegalTransition, InvalidArgument, InvalidType, LayoutMismatch
from kasmina_fx.lifecycle import (
    LEGAL,
    REACHABLE,
    GraftingStrategy,
    SeedLifecycle,
    holds_blueprint,
    is_blended,
    is_legal,
)
from kasmina_fx.seed_ids import SeedIds, as_seed_ids
from kasmina_fx.transfer import to_device

#: Largest value of each column: int8, int32, int16 and int8.
_COLUMN_MAX: Final = (max(SeedLifecycle), 2**31 - 1, 2**15 - 1, max(GraftingStrategy))
#: One lock for all layers: a first germination changes several, and changes are short.
_LOCK: Final = RLock()
_COLUMN_NAME: Final = ("lifecycle_state", "blueprint_id", "epochs_in_state", "grafting_strategy")


class StateTensor(nn.Module):
    """Two buffers: ``state_tensor``, int32 ``(num_seeds, 4)``; ``alpha``, float32 ``(num_seeds,)``.

    Columns: ``LIFECYCLE_STATE_IDX`` 0 (fits int8), ``BLUEPRINT_ID_IDX`` 1, ``EPOCHS_IN_STATE_IDX``
    2 (fits int16, saturates), ``GRAFTING_STRATEGY_IDX`` 3 (fits int8). A value outside its column's
    range is refused.

    Args:
        num_seeds: Rows, at least 1.
        device: Of the buffers.
        name: What messages call it.
    """

    LIFECYCLE_STATE_IDX: Final = 0
    BLUEPRINT_ID_IDX: Final = 1
    EPOCHS_IN_STATE_IDX: Final = 2
    GRAFTING_STRATEGY_IDX: Final = 3

    state_tensor: Tensor
    alpha: Tensor

    def __init__(
        self, num_seeds: int, device: torch.device | str | None = None, *, name: str = "state"
    ) -> None:
        super().__init__()
        given: Any = num_seeds  # from callers without a type checker, anything
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise InvalidArgument(f"num_seeds={num_seeds!r}: give an int of at least 1")
        self.num_seeds, self.name = num_seeds, name
        self.register_buffer("state_tensor", torch.zeros(num_seeds, 4, dtype=torch.int32))
        self.register_buffer("alpha", torch.zeros(num_seeds, dtype=torch.float32))
        self._mirror, self._alpha = self.state_tensor.clone(), self.alpha.clone()
        self.on_publish: Callable[[], None] | None = None
        self._depth = 0
        if device is not None:
            self.to(device)

    # Reading: the host mirror, no device copy.

    @property
    def stages(self) -> Tensor:
        """int32 ``(num_seeds,)`` on the CPU, a view not to be written to."""
        return self._mirror[:, self.LIFECYCLE_STATE_IDX]

    @property
    def blueprint_ids(self) -> Tensor:
        """int32 ``(num_seeds,)`` on the CPU, a view not to be written to."""
        return self._mirror[:, self.BLUEPRINT_ID_IDX]

    @property
    def alphas(self) -> Tensor:
        """float32 ``(num_seeds,)`` on the CPU, not to be written to."""
        return self._alpha

    @property
    def holding(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the CPU: which seeds hold a blueprint."""
        return holds_blueprint(self.stages)

    @property
    def blended(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the CPU: which seeds change the host's output."""
        return is_blended(self.stages) & (self.blueprint_ids > 0)

    def get_lifecycle_states(self) -> Tensor:
        """int32 ``(num_seeds,)``, a copy, on the device."""
        return self.state_tensor[:, self.LIFECYCLE_STATE_IDX].clone()

    def get_dormant_seeds(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the device."""
        return self.state_tensor[:, self.LIFECYCLE_STATE_IDX] == SeedLifecycle.DORMANT

    def get_active_seeds(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the device: seeds that are blended."""
        return self.blended.to(self.state_tensor.device)

    def get_seed_state(self, seed_id: int) -> dict[str, int | float]:
        """One row by column name, with ``alpha``."""
        row = int(as_seed_ids(seed_id, self.num_seeds, self.name))
        columns: dict[str, int | float] = dict(
            zip(_COLUMN_NAME, self._mirror[row].tolist(), strict=True)
        )
        return columns | {"alpha": float(self._alpha[row])}

    def get_state_distribution(self) -> dict[str, int]:
        """Seeds in each stage that has any, by name."""
        counts = torch.bincount(self.stages, minlength=len(SeedLifecycle)).tolist()
        return {stage.name: counts[stage] for stage in SeedLifecycle if counts[stage]}

    def find_seeds_by_state(self, stage: SeedLifecycle | int) -> Tensor:
        """int64 ``(n,)`` on the CPU: ids of the seeds in a stage."""
        return (self.stages == int(stage)).nonzero().flatten()

    # Writing: staged on the mirror, published as a whole.

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside become visible at once, at the end; an exception undoes them all."""
        with _LOCK:
            with torch.inference_mode(False):
                before = self._mirror.clone(), self._alpha.clone()
            self._depth += 1
            try:
                yield
            except BaseException:
                self._mirror, self._alpha = before
                raise
            finally:
                self._depth -= 1
            if self._depth == 0:
                self._publish()

    def set_rows(self, seed_ids: SeedIds, **columns: SeedLifecycle | int | Tensor) -> None:
        """Write columns of some rows: ``set_rows([3, 5], lifecycle_state=1, blueprint_id=7)``.

        Raises:
            InvalidArgument, InvalidType: An unknown column, or a value outside its column's range;
                nothing is written.
        """
        ids = as_seed_ids(seed_ids, self.num_seeds, self.name)
        staged = self._mirror[ids]
        for name, value in columns.items():
            if name not in _COLUMN_NAME:
                raise InvalidArgument(f"{self.name}: no column {name!r}; it has {_COLUMN_NAME}")
            column = _COLUMN_NAME.index(name)
            values = torch.as_tensor(value)
            if values.dtype.is_floating_point or values.dtype.is_complex:
                raise InvalidType(f"{self.name}: {name}={value!r}; give ints")
            if values.shape not in ((), (1,), (len(ids),)):
                raise InvalidArgument(
                    f"{self.name}: {name} of shape {tuple(values.shape)} for {len(ids)} seeds"
                )
            values = values.to("cpu", torch.int64)
            wrong = values[(values < 0) | (values > _COLUMN_MAX[column])]
            if wrong.numel():
                raise InvalidArgument(
                    f"{self.name}: {name}={int(wrong.flatten()[0])} for seeds {ids.tolist()[:8]}; "
                    f"allowed are 0 to {_COLUMN_MAX[column]}"
                )
            staged[:, column] = values.to(torch.int32)
        with self.transaction():
            self._mirror[ids] = staged

    def set_lifecycle_state(self, seed_id: int, state: SeedLifecycle | int) -> None:
        """Put a seed into a stage, with no check of the transition; its epochs start again."""
        self.batch_set_lifecycle_state([seed_id], state)

    def batch_set_lifecycle_state(self, seed_ids: SeedIds, state: SeedLifecycle | int) -> None:
        """Put seeds into a stage, with no check of the transition; their epochs start again."""
        self.set_rows(seed_ids, lifecycle_state=state, epochs_in_state=0)

    def set_blueprint(self, seed_id: int, blueprint_id: int, grafting_strategy: int = 0) -> None:
        """Name a seed's blueprint and strategy."""
        self.set_rows(seed_id, blueprint_id=blueprint_id, grafting_strategy=grafting_strategy)

    def advance(self, seed_ids: SeedIds, to: SeedLifecycle | int) -> None:
        """One legal transition for all the seeds, or none.

        Raises:
            IllegalTransition: Says from, to and the legal ones, for the first seed that can't.
        """
        ids = as_seed_ids(seed_ids, self.num_seeds, self.name)
        try:
            to = SeedLifecycle(to)
        except ValueError:
            raise InvalidArgument(
                f"{self.name}: stage {to!r}; allowed are {[stage.name for stage in SeedLifecycle]}"
            ) from None
        legal = is_legal(self.stages[ids], to)
        if len(ids) and (to not in REACHABLE or not bool(legal.all())):
            seed = int(ids[~legal][0]) if not bool(legal.all()) else int(ids[0])
            now = SeedLifecycle(int(self.stages[seed]))
            allowed = [stage.name for stage in sorted(LEGAL[now] & REACHABLE)]
            raise IllegalTransition(
                f"{self.name}: seed {seed} can't go from {now.name} to {to.name}; legal from "
                f"{now.name}: {', '.join(allowed) or 'none'}"
            )
        changes: dict[str, int] = {"lifecycle_state": to, "epochs_in_state": 0}
        if to is SeedLifecycle.DORMANT:
            changes |= {"blueprint_id": 0, "grafting_strategy": 0}
        with self.transaction():
            self.set_rows(ids, **changes)
            if to in (SeedLifecycle.DORMANT, SeedLifecycle.CULLED, SeedLifecycle.CANCELLED):
                self._alpha[ids] = 0.0

    def set_alpha(self, seed_ids: SeedIds, alpha: float | Tensor) -> None:
        """Blend factors, a number or ``(n,)``; clamped to [0, 1].

        Raises:
            InvalidArgument: NaN; nothing is written.
        """
        ids = as_seed_ids(seed_ids, self.num_seeds, self.name)
        try:
            values = torch.as_tensor(alpha, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise InvalidType(f"{self.name}: alpha {alpha!r}; give a number or a tensor") from None
        if values.shape not in ((), (1,), (len(ids),)):
            raise InvalidArgument(
                f"{self.name}: alpha of shape {tuple(values.shape)} for {len(ids)} seeds; give a "
                "number or one for each"
            )
        if bool(values.isnan().any()):
            raise InvalidArgument(f"{self.name}: alpha is NaN; give a number from 0 to 1")
        with self.transaction():
            self._alpha[ids] = values.clamp(0.0, 1.0).expand(len(ids))

    def increment_epochs(self) -> None:
        """One epoch more for every seed that isn't dormant; stops at 32,767."""
        with self.transaction():
            column = self._mirror[:, self.EPOCHS_IN_STATE_IDX]
            column += (self.stages != SeedLifecycle.DORMANT).to(torch.int32)
            column.clamp_(max=_COLUMN_MAX[self.EPOCHS_IN_STATE_IDX])

    @torch.inference_mode(False)
    def refresh_mirror(self) -> None:
        """Take the mirror from the device buffers: after they were loaded."""
        self._mirror = self.state_tensor.detach().to("cpu", copy=True)
        self._alpha = self.alpha.detach().to("cpu", torch.float32, copy=True)

    def check_values(self, state: Tensor | None, alpha: Tensor | None) -> None:
        """Refuse what could not be this layer's state.

        Raises:
            LayoutMismatch: Another shape, dtype or a value outside its column's range.
        """
        if state is not None:
            if state.shape != (self.num_seeds, 4) or state.dtype != torch.int32:
                raise LayoutMismatch(
                    f"{self.name}: state tensor of {state.dtype} {tuple(state.shape)}; this layer "
                    f"takes int32 ({self.num_seeds}, 4)"
                )
            limits = torch.tensor(_COLUMN_MAX, device=state.device)
            if bool(((state < 0) | (state > limits)).any()):
                raise LayoutMismatch(f"{self.name}: the state tensor holds values out of range")
        if alpha is not None:
            if alpha.shape != (self.num_seeds,):
                raise LayoutMismatch(
                    f"{self.name}: alpha of shape {tuple(alpha.shape)}; this layer takes "
                    f"({self.num_seeds},)"
                )
            if not bool(((alpha >= 0) & (alpha <= 1)).all()):
                raise LayoutMismatch(f"{self.name}: alpha holds values outside 0 to 1")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StateTensor:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, unannotated
        # float32, whatever the model's dtype
        self.alpha = to_device(self._alpha, self.alpha.device)
        return self

    @torch.inference_mode(False)
    def _publish(self) -> None:
        # New tensors instead of writing in place: a backward still to run keeps its forward's.
        device = self.state_tensor.device
        self.state_tensor = to_device(self._mirror, device)
        self.alpha = to_device(self._alpha, device)
        if self.on_publish is not None:
            self.on_publish()

    def __getstate__(self) -> dict[str, Any]:
        """Without the layer that listens; it connects again."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's, unannotated
        state["on_publish"] = None
        return state
