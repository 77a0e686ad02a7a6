"""Packs of one layer: sets of its seeds, of which one is in use and the others are put away.

What is put away lies in no stack and no table: no forward, optimizer or average of models meets it.
It is in the layer's state dict, and goes where the layer goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kasmina_fx.banks.stack import Follower


def _nothing_known() -> weakref.WeakKeyDictionary[Follower, Any]:
    return weakref.WeakKeyDictionary()


@dataclass(eq=False)
class KeptStack:
    """What was in some slots of a stack.

    Attributes:
        values: ``(n, ...)`` on the layer's device.
        known: What optimizers know of these slots, for as long as they are there.
    """

    values: Tensor
    known: weakref.WeakKeyDictionary[Follower, Any] = field(default_factory=_nothing_known)

    def __reduce__(self) -> tuple[type[KeptStack], tuple[Tensor]]:
        """Copied and pickled without what optimizers of this process know."""
        return KeptStack, (self.values,)


@dataclass(eq=False)
class KeptBank:
    """What was in a bank.

    Attributes:
        held: int64 ``(k,)`` on the CPU: the blueprint id in each slot, 0 for none.
        stacks: Of the n slots in use, in their order; in the order of the bank's stacks.
    """

    held: Tensor
    stacks: list[KeptStack]

    @property
    def slots(self) -> Tensor:
        """The slots in use, int64 ``(n,)`` on the CPU."""
        return self.held.nonzero().flatten()


@dataclass(eq=False)
class KeptPack:
    """Seeds of a layer that were put away: those that were not as a seed is born.

    Attributes:
        seeds: int64 ``(n,)``; this and the next two are on the CPU.
        rows: int32 ``(n, 4)``: their rows of the state tensor.
        alpha: float32 ``(n,)``.
        banks: By their keys, those that had a slot in use.
    """

    seeds: Tensor
    rows: Tensor
    alpha: Tensor
    banks: dict[str, KeptBank]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert what it holds on the device, as ``Module._apply`` does."""
        for bank in self.banks.values():
            for stack in bank.stacks:
                stack.values = fn(stack.values)

    def described(self) -> dict[str, Any]:
        """Plain data: all of it but parameters."""
        lists = {name: getattr(self, name).tolist() for name in ("seeds", "rows", "alpha")}
        return lists | {"banks": {key: bank.held.tolist() for key, bank in self.banks.items()}}

    def rows_of_all(self, num_seeds: int) -> tuple[Tensor, Tensor]:
        """Rows int32 ``(S, 4)`` and alphas float32 ``(S,)`` of all seeds of the layer."""
        rows = torch.zeros(num_seeds, 4, dtype=torch.int32, device="cpu")
        alpha = torch.zeros(num_seeds, dtype=torch.float32, device="cpu")
        rows[self.seeds], alpha[self.seeds] = self.rows, self.alpha
        return rows, alpha

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return sum(s.values.nbytes for bank in self.banks.values() for s in bank.stacks)


@dataclass
class LayerPacks:
    """The packs of a layer.

    Attributes:
        kept: By name, in the order in which they were made: what was put away, or None for the pack
            in use.
        active: Its name; None: what is in use is no pack.
        mixed: What samples of a batch go through instead, each through its own pack.
    """

    kept: dict[str, KeptPack | None] = field(default_factory=dict)
    active: str | None = None
    mixed: Any = None

    def __reduce__(self) -> tuple[type[LayerPacks], tuple[Any, ...]]:
        """A copy of a layer runs the pack that is in use."""
        return LayerPacks, (self.kept, self.active)

    def away(self) -> dict[str, KeptPack]:
        """Those that are not in use."""
        return {name: pack for name, pack in self.kept.items() if pack is not None}

    def described(self) -> dict[str, Any]:
        """Plain data: all of them but parameters; that in use has a name alone."""
        away = {name: pack.described() for name, pack in self.away().items()}
        kept = [{"name": name} | away.get(name, {}) for name in self.kept]
        return {"active": self.active, "kept": kept}

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """See :meth:`KeptPack.apply`."""
        for pack in self.away().values():
            pack.apply(fn)
