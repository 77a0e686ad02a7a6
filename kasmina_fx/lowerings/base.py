"""What a lowering is, and what it is asked about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kasmina_fx.physical.graph_inputs import BlendArguments
from kasmina_fx.physical.layout import BankSpec, ChunkLayout


class Work(NamedTuple):
    """Counts what a blend does forward; what a backward does of each is in the unit's price.

    Attributes:
        launches: Kernels, or subgraphs, that the host starts.
        full: Elements of the whole output that are read and written, whoever runs.
        elements: Those of chunks that run, and of what their blueprints make of them on the way.
        products: Multiply-adds.
        numbers: Of the parameters of blueprints that run.
    """

    launches: int
    full: int = 0
    elements: int = 0
    products: int = 0
    numbers: int = 0


@dataclass(frozen=True)
class Site:
    """Describes one marker: what a lowering may know before it says whether it can do it.

    Attributes:
        chunks: The layer's layout.
        banks: The banks that act on it.
        dtype: Of the host's output; ``device`` and ``rank`` (number of dims) likewise.
        dense: The output is contiguous, as far as its strides say.
        sizes: Of each bank, the shape of a slot in each of its stacks; ``dtypes``: of all stacks.
        then: The activation that could be absorbed, of
            :data:`kasmina_fx.lowerings.rows.ACTIVATIONS`; "" for none.
        running: Of each bank, for how many seeds its tables have room while this is compiled.
        places: Of each bank, how many places its slots have then, in use or not.
        rows: Of the output, likewise: elements that a feature has.
        training: A backward follows; ``notes``: somebody reads the second output.
    """

    chunks: ChunkLayout
    banks: tuple[BankSpec, ...]
    dtype: torch.dtype
    device: torch.device
    rank: int
    dense: bool
    sizes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    dtypes: frozenset[torch.dtype] = frozenset()
    then: str = ""
    running: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    rows: int = 1
    training: bool = True
    notes: bool = True

    @property
    def share(self) -> float:
        """Return which part of the features belongs to seeds with a slot, 0 to 1, or a bit more."""
        runs = [self.chunks.runs[bank.run] for bank in self.banks]
        features = sum(n * run.size for n, run in zip(self.places, runs, strict=False))
        return features / self.chunks.width

    def work(self, many: Sequence[int], launches: int, full: int = 0) -> Work:
        """Return the work of ``many`` blueprints of each bank, each on a chunk of its own."""
        elements = products = numbers = 0
        for bank, shapes, count in zip(self.banks, self.sizes, many, strict=True):
            weights = [shape for shape in shapes if len(shape) > 1]
            made = sum(shape[0] for shape in weights)
            elements += self.rows * count * (self.chunks.runs[bank.run].size + made)
            products += self.rows * count * sum(map(prod, weights))
            numbers += count * sum(map(prod, shapes))
        return Work(launches, full, elements, products, numbers)

    @property
    def numbers(self) -> int:
        """Return how many numbers the output has."""
        return self.rows * self.chunks.width

    @property
    def features_last(self) -> bool:
        """Whether rows of features lie one behind the other: what kernels read."""
        return self.dense and self.chunks.feature_dim % self.rank == self.rank - 1


@dataclass(frozen=True)
class Wanted:
    """Says what a graph needs of a blend beside its output.

    Attributes:
        backward: What a backward needs is kept.
        notes: Somebody reads the second output.
        then: The activation that the output is given through, for a lowering that can.
        sample: ``(one_in, rows)`` of who observes the blend before it: a third output, ``(n, D)``,
            holds the rows that are looked at.
    """

    backward: bool = True
    notes: bool = True
    then: str = ""
    sample: tuple[int, int] | None = None


class Lowering(ABC):
    """A way to compute a blend; ``name`` is what options and reports call it.

    One that ``absorbs`` gives its output through the activation that is wanted.
    """

    name: str
    absorbs: bool = False

    @abstractmethod
    def why_not(self, site: Site) -> str | None:
        """Say why it can't compute this blend, or None if it can."""

    def why_rather_not(self, site: Site) -> str | None:
        """Say why "auto" had better take another one that can, or None."""
        return None

    @abstractmethod
    def work(self, site: Site) -> Work:
        """Count what it does for a blend that it can compute."""

    @abstractmethod
    def blend(self, asked: BlendArguments, wanted: Wanted) -> tuple[Tensor, ...]:
        """Compute ``kasmina::blend``: the passes trace it, on fake tensors."""
