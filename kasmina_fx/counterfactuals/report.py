"""What :func:`kasmina_fx.counterfactual` found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Worth:
    """What one group of seeds is worth.

    Attributes:
        name: Of the group.
        loss: With the group off, the mean over all batches.
        worth: What the loss rises by without it: ``loss`` minus that of all seeds on. Below 0 the
            model does better without.
        standard_error: Of ``worth``, from the differences batch by batch; NaN for one batch.
    """

    name: str
    loss: float
    worth: float
    standard_error: float


@dataclass(frozen=True)
class CounterfactualReport:
    """Validation losses of a model with and without groups of its seeds.

    Attributes:
        groups: The groups, that whose loss would be missed most first.
        loss: With all seeds as they are, the mean over all batches.
        all_off: With all seeds of the model off.
        batches: Batches that were evaluated.
    """

    groups: tuple[Worth, ...]
    loss: float
    all_off: Worth
    batches: int

    def __getitem__(self, name: str) -> Worth:
        """The group of a name.

        Raises:
            KeyError: No such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table, a line a group."""
        width = max(len(row.name) for row in (*self.groups, self.all_off))
        title = f"{'group off':{width}}  {'loss':>10}  {'worth':>10}  {'± s.e.':>9}"
        lines = [title, f"{'none':{width}}  {self.loss:10.5f}"]
        lines += [
            f"{row.name:{width}}  {row.loss:10.5f}  {row.worth:+10.5f}  {row.standard_error:9.5f}"
            for row in (*self.groups, self.all_off)
        ]
        batches = f"{self.batches} batch" + "es" * (self.batches > 1)
        return "\n".join([*lines, f"mean over {batches}; worth is what the loss rises by without"])


def worth_of(name: str, off: Sequence[float], on: Sequence[float]) -> Worth:
    """Compare the losses of the same batches with a group off and on.

    The standard error is that of the mean of paired differences, ``s / sqrt(n)`` with the sample
    standard deviation s.
    """
    n = len(on)
    differences = [a - b for a, b in zip(off, on, strict=True)]
    mean = math.fsum(differences) / n
    spread = math.nan
    if n > 1:
        spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return Worth(name, math.fsum(off) / n, mean, spread)
