"""The layers of one model, which start to grow together.

A new bank changes a layer's graph. So that a model of 48 layers compiles once for it and not 48
times, the first germination of a blueprint anywhere allocates its smallest bank in every layer of
the model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_fx._dynamo_compat import not_traced
from kasmina_fx._torch_compat import live_grad_scalers, scale_of, steps_for
from kasmina_fx.gate import GATE
from kasmina_fx.staging import LOCK
from kasmina_fx.training import Training


class Member(Protocol):
    """A layer's seeds, as its colony sees them."""

    def publish_stacks(self) -> None:
        """Show forwards what they read now."""


M = TypeVar("M", bound=Member)
_LOG: Final = logging.getLogger(__name__)


class Colony(Generic[M]):
    """A set of layers; holds none of them alive."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[M]] = []
        self.scaler: weakref.ref[torch.amp.GradScaler] | None = None
        self.training = Training()
        self._named = False  # by the user: not looked for, and not let go of
        self._let_go: weakref.ref[torch.amp.GradScaler] | None = None
        self._looked = True  # in a step, for a scaler that was not there before

    def add(self, layer: M) -> None:
        """Take a layer in."""
        if all(member is not layer for member in self):
            self._members.append(weakref.ref(layer))

    def discard(self, layer: M) -> None:
        """Let a layer go."""
        self._members = [ref for ref in self._members if ref() not in (None, layer)]

    def __iter__(self) -> Iterator[M]:
        """The layers that are still alive."""
        return (layer for layer in [ref() for ref in self._members] if layer is not None)

    @not_traced
    def enter(self) -> None:
        """A forward of the model begins."""
        GATE.enter()
        self.training.seen()

    @not_traced
    def leave(self, compiled: bool) -> None:
        """It is over."""
        # What Inductor keeps for backward are the stacks themselves.
        self.training.awaits_backward |= compiled and torch.is_grad_enabled()
        GATE.leave()

    def follow_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        """Multiply reconstruction losses by a GradScaler's scale, which optimizers divide by.

        Args:
            scaler: The model's; None: its loss is not scaled.
        """
        self.scaler, self._named = None if scaler is None else weakref.ref(scaler), True

    def find_scaler(self) -> None:
        """Follow the GradScaler that is alive, unless one is followed already.

        Of several it follows none, and says so.
        """
        self._looked = False
        if self._named or _alive(self.scaler) is not None:
            return
        alive = [scaler for scaler in live_grad_scalers() if scaler is not _alive(self._let_go)]
        if len(alive) > 1:
            _LOG.warning("%d GradScalers are alive: name one with follow_scaler()", len(alive))
        self.scaler = weakref.ref(alive[0]) if len(alive) == 1 else None

    def check_scaler(self, optimizers: Iterable[Optimizer]) -> bool:
        """In a step: is the scaler that was found the one that divides these gradients?

        If not, it is let go of, until it is seen to step one of these.
        """
        if self._named:
            return True
        followed, let_go = _alive(self.scaler), _alive(self._let_go)
        if followed is not None and not steps_for(followed, optimizers):
            _LOG.warning(
                "the GradScaler that is alive does not step this model's optimizer: reconstruction "
                "losses are not scaled from now on, and their gradients of this step are dropped; "
                "say so beforehand with follow_scaler(model, None)"
            )
            self.scaler, self._let_go = None, self.scaler
            self._show()
            return False
        if let_go is not None and steps_for(let_go, optimizers):
            self.scaler, self._let_go = self._let_go, None
            self._show()
        elif followed is None and self.scaler is not None:
            self.scaler = None  # it is gone
            self._show()
        elif followed is None and not self._looked:
            mine = [s for s in live_grad_scalers() if steps_for(s, optimizers)]
            if len(mine) == 1:
                self.scaler = weakref.ref(mine[0])
                self._show()
        self._looked = True
        return True

    def _show(self) -> None:
        """Let forwards read the scale that is followed now."""
        with LOCK, GATE.publication():
            for layer in self:
                layer.publish_stacks()

    def loss_scale(self, default: Tensor) -> Tensor:
        """What multiplies the gradient of reconstruction losses: a GradScaler's scale, or 1."""
        scaler = _alive(self.scaler)
        return default if scaler is None else scale_of(scaler, default.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Colony[M]:
        """An empty one: copied layers join as they are rebuilt, and one copied alone is alone."""
        copied: Colony[M] = memo.setdefault(id(self), Colony())
        return copied

    def __reduce__(self) -> tuple[type[Colony[Any]], tuple[()]]:
        """Pickled empty, for the same reason."""
        return Colony, ()


def _alive(scaler: weakref.ref[torch.amp.GradScaler] | None) -> torch.amp.GradScaler | None:
    return None if scaler is None else scaler()
