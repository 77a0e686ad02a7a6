"""What a lowering is, and what it is asked about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kasmina_fx.physical.graph_inputs import BlendArguments
from kasmina_fx.physical.layout import BankSpec, ChunkLayout


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
        """Return which part of the features belongs to seeds that run, 0 to 1, or a bit more."""
        runs = [self.chunks.runs[bank.run] for bank in self.banks]
        features = sum(n * run.size for n, run in zip(self.running, runs, strict=False))
        return features / self.chunks.width

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
    def blend(self, asked: BlendArguments, wanted: Wanted) -> tuple[Tensor, ...]:
        """Compute ``kasmina::blend``: the passes trace it, on fake tensors."""
