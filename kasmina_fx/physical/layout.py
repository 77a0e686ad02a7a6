"""The layout of a layer: how its features are cut into chunks, and which banks act on these.

This is the *static* part of a marker: it travels through every front end as a short string, so that
a graph alone says how to lower it. Everything that changes while a network trains is tensor data
instead.

    >>> chunks = ChunkLayout.of([2, 2, 1, 1, 1], feature_dim=-1)
    >>> str(chunks)
    'dim=-1 runs=2x2+3x1'
    >>> chunks.runs[1]
    Run(first_seed=2, count=3, offset=4, size=1)
    >>> ChunkLayout.parse(str(chunks)) == chunks
    True
    >>> str(BankSpec("mlp", run=0, shared=False, num_params=4))
    'mlp@0*4'
    >>> parse_banks("mlp@0*4 lora:shared@1*2")[1]
    BankSpec(kind='lora', run=1, shared=True, num_params=2, training=True)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Final

from kasmina_fx._torch.dynamo import cached

_RUN = re.compile(r"(\d+)x(\d+)")
_BANK = re.compile(
    r"(?P<kind>[^@\s:]+)(?P<shared>:shared)?(?P<eval>:eval)?@(?P<run>\d+)\*(?P<num>\d+)"
)


@dataclass(frozen=True)
class Run:
    """Neighbouring chunks, ``count`` of equal ``size``: one strided view of the features."""

    first_seed: int
    count: int
    offset: int
    size: int

    @property
    def width(self) -> int:
        """The number of features that the run covers."""
        return self.count * self.size

    @property
    def seeds(self) -> slice:
        """The run's seeds among those of the layer."""
        return slice(self.first_seed, self.first_seed + self.count)


@dataclass(frozen=True)
class ChunkLayout:
    """The runs of a layer and the dimension that they cut."""

    feature_dim: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, sizes: Iterable[int], feature_dim: int) -> ChunkLayout:
        """Make the layout of chunks of the given sizes, in order; equal neighbours share a run."""
        runs: list[Run] = []
        seed = offset = 0
        for size, group in groupby(sizes):
            count = sum(1 for _ in group)
            runs.append(Run(seed, count, offset, size))
            seed, offset = seed + count, offset + count * size
        return cls(feature_dim, tuple(runs))

    @staticmethod
    @cached
    def parse(text: str) -> ChunkLayout:
        """Read what ``str(layout)`` wrote."""
        head, _, tail = text.partition(" runs=")
        sizes = [int(size) for count, size in _RUN.findall(tail) for _ in range(int(count))]
        return ChunkLayout.of(sizes, int(head.removeprefix("dim=")))

    def __str__(self) -> str:
        """Return the form that markers carry."""
        return f"dim={self.feature_dim} runs=" + "+".join(f"{r.count}x{r.size}" for r in self.runs)

    @cached_property
    def num_seeds(self) -> int:
        """The number of seeds (and chunks) of the layer."""
        return sum(run.count for run in self.runs)

    @cached_property
    def width(self) -> int:
        """The number of features of the layer."""
        return sum(run.width for run in self.runs)


@dataclass(frozen=True)
class BankSpec:
    """Describes one bank: all blueprints of one class for the chunks of one run.

    ``training`` is False in evaluation, for blueprints that behave differently there.
    """

    kind: str
    run: int
    shared: bool
    num_params: int
    training: bool = True

    def __str__(self) -> str:
        """Return the form that markers carry."""
        flags = ":shared" * self.shared + ":eval" * (not self.training)
        return f"{self.kind}{flags}@{self.run}*{self.num_params}"


def format_banks(banks: Sequence[BankSpec]) -> str:
    """Return the form of several banks that markers carry."""
    return " ".join(map(str, banks))


@cached
def parse_banks(text: str) -> tuple[BankSpec, ...]:
    """Read what :func:`format_banks` wrote."""
    banks = []
    for part in text.split():
        found = _BANK.fullmatch(part)
        if found is None:
            raise ValueError(f"not a bank: {part!r}")
        number, run = int(found["num"]), int(found["run"])
        banks.append(BankSpec(found["kind"], run, bool(found["shared"]), number, not found["eval"]))
    return tuple(banks)


#: Tensor cores multiply no smaller pieces.
SMALLEST_TILE: Final = 16


def together(size: int) -> int:
    """Return how many chunks of such a size are blended side by side, as one tile."""
    return max(1, SMALLEST_TILE // size)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is no less than ``size``, 1 or more."""
    return 1 << (size - 1).bit_length()
