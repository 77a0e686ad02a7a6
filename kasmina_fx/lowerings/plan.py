"""What a fused blend of one bank is, apart from its tensors: a short string, and a geometry.

>>> plan = Plan("mlp", size=4, hidden=8, offset=0, first_seed=0, count=1024, dot="bfloat16")
>>> str(plan)
'mlp size=4 hidden=8 offset=0 first_seed=0 count=1024 dot=bfloat16'
>>> Plan.parse(str(plan)) == plan
True
>>> plan.tiling
Tiling(seeds=4, columns=16, hidden=32)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Final, NamedTuple

from kasmina_fx.lowerings.base import Site
from kasmina_fx.physical.layout import SMALLEST_TILE, power_of_two, together

#: Beyond, weights and the sums of their gradients do not fit the registers of a GPU's program.
LARGEST_SIZE: Final = 64
LARGEST_HIDDEN: Final = 128
#: Beyond, kernels for a CPU were not measured.
LARGEST_ON_CPU: Final = 1024


class Kernels(NamedTuple):
    """Says which kernels run a blueprint of some kind, and with which switches."""

    module: str
    switches: tuple[int, ...]  # ACT (0 none, 1 ReLU, 2 GELU), BIAS, RESIDUAL
    first: int | None  # which stack holds the weights of the hidden layer
    rows: bool = True  # there are kernels of whole rows too


#: The blueprints that have kernels.
KERNELS: Final[dict[str, Kernels]] = {
    "mlp": Kernels("two_layer", (1, 1, 0), 0),
    "lora": Kernels("two_layer", (0, 0, 1), 0),
    "residual_mlp": Kernels("two_layer", (1, 1, 1), 0),
    "affine": Kernels("affine", (), None),
    "bottleneck": Kernels("bottleneck", (2, 1, 1), 2, rows=False),
}


class Tiling(NamedTuple):
    """Says how many active seeds a program handles, and how wide it is with its padding."""

    seeds: int
    columns: int
    hidden: int


@dataclass(frozen=True)
class Plan:
    """Describes a fused blend of one bank.

    Attributes:
        kind: Name of the blueprint.
        size: Features of a chunk.
        hidden: Features of a blueprint's hidden layer; 0 for none.
        offset: First feature of the bank's run, and ``first_seed`` its first seed.
        count: Seeds of the run.
        dot: Dtype of the products: "float32", "bfloat16" or "float16".
    """

    kind: str
    size: int
    hidden: int
    offset: int
    first_seed: int
    count: int
    dot: str

    def __str__(self) -> str:
        """Return the form that operators carry."""
        kind, *others = asdict(self).items()
        return " ".join([kind[1], *(f"{name}={value}" for name, value in others)])

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Plan:
        """Read what ``str(plan)`` wrote."""
        kind, *others = text.split()
        fields = dict(other.split("=") for other in others)
        dot = fields.pop("dot")
        return Plan(kind, **{name: int(value) for name, value in fields.items()}, dot=dot)

    @property
    def wide(self) -> bool:
        """Whether a tile's weights take several warps to hold."""
        return self.tiling.columns * max(self.tiling.hidden, SMALLEST_TILE) > 1024

    @cached_property
    def tiling(self) -> Tiling:
        """How many seeds share a program."""
        seeds = together(self.size)
        columns = power_of_two(max(SMALLEST_TILE, seeds * self.size))
        return Tiling(seeds, columns, power_of_two(max(SMALLEST_TILE, seeds * self.hidden)))


def hidden_size(kind: str, shapes: Sequence[Sequence[int]]) -> int:
    """Return how wide a blueprint's hidden layer is, by the shapes of a slot in its stacks."""
    first = KERNELS[kind].first
    return 0 if first is None else shapes[first][0]


def plans_of(site: Site) -> list[Plan]:
    """Return what plans of a site's banks would be, of those that have kernels."""
    name = str(site.dtype).removeprefix("torch.")
    return [
        Plan(bank.kind, run.size, hidden_size(bank.kind, shapes), run.offset, 0, run.count, name)
        for bank, shapes in zip(site.banks, site.sizes, strict=True)
        for run in [site.chunks.runs[bank.run]]
        if bank.kind in KERNELS
    ]
