"""One seed as a person sees it; everything it says is read from its layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor
from torch.func import functional_call

from kasmina_fx.blueprints.builtin import PerFeature
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.seed_ids import as_seed_ids

if TYPE_CHECKING:
    from kasmina_fx.layer import KasminaLayer


class LogicalSeed:
    """Seed ``seed_id`` of a layer: a view that holds no state of its own."""

    def __init__(self, layer: KasminaLayer, seed_id: int) -> None:
        self.layer, self.seed_id = layer, seed_id

    def __repr__(self) -> str:
        """Layer, id and stage."""
        return f"LogicalSeed({self.layer.layer_id!r}, {self.seed_id}, {self.stage.name})"

    @property
    def chunk(self) -> slice:
        """Its features of the layer's output."""
        return self.layer.chunks.chunk_slice(self.seed_id)

    @property
    def stage(self) -> SeedLifecycle:
        """Where it is in its life."""
        return SeedLifecycle(int(self.layer.state.stages[self.seed_id]))

    @property
    def blueprint_id(self) -> int:
        """Its blueprint's id, 0 for none."""
        return int(self.layer.state.blueprint_ids[self.seed_id])

    @property
    def alpha(self) -> float:
        """Its blend factor, 0 to 1."""
        return float(self.layer.state.alphas[self.seed_id])

    @property
    def is_blended(self) -> bool:
        """Does it change the layer's output?"""
        return bool(self.layer.state.blended[self.seed_id])

    def process_chunk(self, chunk: Tensor) -> Tensor:
        """What it makes of its chunk of the base's output, by the definition, in plain PyTorch."""
        held = self.layer.bank_of(self.seed_id) if self.is_blended else None
        if held is None:
            return chunk
        bank, slot = held
        module: Any = bank.blueprint.module(bank.run.size).to(chunk.device)
        module.train(self.layer.training)
        if isinstance(module, PerFeature):  # acts on features wherever they are
            module.dim = self.layer.chunks.feature_dim
        out: Tensor = functional_call(module, bank.slot_tensors(slot), chunk)
        if not bool(out.isfinite().all()):
            return chunk
        return (chunk + self.alpha * (out - chunk)).to(chunk.dtype)


class SeedSequence(Sequence[LogicalSeed]):
    """The seeds of a layer, made one by one when asked for."""

    def __init__(self, layer: KasminaLayer) -> None:
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
        ids = as_seed_ids(index, len(self), self._layer.layer_id)
        return LogicalSeed(self._layer, int(ids))
