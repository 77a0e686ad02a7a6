"""Trace what a marker means into a small graph, once per layout.

A template is traced on symbolic sizes of its own: leading dims of ``y``, slots and capacities are
symbols in a private shape environment. So one template serves every layer of the same layout, every
batch size, and every front end, and none of the caller's fake tensors gets into it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kasmina_fx._torch.tracing import SymbolicSizes, usual, without_writes
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.infra.metadata import value_of
from kasmina_fx.passes.infra.regions import Autocast

_LOG: Final = logging.getLogger(__name__)
_CAPACITY: Final = 1024


class Size(NamedTuple):
    """A size that may change: tensors that use the same name have the same one.

    ``hint`` stands for it while tracing; what must not look smaller than another has a larger one.
    """

    name: str
    hint: int = 11


@dataclass(frozen=True)
class Argument:
    """A tensor that a template takes.

    ``shape`` holds an int for a size that graphs of this layout share, a :class:`Size` for one that
    may change. ``order`` lists its dims from the largest stride to the smallest.
    """

    shape: tuple[int | Size, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def fixed_argument(node: Node, fixed: set[int]) -> Argument:
    """Describe a node's tensor whose dims may change, but for those that are ``fixed``."""
    value = value_of(node)
    rank = value.dim()
    shape = tuple(
        int(size) if dim in fixed or dim - rank in fixed else Size(f"d{dim}")
        for dim, size in enumerate(value.shape)
    )
    return Argument(shape, _stride_order(value), value.dtype, value.device)


def named_argument(node: Node, *sizes: Size) -> Argument:
    """Describe a node's tensor whose leading dims are ``sizes``; all others are fixed.

    Size 1 is always fixed, as everywhere in torch.
    """
    value = value_of(node)
    shape = tuple(
        sizes[dim] if dim < len(sizes) and not _is_one(size) else int(size)
        for dim, size in enumerate(value.shape)
    )
    return Argument(shape, _stride_order(value), value.dtype, value.device)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


@dataclass(frozen=True)
class Meaning(ABC):
    """The meaning of a marker: a function of tensors whose other arguments are the fields.

    Two that are equal have the same template.
    """

    @abstractmethod
    def __call__(self, *tensors: Tensor) -> Any:
        """Compute it."""


def trace_template(
    meaning: Meaning, arguments: Sequence[Argument], inputs: Sequence[Node], autocast: Autocast
) -> GraphModule:
    """Return the graph of a marker's meaning on such arguments, traced once.

    A user's module may insist on a size (``vmap`` of a LayerNorm before a Linear does). Then the
    graph is traced on the exact sizes of ``inputs``; asking for these makes Dynamo guard on them.
    """
    try:
        template = _trace(meaning, tuple(arguments), autocast)
    except Exception as error:  # whatever a user's module raises when it is asked for a symbol
        _LOG.debug("%s: traced on exact sizes, because of %s", meaning, error)
        template = None
    if template is None:
        exact = [fixed_argument(n, set(range(value_of(n).dim()))) for n in inputs]
        template = _trace(meaning, tuple(exact), autocast)
    if template is None:
        raise RewriteError(f"{meaning}: tracing on exact sizes still asks for others")
    return template


@lru_cache(maxsize=_CAPACITY)
def _trace(
    meaning: Meaning, arguments: tuple[Argument, ...], autocast: Autocast
) -> GraphModule | None:
    """Trace it; return None if the function insists on a size that is a symbol."""
    sizes = SymbolicSizes()
    with sizes.mode:
        fakes = [_fake(argument, sizes) for argument in arguments]
    with autocast(), sizes.tracing(), torch.no_grad():
        template = without_writes(meaning.__call__, fakes)
    if sizes.specialized():
        return None
    template.graph.eliminate_dead_code()
    return template


def _fake(argument: Argument, sizes: SymbolicSizes) -> Tensor:
    shape = [sizes.symbol(*s) if isinstance(s, Size) else s for s in argument.shape]
    ordered = torch.empty(
        [shape[dim] for dim in argument.order], dtype=argument.dtype, device=argument.device
    )
    back = [argument.order.index(dim) for dim in range(len(shape))]
    return ordered.permute(back)


def _stride_order(value: Tensor) -> tuple[int, ...]:
    # int() of a symbol would make it this number for good: a compile for each length of a text.
    strides = [usual(s) for s in value.stride()] if value.dim() else []
    numbering = count()
    return tuple(
        dim
        for *_, dim in sorted((-stride, next(numbering), dim) for dim, stride in enumerate(strides))
    )
