"""Some calls of hybrid layers are computed by the other implementation as well, and compared."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.ab.differences import distances
from kasmina_fx.arguments import check_number
from kasmina_fx.bases.outputs import watched
from kasmina_fx.errors import InvalidArgument, NoTargets
from kasmina_fx.hybrid_layer import HybridKasminaLayer
from kasmina_fx.model import layers_of

_LOG: Final = logging.getLogger(__name__)


class ShadowMode:
    """Looks at a share of the calls of a model's hybrid layers, and never changes an answer.

    The other implementation gets the same arguments and random numbers, on copies of the base's
    buffers, without gradients and not compiled. What it raises is counted and logged once a layer.
    Differences stay on the device until :meth:`report` reads them. Use it as a context manager, or
    :meth:`attach` and :meth:`detach`. A base that writes to its own input, or draws from a
    generator of its own, can't be run a second time unseen.

    Args:
        model: With hybrid layers.
        share: Of the calls to look at, 0 to 1.
        bound: The largest difference of parity, a part of the largest magnitude of the answer, or
            absolute where that is below 1.
        seed: Of the generator that draws the calls; torch's are left alone.

    Raises:
        NoTargets: No HybridKasminaLayer in the model.
        InvalidArgument: Says what is allowed.
    """

    def __init__(
        self, model: nn.Module, share: float = 0.01, *, bound: float = 1e-5, seed: int = 0
    ) -> None:
        check_number("share", share, 0.0)
        check_number("bound", bound, 0.0)
        if share > 1.0:
            raise InvalidArgument(f"share={share}: give a number from 0 to 1")
        layers = layers_of(model).values()
        self._layers = [each for each in layers if isinstance(each, HybridKasminaLayer)]
        if not self._layers:
            raise NoTargets("the model has no HybridKasminaLayer: nothing runs in two ways")
        self.share, self.bound = share, bound
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._found: dict[str, _Found] = {}

    def attach(self) -> None:
        """Look at calls from now on."""
        for layer in self._layers:
            layer.shadow = self

    def detach(self) -> None:
        """Look at no more calls."""
        for layer in self._layers:
            if layer.shadow is self:
                layer.shadow = None

    def __enter__(self) -> ShadowMode:  # noqa: PYI034  # typing.Self comes with Python 3.11
        """Attach."""
        self.attach()
        return self

    def __exit__(self, *error: object) -> None:
        """Detach."""
        self.detach()

    def wants(self) -> bool:
        """Draw whether the call that begins is looked at."""
        return self._random.random() < self.share

    def look(self, layer_id: str, name: str, out: Any, other: Callable[[], Any]) -> None:
        """Compare an answer with that of the other implementation."""
        try:
            differs = _differences(watched(out), watched(other()))
        except Exception as error:
            with self._lock:
                found = self._found.setdefault(layer_id, _Found())
                found.failed += 1
                first = found.error is None
                found.error = f"{type(error).__name__}: {error}"
            if first:
                text = "%s: %r answered, and the other implementation raised in its shadow"
                _LOG.error(text, layer_id, name, exc_info=error)
            return
        with self._lock:
            self._found.setdefault(layer_id, _Found()).add(differs)

    def report(self) -> dict[str, Any]:
        """What was seen so far, by layer; waits for the device.

        ``layers`` holds, by ``layer_id``: ``compared`` and ``failed`` calls, the last ``error``,
        ``max_difference``, ``mean_difference``, and ``parity``. ``parity`` is that of all; None
        where nothing was seen.
        """
        with self._lock:
            layers = {name: found.to_dict(self.bound) for name, found in self._found.items()}
        parity = all(each["parity"] for each in layers.values()) if layers else None
        return {"share": self.share, "bound": self.bound, "layers": layers, "parity": parity}


def _differences(out: Tensor, other: Tensor) -> Tensor:
    """Largest and average difference, and the former as a part of the magnitude; ``(3,)``."""
    if not out.numel():
        return out.new_zeros(3, dtype=torch.float64)
    apart = distances(out, other)
    scale = torch.nan_to_num(out.detach().double().abs(), 0.0, 0.0).max().clamp(min=1.0)
    return torch.stack([apart.max(), apart.mean(), apart.max() / scale])


class _Found:
    """What was seen of a layer."""

    def __init__(self) -> None:
        self.compared = self.failed = 0
        self.error: str | None = None
        self.largest: Tensor | None = None
        self.total: Tensor | None = None

    def add(self, differs: Tensor) -> None:
        self.compared += 1
        self.largest = differs if self.largest is None else torch.maximum(self.largest, differs)
        self.total = differs if self.total is None else self.total + differs

    def to_dict(self, bound: float) -> dict[str, Any]:
        nothing = [0.0, 0.0, 0.0]
        largest, _, part = nothing if self.largest is None else self.largest.tolist()
        total = nothing if self.total is None else self.total.tolist()
        return {
            "compared": self.compared,
            "failed": self.failed,
            "error": self.error,
            "max_difference": largest,
            "mean_difference": total[1] / max(1, self.compared),
            "parity": not self.failed and part <= bound,
        }
