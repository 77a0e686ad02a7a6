"""The calls and attributes that older code has for its chunked layers, around real seeds."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import SeedIds, as_seed_ids, check_count, check_instance, is_int
from kasmina_fx.bases.features import find_features
from kasmina_fx.compat.chunked.blueprints import Blueprints
from kasmina_fx.compat.chunked.chunk_manager import ChunkManager
from kasmina_fx.compat.chunked.figures import Figures, Notes
from kasmina_fx.compat.chunked.seed_owner import SeedOwner
from kasmina_fx.compat.chunked.seed_state import logical_states
from kasmina_fx.compat.chunked.state_tensor import StateTensor
from kasmina_fx.compat.chunked.states import COOLDOWN, RAMP, STATES, SeedLifecycle, five_of
from kasmina_fx.config import SeedConfig
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.grafting.config import GraftingConfig
from kasmina_fx.lifecycle import SeedLifecycle as Stage

_LOG: Final = logging.getLogger(__name__)
#: Three steps with NaN or Inf put a seed into ERROR_RECOVERY, for 100 epochs.
CONFIG: Final = SeedConfig(
    grafting=GraftingConfig(fixed_steps=RAMP), error_limit=2, embargo_epochs=COOLDOWN
)


def fitting_seeds(base_layer: nn.Module, num_seeds: int, layer_id: str | None) -> int:
    """Return how many seeds a layer can have, of those asked for; says so where it is fewer.

    Raises:
        InvalidArgument, InvalidType: A base whose features can't be told, or no count.
    """
    check_instance("base_layer", base_layer, nn.Module)
    check_count("num_seeds", num_seeds, least=1)
    try:
        features = find_features(base_layer, None, None).count
    except InvalidArgument as error:
        raise InvalidArgument(f"Cannot determine dimensions from base layer: {error}") from None
    if num_seeds > features:
        text = "%s: %d features have %d seeds, not %d: a seed has one at least"
        name = layer_id or type(base_layer).__name__
        _LOG.warning(text, name, features, features, num_seeds)
    return min(num_seeds, features)


class OlderCalls(SeedOwner):
    """What all chunked layers of older code have in common.

    Attributes:
        forward_count: Calls that Python made: a compiled model's are not counted.
        total_latency: Of these, seconds in all; on CUDA the time to launch them.
    """

    forward_count: int
    total_latency: float
    _notes: Notes
    _full_alpha: float = 1.0  # where a ramp is over

    def _begin(self) -> None:
        self.forward_count, self.total_latency = 0, 0.0
        self._notes = Notes.of(self.num_seeds, health=torch.nan)

    # Attributes of before.

    @property
    def chunk_manager(self) -> ChunkManager:
        """The layer's chunks."""
        return ChunkManager.of(self.chunks, self.device)

    @property
    def state_tensor(self) -> StateTensor:
        """The seeds' state; a view, made when asked for."""
        return StateTensor.of_layer(self, self._notes)

    @property
    def device(self) -> torch.device:
        """Where the seeds are."""
        return self.state.state_tensor.device

    @property
    def output_dim(self) -> int:
        """Features of the base's output."""
        return self.chunks.layer_dim

    @property
    def input_dim(self) -> int:
        """Features of its input; of a base that has no such number, those of its output."""
        names = ("in_features", "in_channels")
        found = (getattr(self.base, name, None) for name in names)
        return next((n for n in found if isinstance(n, int)), self.output_dim)

    @property
    def enable_telemetry(self) -> bool:
        """Whether forwards keep statistics."""
        return self.telemetry_enabled

    @property
    def blueprints(self) -> Blueprints:
        """Its blueprints by id: copies as modules, made when asked for."""
        return Blueprints(self.kasmina)

    @property
    def next_blueprint_id(self) -> int:
        """The id that the next blueprint gets."""
        self.kasmina.take_ids(0)
        return self.kasmina.highest_id + 1

    # Calls.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output with the contributions of the seeds in effect."""
        # In a graph a counter on the module would be a constant, and cost a compile a call.
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        start = time.perf_counter()
        out = super().forward(*args, **kwargs)
        counts = self.__dict__
        counts["forward_count"] += 1
        counts["total_latency"] += time.perf_counter() - start
        return out

    def request_germination(
        self,
        seed_id: SeedIds,
        blueprint_id: int | str | None = None,
        grafting_strategy: int | str = 0,
    ) -> bool:
        """Let dormant seeds grow a blueprint: they are LOADING, and ramp up at :meth:`step_epoch`.

        Args:
            seed_id: One id, or several.
            blueprint_id: As of :meth:`kasmina_fx.KasminaLayer.request_germination`; None for an
                ``mlp`` of its own.
            grafting_strategy: Likewise.

        Returns:
            False, with nothing changed, if a seed isn't DORMANT, or for one id above the last.

        Raises:
            SeedIndexError: A negative id (a ValueError).
            UnknownBlueprint: No such blueprint, or one that does not fit (a ValueError).
        """
        if self._is_above(seed_id):
            return False
        with self.transaction():
            if not super().request_germination(seed_id, blueprint_id, grafting_strategy):
                return False
            self._start(seed_id)
        return True

    def _start(self, seed_ids: SeedIds) -> None:
        for stage in (Stage.TRAINING, Stage.GRAFTING):
            self.advance(seed_ids, stage)

    def _is_above(self, seed_id: object) -> bool:
        if not is_int(seed_id) or seed_id < self.num_seeds:  # type: ignore[operator]  # an int
            return False
        text = "%s: there is no seed %d; it has seeds 0 to %d"
        _LOG.error(text, self.layer_id, seed_id, self.num_seeds - 1)
        return True

    def cancel_germination(self, seed_id: SeedIds) -> bool:
        """Make seeds that are LOADING or ACTIVE DORMANT: all of them, or (False) none.

        Raises:
            SeedIndexError: There is no such seed (a ValueError).
        """
        ids = as_seed_ids(seed_id, self.num_seeds, self.layer_id)
        with self.transaction():
            states = {STATES[Stage(stage)] for stage in self.state.stages[ids].tolist()}
            if not states <= {SeedLifecycle.LOADING, SeedLifecycle.ACTIVE}:
                return False
            self.reset(ids)
        return True

    def step_epoch(self) -> None:
        """See :meth:`kasmina_fx.KasminaLayer.step_epoch`; seeds whose ramp is over become ACTIVE.

        No forward does it, in training or evaluation.
        """
        with self.transaction():
            super().step_epoch()
            over = (self.state.stages == Stage.GRAFTING) & (self.state.alphas >= self._full_alpha)
            self._grafted(over.nonzero().flatten())

    def _grafted(self, ids: Tensor) -> None:
        self.state.batch_set_lifecycle_state(ids, Stage.FINE_TUNING)

    # Reports.

    def _average_ms(self) -> float:
        return 1e3 * self.total_latency / max(1, self.forward_count)

    def get_layer_stats(self) -> dict[str, Any]:
        """Figures over all seeds, and of the calls; one device copy.

        All of :meth:`kasmina_fx.KasminaLayer.get_layer_stats` is in it as well.
        """
        return {
            **super().get_layer_stats(),
            **self.state_tensor.get_summary_stats(),
            "layer_id": self.layer_id,
            "forward_count": self.forward_count,
            "avg_latency_ms": self._average_ms(),
            "num_blueprints": len(self.blueprints),
            "output_dim": self.output_dim,
            "chunks_per_seed": self.output_dim / self.num_seeds,
        }

    def get_health_report(self) -> dict[str, Any]:
        """Each seed's state and statistics; they are kept: ``reset_telemetry()`` starts them anew.

        All of :meth:`kasmina_fx.KasminaLayer.get_health_report` is in it as well. One device
        copy, however many seeds there are; seeds over their error limit are culled.
        """
        report = super().get_health_report()
        seen = Figures.of_report(report, self._notes)
        columns = five_of(report["stage"]), report["blueprint_id"], report["epochs"]
        rows = torch.stack([*columns, self.state.strategies], 1)
        seeds = logical_states(self.layer_id, rows, seen.health_scores, seen.error_counts)
        figures = zip(seen.mean.tolist(), seen.variance.tolist(), strict=True)
        return {
            **report,
            "layer_id": self.layer_id,
            "timestamp": time.time(),
            "seeds": [seed.to_dict() for seed in seeds],
            "telemetry": [{"mean": mean, "variance": variance} for mean, variance in figures],
            "performance": {
                **report.get("performance", {}),
                "forward_count": self.forward_count,
                "avg_latency_ms": self._average_ms(),
            },
        }
