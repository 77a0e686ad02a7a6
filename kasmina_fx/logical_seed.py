"""One seed as a person sees it; everything it says is read from its layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from torch import Tensor

from kasmina_fx.arguments import as_seed_id
from kasmina_fx.grafting.registry import strategies
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.seeds.commands import SeedCommands
from kasmina_fx.seeds.definition import process_chunk
from kasmina_fx.seeds.health import fetch, per_seed
from kasmina_fx.seeds.snapshots import Snapshot


@dataclass(frozen=True)
class SeedState:
    """What is known of a seed at one moment; see the properties of :class:`LogicalSeed`."""

    layer_id: str
    seed_id: int
    chunk_start: int
    chunk_size: int
    stage: SeedLifecycle
    blueprint_id: int
    epochs_in_state: int
    grafting_strategy: str
    alpha: float
    health: float
    error_count: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON: the stage by its name, None for health not yet known."""
        health = None if math.isnan(self.health) else self.health
        return asdict(self) | {"stage": self.stage.name, "health": health}


class LogicalSeed:
    """Seed ``seed_id`` of a layer: a view that holds no state of its own."""

    def __init__(self, layer: SeedCommands, seed_id: int) -> None:
        self.layer, self.seed_id = layer, seed_id

    def __repr__(self) -> str:
        """Layer, id and stage."""
        return f"LogicalSeed({self.layer.layer_id!r}, {self.seed_id}, {self.stage.name})"

    @property
    def id(self) -> int:
        """The seed's number in the layer."""
        return self.seed_id

    @property
    def chunk(self) -> slice:
        """The seed's features of the layer's output."""
        return self.layer.chunks.chunk_slice(self.seed_id)

    @property
    def stage(self) -> SeedLifecycle:
        """The stage of its life that the seed is in."""
        return SeedLifecycle(int(self.layer.state.stages[self.seed_id]))

    @property
    def blueprint_id(self) -> int:
        """The id of the seed's blueprint, 0 for none."""
        return int(self.layer.state.blueprint_ids[self.seed_id])

    @property
    def epochs_in_state(self) -> int:
        """Epochs since it entered its stage."""
        return int(self.layer.state.epochs[self.seed_id])

    @property
    def grafting_strategy(self) -> int:
        """Number of the strategy that its ramp follows."""
        return int(self.layer.state.strategies[self.seed_id])

    @property
    def alpha(self) -> float:
        """The seed's blend factor, 0 to 1; one device copy after a ramp."""
        return float(self.layer.state.alphas[self.seed_id])

    @property
    def is_blended(self) -> bool:
        """Whether it changes the layer's output."""
        return bool(self.layer.state.blended[self.seed_id])

    @property
    def health(self) -> float:
        """The seed's health, see :func:`kasmina_fx.seeds.health.per_seed`; one device copy."""
        (seen,) = fetch([self.layer.kasmina])
        return float(per_seed(seen.accumulated, seen.faults)["health"][self.seed_id])

    @property
    def error_count(self) -> int:
        """Steps in which its blueprint yielded NaN or Inf; one device copy."""
        (seen,) = fetch([self.layer.kasmina])
        return int(seen.errors[self.seed_id])

    def get_state(self) -> SeedState:
        """A snapshot of all of the above at one moment; one device copy."""
        (seen,) = fetch([self.layer.kasmina])
        row, chunk = self.seed_id, self.chunk
        stage, blueprint_id, epochs, strategy = seen.rows[row].tolist()
        return SeedState(
            layer_id=self.layer.layer_id,
            seed_id=row,
            chunk_start=chunk.start,
            chunk_size=chunk.stop - chunk.start,
            stage=SeedLifecycle(stage),
            blueprint_id=blueprint_id,
            epochs_in_state=epochs,
            grafting_strategy=strategies()[strategy].name,
            alpha=float(seen.alpha[row]),
            health=float(per_seed(seen.accumulated, seen.faults)["health"][row]),
            error_count=int(seen.errors[row]),
        )

    def request_germination(
        self, blueprint_id: int | str | None = None, grafting_strategy: int | str = 0
    ) -> bool:
        """See :meth:`KasminaLayer.request_germination`."""
        return self.layer.request_germination(self.seed_id, blueprint_id, grafting_strategy)

    def cancel(self) -> bool:
        """See :meth:`KasminaLayer.cancel_germination`."""
        return self.layer.cancel_germination(self.seed_id)

    def advance(self, stage: SeedLifecycle | int | str) -> None:
        """See :meth:`KasminaLayer.advance`."""
        self.layer.advance(self.seed_id, stage)

    def reset(self) -> None:
        """See :meth:`KasminaLayer.reset`."""
        self.layer.reset(self.seed_id)

    def set_alpha(self, alpha: float) -> None:
        """See :meth:`KasminaLayer.set_alpha`."""
        self.layer.set_alpha(self.seed_id, alpha)

    def snapshot(self) -> Snapshot:
        """See :meth:`KasminaLayer.snapshot`."""
        return self.layer.snapshot(self.seed_id)

    def rollback(self, snapshot: Snapshot, *, mark: bool = True) -> None:
        """See :meth:`KasminaLayer.rollback`."""
        self.layer.rollback(snapshot, self.seed_id, mark=mark)

    def process_chunk(self, chunk: Tensor) -> Tensor:
        """What it makes of its chunk of the base's output, by the definition, in plain PyTorch.

        In TRAINING that is the chunk itself; its backward also trains the blueprint.

        Raises:
            InvalidArgument: Not as many features as the chunk has.
        """
        return process_chunk(self.layer.kasmina, self.seed_id, chunk)


class SeedSequence(Sequence[LogicalSeed]):
    """The seeds of a layer, made one by one when asked for."""

    def __init__(self, layer: SeedCommands) -> None:
        self._layer = layer

    def __len__(self) -> int:
        """Seeds of the layer."""
        return self._layer.num_seeds

    def __iter__(self) -> Iterator[LogicalSeed]:
        """Every seed in order."""
        return (LogicalSeed(self._layer, i) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> LogicalSeed: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[LogicalSeed]: ...

    def __getitem__(self, index: int | slice) -> LogicalSeed | Sequence[LogicalSeed]:
        """One seed, 0 to ``num_seeds - 1``, or a list of them for a slice."""
        if isinstance(index, slice):
            return [LogicalSeed(self._layer, i) for i in range(len(self))[index]]
        seed = as_seed_id(index, len(self), self._layer.layer_id)
        return LogicalSeed(self._layer, seed)
