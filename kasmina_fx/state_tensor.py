"""The state of every seed of a layer: one int32 row and one alpha each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from kasmina_fx.arguments import SeedIds, as_seed_id, as_seed_ids, check_count
from kasmina_fx.config import check_embargo
from kasmina_fx.errors import (
    IllegalTransition,
    InvalidArgument,
    InvalidType,
    LayoutMismatch,
    shown,
)
from kasmina_fx.lifecycle import (
    DEFAULT_EMBARGO,
    LEGAL,
    LEGAL_FOR_IDENTITY,
    LETS_GO,
    MOST_EPOCHS,
    SeedLifecycle,
    as_stage,
    holds_blueprint,
    is_blended,
    is_legal,
    is_legal_for_identity,
)
from kasmina_fx.state_columns import COLUMN_NAMES, column_max, column_of, in_range
from kasmina_fx.transactions.staged_state import StagedState


class StateTensor(StagedState):
    """Two buffers: ``state_tensor``, int32 ``(num_seeds, 4)``; ``alpha``, float32 ``(num_seeds,)``.

    Columns: ``LIFECYCLE_STATE_IDX`` 0 (fits int8), ``BLUEPRINT_ID_IDX`` 1, ``EPOCHS_IN_STATE_IDX``
    2 (fits int16, saturates), ``GRAFTING_STRATEGY_IDX`` 3 (fits int8). A value outside its column's
    range is refused.

    Args:
        num_seeds: Rows, at least 1.
        device: Of the buffers.
        name: What messages call it.
        embargo_epochs: Epochs that a CULLED seed rests before it may become DORMANT.
    """

    LIFECYCLE_STATE_IDX: Final = 0
    BLUEPRINT_ID_IDX: Final = 1
    EPOCHS_IN_STATE_IDX: Final = 2
    GRAFTING_STRATEGY_IDX: Final = 3

    def __init__(
        self,
        num_seeds: int,
        device: torch.device | str | None = None,
        *,
        name: str = "state",
        embargo_epochs: int = DEFAULT_EMBARGO,
    ) -> None:
        check_count("num_seeds", num_seeds, least=1)
        check_embargo(embargo_epochs)
        super().__init__(num_seeds)
        self.num_seeds, self.name, self.embargo_epochs = num_seeds, name, embargo_epochs
        if device is not None:
            self.to(device)

    # Reading: the host mirror, no device copy.

    @property
    def stages(self) -> Tensor:
        """int32 ``(num_seeds,)`` on the CPU, a view not to be written to."""
        return self.rows[:, self.LIFECYCLE_STATE_IDX]

    @property
    def blueprint_ids(self) -> Tensor:
        """int32 ``(num_seeds,)`` on the CPU, a view not to be written to."""
        return self.rows[:, self.BLUEPRINT_ID_IDX]

    @property
    def epochs(self) -> Tensor:
        """int32 ``(num_seeds,)`` on the CPU, a view not to be written to."""
        return self.rows[:, self.EPOCHS_IN_STATE_IDX]

    @property
    def strategies(self) -> Tensor:
        """int32 ``(num_seeds,)`` on the CPU, a view not to be written to."""
        return self.rows[:, self.GRAFTING_STRATEGY_IDX]

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
        return self.on_device()[0][:, self.LIFECYCLE_STATE_IDX].clone()

    def get_dormant_seeds(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the device."""
        return self.on_device()[0][:, self.LIFECYCLE_STATE_IDX] == SeedLifecycle.DORMANT

    def get_active_seeds(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the device: seeds that are blended."""
        return self.blended.to(self.state_tensor.device)

    def get_seed_state(self, seed_id: int) -> dict[str, int | float]:
        """One row by column name, with ``alpha``."""
        row = as_seed_id(seed_id, self.num_seeds, self.name)
        version = self._seen  # once: another thread may publish the next
        columns: dict[str, int | float] = dict(
            zip(COLUMN_NAMES, version.rows[row].tolist(), strict=True)
        )
        return columns | {"alpha": float(self._alphas_of(version)[row])}

    def get_state_distribution(self) -> dict[str, int]:
        """Seeds in each stage that has any, by name."""
        counts = torch.bincount(self.stages, minlength=len(SeedLifecycle)).tolist()
        return {stage.name: counts[stage] for stage in SeedLifecycle if counts[stage]}

    def find_seeds_by_state(self, stage: SeedLifecycle | int | str) -> Tensor:
        """int64 ``(n,)`` on the CPU: ids of the seeds in a stage."""
        return (self.stages == as_stage(stage, self.name)).nonzero().flatten()

    # Writing: staged on the host, published as a whole.

    def set_rows(self, seed_ids: SeedIds, **columns: SeedLifecycle | int | Tensor) -> None:
        """Write columns of some rows: ``set_rows([3, 5], lifecycle_state=1, blueprint_id=7)``.

        Raises:
            InvalidArgument, InvalidType: An unknown column, or a value outside its column's range;
                nothing is written.
        """
        ids = as_seed_ids(seed_ids, self.num_seeds, self.name)
        written = {column_of(name, self.name): value for name, value in columns.items()}
        checked = {
            column: in_range(value, column, ids, self.name) for column, value in written.items()
        }
        with self.transaction():
            rows = self.rows[ids]
            for column, values in checked.items():
                rows[:, column] = values
            self._stage_rows(ids, rows)

    def set_lifecycle_state(self, seed_id: int, state: SeedLifecycle | int | str) -> None:
        """Put a seed into a stage, with no check of the transition; its epochs start again."""
        self.batch_set_lifecycle_state([seed_id], state)

    def batch_set_lifecycle_state(
        self, seed_ids: SeedIds, state: SeedLifecycle | int | str
    ) -> None:
        """Put seeds into a stage, with no check of the transition; their epochs start again."""
        ids = as_seed_ids(seed_ids, self.num_seeds, self.name)
        stage = as_stage(state, self.name)
        with self.transaction():
            self.set_rows(ids, lifecycle_state=stage, epochs_in_state=0)
            if stage in LETS_GO:
                self._enter(ids, stage)

    def set_blueprint(self, seed_id: int, blueprint_id: int, grafting_strategy: int = 0) -> None:
        """Name a seed's blueprint and strategy."""
        self.set_rows(seed_id, blueprint_id=blueprint_id, grafting_strategy=grafting_strategy)

    def advance(
        self,
        seed_ids: SeedIds,
        to: SeedLifecycle | int | str,
        *,
        identities: Callable[[], Tensor] | None = None,
    ) -> None:
        """One legal transition for all the seeds, or none.

        ``identities`` returns, bool ``(num_seeds,)`` on the CPU, whose blueprint starts as the
        identity: those seeds may skip TRAINING. It is asked only where that decides.

        Raises:
            IllegalTransition: Says from, to and the legal ones, for the first seed that can't.
        """
        ids = as_seed_ids(seed_ids, self.num_seeds, self.name)
        to = as_stage(to, self.name)
        with self.transaction():
            legal = is_legal(self.stages[ids], to)
            if identities is not None and not bool(legal.all()):
                skips = is_legal_for_identity(self.stages[ids], to)
                legal |= skips & identities()[ids] if bool(skips.any()) else skips
            if to is SeedLifecycle.DORMANT:
                legal &= ~self.embargoed[ids]
            if not bool(legal.all()):
                raise self._illegal(int(ids[~legal][0]), to)
            self._enter(ids, to)

    def reset(self, seed_ids: SeedIds) -> None:
        """Make seeds DORMANT from any stage: the one way out of FOSSILIZED and ROLLED_BACK."""
        ids = as_seed_ids(seed_ids, self.num_seeds, self.name)
        with self.transaction():
            self._enter(ids, SeedLifecycle.DORMANT)

    @property
    def embargoed(self) -> Tensor:
        """Bool ``(num_seeds,)`` on the CPU: culled seeds that have not rested long enough."""
        return (self.stages == SeedLifecycle.CULLED) & (self.epochs < self.embargo_epochs)

    def _enter(self, ids: Tensor, to: SeedLifecycle) -> None:
        changes: dict[str, int] = {"lifecycle_state": to, "epochs_in_state": 0}
        if to is SeedLifecycle.DORMANT:
            changes |= {"blueprint_id": 0, "grafting_strategy": 0}
        self.set_rows(ids, **changes)
        if to in LETS_GO:
            self._stage_alpha(ids, torch.zeros(len(ids), dtype=torch.float32, device="cpu"))

    def _illegal(self, seed: int, to: SeedLifecycle) -> IllegalTransition:
        now = SeedLifecycle(int(self.stages[seed]))
        embargoed = bool(self.embargoed[seed])
        legal = () if embargoed else tuple(sorted(LEGAL[now]))
        rest = self.embargo_epochs - int(self.epochs[seed])
        why = f"; its embargo lasts {rest} epochs more" if embargoed else ""
        skips = LEGAL_FOR_IDENTITY.get(now) is to
        skip = "; this one, if its own blueprint starts as the identity" if skips else ""
        error = IllegalTransition(
            f"{self.name}: seed {seed} can't go from {now.name} to {to.name}; legal from "
            f"{now.name}: {', '.join(stage.name for stage in legal) or 'none'}{why}{skip}"
        )
        error.seed, error.source, error.target, error.legal = seed, now, to, legal
        return error

    def set_alpha(self, seed_ids: SeedIds, alpha: float | Tensor) -> None:
        """Blend factors, a number or ``(n,)``; clamped to [0, 1].

        Raises:
            InvalidArgument: NaN; nothing is written.
        """
        ids = as_seed_ids(seed_ids, self.num_seeds, self.name)
        try:
            if isinstance(alpha, bool):
                raise TypeError
            values = torch.as_tensor(alpha, dtype=torch.float32, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InvalidType(
                f"{self.name}: alpha {shown(alpha)}; give a number or a tensor"
            ) from None
        if values.shape not in ((), (1,), (len(ids),)):
            raise InvalidArgument(
                f"{self.name}: alpha of shape {tuple(values.shape)} for {len(ids)} seeds; give a "
                "number or one for each"
            )
        if bool(values.isnan().any()):
            raise InvalidArgument(f"{self.name}: alpha is NaN; give a number from 0 to 1")
        with self.transaction():
            self._stage_alpha(ids, values.clamp(0.0, 1.0).expand(len(ids)).contiguous())

    def increment_epochs(self) -> None:
        """One epoch more for every seed that isn't dormant; stops at 32,767.

        Culled seeds whose embargo is over become DORMANT.
        """
        with self.transaction():
            older = (self.epochs + 1).clamp_max(MOST_EPOCHS)
            awake = (self.stages != SeedLifecycle.DORMANT).nonzero().flatten()
            self.set_rows(awake, epochs_in_state=older[awake])
            rested = (self.stages == SeedLifecycle.CULLED) & ~self.embargoed
            self._enter(rested.nonzero().flatten(), SeedLifecycle.DORMANT)

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
            limits = torch.tensor(column_max(), device=state.device)
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
