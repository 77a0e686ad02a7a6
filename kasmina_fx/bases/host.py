"""The host: what seeds ask of the module that they watch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx.bases.features import Features


class Host:
    """A module as its seeds see it, without what they add to it.

    A plain object that holds the module weakly: the module holds the seeds, and nothing registers
    it twice.

    Args:
        base: The module whose output has the features.
        features: The features of its output.
        without: Name of the child that is not the module's own.
    """

    def __init__(self, base: nn.Module, features: Features, without: str | None = None) -> None:
        self._base, self.features, self._without = weakref.ref(base), features, without

    @property
    def base(self) -> nn.Module:
        """The module itself.

        Raises:
            ReferenceError: It is gone.
        """
        base = self._base()
        if base is None:
            raise ReferenceError("the module that these seeds watch is gone")
        return base

    @property
    def in_place(self) -> bool:
        """Whether the seeds were put into the module itself, by a swap of its class."""
        return self._without is not None

    @property
    def kind(self) -> type[nn.Module]:
        """The module's class, without seeds."""
        base: Any = self.base
        found: type[nn.Module] = base.plain if self.in_place else type(base)
        return found

    def connect(self, base: nn.Module) -> None:
        """Watch the copy of a module that was copied with its seeds."""
        if self._base() is None:
            self._base = weakref.ref(base)

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the module and all below it, but for what seeds added."""
        base = self.base
        yield base
        for name, child in base.named_children():
            if name != self._without:
                yield from child.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the module's own parameters, each once."""
        found = (p for module in self.modules() for p in module._parameters.values())
        return iter(dict.fromkeys(p for p in found if p is not None))

    @property
    def like(self) -> Tensor | None:
        """A floating-point tensor: its dtype and device are those of what grows."""
        buffers = (b for module in self.modules() for b in module._buffers.values())
        own: Iterator[Tensor | None] = chain(self.parameters(), buffers)
        return next((t for t in own if t is not None and t.dtype.is_floating_point), None)

    @property
    def weight(self) -> Tensor | None:
        """The module's weight; of a module without one, its first floating-point tensor."""
        weight = getattr(self.base, "weight", None)
        return weight if isinstance(weight, Tensor) else self.like

    def gradient_norm(self) -> Tensor | None:
        """Return the 2-norm of the weight's gradient; of all parameters' if it is no parameter."""
        weight = getattr(self.base, "weight", None)
        whole = [weight] if isinstance(weight, nn.Parameter) else self.parameters()
        grads = [
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            for p in whole
            if p.grad is not None
        ]
        norms = [torch.linalg.vector_norm(grad.float()) for grad in grads]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the module out: a copy is connected to the copied one."""
        return {"features": self.features, "_without": self._without, "_base": _nobody}


def _nobody() -> None:
    """Return None, as a weak reference to a module that is gone does."""
