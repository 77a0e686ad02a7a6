"""Any ``nn.Module`` of one chunk as a blueprint, through ``torch.func``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.func import functional_call, vmap

from kasmina_fx.blueprints.base import Blueprint, TensorSpec, aside


class ModuleBlueprint(Blueprint):
    """Makes a blueprint of a factory ``chunk_size -> nn.Module``, or of one module.

    The copies of one module all start with its values. Supported: parameters, and buffers that a
    forward only reads. The module sees its chunk as the host lays its output out,
    ``(batch, ..., size)`` or ``(batch, size, height, width)``. Its stacked form is
    ``vmap(functional_call)``: ``vmap`` may bake the batch size into a graph (LayerNorm before
    Linear does), which costs a recompile at each new batch size. The built-ins don't.
    """

    def __init__(self, kind: str, factory: Callable[[int], nn.Module] | nn.Module) -> None:
        self.kind = kind
        self.factory = factory
        self._known: dict[int, tuple[tuple[TensorSpec, ...], nn.Module]] = {}
        self._evaluating: ModuleBlueprint | None = None
        self._training = True

    def module(self, size: int) -> nn.Module:
        """See :meth:`Blueprint.module`."""
        if isinstance(self.factory, nn.Module):
            return copy.deepcopy(self.factory)
        return self.factory(size)

    def in_mode(self, training: bool) -> ModuleBlueprint:
        """See :meth:`Blueprint.in_mode`: its module may hold a Dropout."""
        if training:
            return self
        if self._evaluating is None:
            self._evaluating = copy.copy(self)
            self._evaluating._known, self._evaluating._training = {}, False
        return self._evaluating

    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        """See :meth:`Blueprint.stacked`."""
        specs, skeleton = self._prepared(chunks.shape[dim])
        names = [spec.name for spec in specs]

        def one(tensors: Sequence[Tensor], members: Tensor) -> Tensor:
            def call(chunk: Tensor) -> Tensor:
                out: Tensor = functional_call(
                    skeleton, dict(zip(names, tensors, strict=True)), chunk
                )
                return out

            # One member is the common case: a private copy. vmap over a single chunk buys nothing.
            if members.shape[0] == 1:
                return call(members[0]).unsqueeze(0)
            return vmap(call, randomness="different")(members)

        if chunks.shape[0] == 1:
            return one([p[0] for p in params], chunks[0]).unsqueeze(0)
        return vmap(one, randomness="different")(list(params), chunks)

    def specs(self, size: int) -> tuple[TensorSpec, ...]:
        """See :meth:`Blueprint.specs`."""
        return self._prepared(size)[0]

    def _prepared(self, size: int) -> tuple[tuple[TensorSpec, ...], nn.Module]:
        """Return specs, and a module without values for ``functional_call``.

        Both are made once, before tracing.
        """
        if size not in self._known:
            specs = super().specs(size)
            with aside():
                self._known[size] = (specs, self.module(size).train(self._training).to("meta"))
        return self._known[size]
