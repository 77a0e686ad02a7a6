"""Trace what a marker means into a small graph, once per layout.

A template is traced on symbolic sizes of its own: leading dims of ``y``, slots and capacities are
symbols in a private shape environment. So one template serves every layer of the same layout, every
batch size, and every front end, and none of the caller's fake tensors gets into it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from kasmina_fx._torch_compat import SymbolicSizes
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.metadata import value_of
from kasmina_fx.passes.regions import Autocast

_CAPACITY: Final = 1024


@dataclass(frozen=True)
class Argument:
    """A tensor that a template takes.

    ``shape`` holds an int for a size that graphs of this layout share, a name for one that may
    change. ``order`` lists its dims from the largest stride to the smallest.
    """

    shape: tuple[int | str, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def tensor_argument(
    node: Node, *, fixed: set[int] | None = None, names: Sequence[str] = ()
) -> Argument:
    """Describe a node's value.

    Args:
        node: With a tensor value in its meta.
        fixed: Dims with fixed sizes; all others may change. Not given: dims behind ``names`` are
            fixed.
        names: Names of the leading dims; tensors that use the same name have the same size.

    Size 1 is always fixed, as everywhere in torch.
    """
    value = value_of(node)
    rank = value.dim()
    shape: list[int | str] = []
    for dim, size in enumerate(value.shape):
        if isinstance(size, int) and size == 1 and names:
            shape.append(1)
        elif fixed is not None and (dim in fixed or dim - rank in fixed):
            shape.append(int(size))
        elif fixed is not None:
            shape.append(f"d{dim}")
        else:
            shape.append(names[dim] if dim < len(names) else int(size))
    return Argument(tuple(shape), _stride_order(value), value.dtype, value.device)


def trace_template(
    key: Hashable,
    fn: Callable[..., Any],
    arguments: Sequence[Argument],
    inputs: Sequence[Node],
    autocast: Autocast,
) -> GraphModule:
    """The graph of ``fn`` on such arguments; ``key`` stands for ``fn`` in the cache.

    A user's module may insist on a size (``vmap`` of a LayerNorm before a Linear does). Then the
    graph is traced on the exact sizes of ``inputs``; asking for these makes Dynamo guard on them.
    """
    template = _trace(_Keyed(key, fn), tuple(arguments), autocast)
    if template is None:
        exact = [tensor_argument(n, fixed=set(range(value_of(n).dim()))) for n in inputs]
        template = _trace(_Keyed(key, fn), tuple(exact), autocast)
    if template is None:
        raise RewriteError(f"{key}: tracing on exact sizes still asks for others")
    return template


class _Keyed:
    """A function that is equal to another one with the same key."""

    def __init__(self, key: Hashable, fn: Callable[..., Any]) -> None:
        self.key, self.fn = key, fn

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key


@lru_cache(maxsize=_CAPACITY)
def _trace(
    keyed: _Keyed, arguments: tuple[Argument, ...], autocast: Autocast
) -> GraphModule | None:
    """None if the function insists on a size that is a symbol."""
    sizes = SymbolicSizes()
    with sizes.mode:
        fakes = [_fake(argument, sizes) for argument in arguments]
    with autocast(), sizes.tracing(), torch.no_grad():
        template = make_fx(keyed.fn)(*fakes)
    if sizes.specialized():
        return None
    template.graph.eliminate_dead_code()
    return template


def _fake(argument: Argument, sizes: SymbolicSizes) -> Tensor:
    shape = [sizes.symbol(s) if isinstance(s, str) else s for s in argument.shape]
    ordered = torch.empty(
        [shape[dim] for dim in argument.order], dtype=argument.dtype, device=argument.device
    )
    back = [argument.order.index(dim) for dim in range(len(shape))]
    return ordered.permute(back)


def _stride_order(value: Tensor) -> tuple[int, ...]:
    strides = [int(s) for s in value.stride()] if value.dim() else []
    numbering = count()
    return tuple(
        dim
        for *_, dim in sorted((-stride, next(numbering), dim) for dim, stride in enumerate(strides))
    )
