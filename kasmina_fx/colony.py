"""The layers of one model, which start to grow together.

A new bank changes a layer's graph. So that a model of 48 layers compiles once for it and not 48
times, the first germination of a blueprint anywhere allocates its smallest bank in every layer of
the model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from kasmina_fx._torch_compat import live_grad_scalers, scale_of

if TYPE_CHECKING:
    from kasmina_fx.layer import KasminaLayer

_LOG: Final = logging.getLogger(__name__)


class Colony:
    """A set of layers; holds none of them alive."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[KasminaLayer]] = []
        self.scaler: weakref.ref[torch.amp.GradScaler] | None = None

    def add(self, layer: KasminaLayer) -> None:
        """Take a layer in."""
        if all(member is not layer for member in self):
            self._members.append(weakref.ref(layer))

    def discard(self, layer: KasminaLayer) -> None:
        """Let a layer go."""
        self._members = [ref for ref in self._members if ref() not in (None, layer)]

    def __iter__(self) -> Iterator[KasminaLayer]:
        """The layers that are still alive."""
        return (layer for layer in [ref() for ref in self._members] if layer is not None)

    def follow_scaler(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Multiply reconstruction losses by a GradScaler's scale, which optimizers divide by.

        Args:
            scaler: None looks for the one that is alive, unless one is followed already; of several
                it follows none, and says so.
        """
        if scaler is None and (self.scaler is None or self.scaler() is None):
            alive = live_grad_scalers()
            if len(alive) > 1:
                _LOG.warning("%d GradScalers are alive: name one with follow_scaler()", len(alive))
            scaler = alive[0] if len(alive) == 1 else None
        if scaler is not None:
            self.scaler = weakref.ref(scaler)

    def loss_scale(self, default: Tensor) -> Tensor:
        """What multiplies the gradient of reconstruction losses: a GradScaler's scale, or 1."""
        scaler = None if self.scaler is None else self.scaler()
        return default if scaler is None else scale_of(scaler, default.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Colony:
        """An empty one: copied layers join as they are rebuilt, and one copied alone is alone."""
        copied: Colony = memo.setdefault(id(self), Colony())
        return copied

    def __reduce__(self) -> tuple[type[Colony], tuple[()]]:
        """Pickled empty, for the same reason."""
        return Colony, ()
