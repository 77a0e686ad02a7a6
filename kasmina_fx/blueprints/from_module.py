"""Any ``nn.Module`` of one chunk as a blueprint, through ``torch.func``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kasmina_fx._torch.dynamo import being_recorded
from kasmina_fx._torch.tracing import outside_of_tracing, size_of
from kasmina_fx.blueprints.base import Blueprint, TensorSpec, aside


class ModuleBlueprint(Blueprint):
    """Makes a blueprint of a factory ``chunk_size -> nn.Module``, or of one module.

    The copies of one module all start with its values. Supported: parameters, and buffers that a
    forward only reads. The module sees its chunk as the host lays its output out,
    ``(batch, ..., size)`` or ``(batch, size, height, width)``. Its stacked form is
    ``vmap(functional_call)``: ``vmap`` may bake the batch size into a graph (LayerNorm before
    Linear does), which costs a recompile at each new batch size. The built-ins don't. In a program
    (of ``torch.export``, ``torch.jit.trace``) it runs once a place instead.
    """

    def __init__(self, kind: str, factory: Callable[[int], nn.Module] | nn.Module) -> None:
        self.kind = kind
        self.factory = factory
        self._known: dict[int, tuple[tuple[TensorSpec, ...], nn.Module]] = {}
        self._evaluating: ModuleBlueprint | None = None

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
            self._evaluating = _Evaluating(self)
        return self._evaluating

    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        """See :meth:`Blueprint.stacked`."""
        specs, skeleton = self._prepared(size_of(chunks, dim))
        names = [spec.name for spec in specs]

        def one(tensors: Sequence[Tensor], members: Tensor) -> Tensor:
            def call(chunk: Tensor) -> Tensor:
                # A module that writes to its input writes to nobody else's.
                given, own = chunk.clone(), dict(zip(names, tensors, strict=True))
                out: Tensor
                if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch's
                    out = _holding(own, skeleton)(given)  # functional_call refuses
                else:
                    with _Batchable():
                        out = functional_call(skeleton, own, given)
                return out

            if being_recorded():
                return torch.stack([call(chunk) for chunk in members.unbind()])
            # One member is the common case: a private copy. vmap over a single chunk buys nothing.
            if members.shape[0] == 1:
                return call(members[0]).unsqueeze(0)
            return vmap(call, randomness="different")(members)

        if being_recorded():  # no batch size may stay in a program, nor may it be retraced
            slots = zip(*(p.unbind() for p in params), strict=True)
            return torch.stack(
                [one(own, mine) for own, mine in zip(slots, chunks.unbind(), strict=True)]
            )
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
            with outside_of_tracing(), aside():
                self._known[size] = (super().specs(size), self.module(size).train().to("meta"))
        return self._known[size]


def _holding(tensors: Mapping[str, Tensor], skeleton: nn.Module) -> nn.Module:
    """Return a copy of a module that holds such tensors in the place of its own."""
    module = copy.deepcopy(skeleton)
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        (owner._parameters if own in owner._parameters else owner._buffers)[own] = tensor
    return module


class _Evaluating(ModuleBlueprint):
    """A blueprint of a user's module in evaluation, which Dropout and its like tell apart."""

    def __init__(self, training: ModuleBlueprint) -> None:
        super().__init__(training.kind, training.factory)
        self._of = training

    def in_mode(self, training: bool) -> ModuleBlueprint:
        """See :meth:`Blueprint.in_mode`."""
        return self._of if training else self

    def _prepared(self, size: int) -> tuple[tuple[TensorSpec, ...], nn.Module]:
        if size not in self._known:
            specs, skeleton = self._of._prepared(size)
            with outside_of_tracing():
                self._known[size] = (specs, copy.deepcopy(skeleton).eval())
        return self._known[size]


#: Convolutions, and the dims that they have behind the channels.
_CONVOLUTIONS: Final = {
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 2,
    F.conv_transpose3d: 3,
}


class _Batchable(TorchFunctionMode):
    """Adds biases apart from their products, which ``vmap`` can't take together in all cases.

    Of a biased ``linear`` on three dims or more it asks for sizes, which are symbols while a graph
    is traced; of a convolution under autocast it casts the input alone (torch 2.13).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, without its bias if it is one of those."""
        kwargs = dict(kwargs or {})
        if func is not F.linear and func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        x, weight, *rest = args
        bias = rest.pop(0) if rest else kwargs.pop("bias", None)
        if func in _CONVOLUTIONS and torch.is_autocast_enabled(x.device.type):
            x, weight = (_autocast(t) for t in (x, weight))
        out: Tensor = func(x, weight, None, *rest, **kwargs)
        if bias is None:
            return out
        beside = [-1] + [1] * _CONVOLUTIONS.get(func, 0)
        return out + bias.view(beside).to(out.dtype)


def _autocast(values: Tensor) -> Tensor:
    """Convert as autocast does what a product takes."""
    if not values.is_floating_point() or values.dtype == torch.float64:
        return values
    return values.to(torch.get_autocast_dtype(values.device.type))
