"""Which nodes of a host are pointwise: they read tensors, and make one that shares no memory.

Activations in Dynamo's spelling, and the arithmetic that models write them with.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch.fx import Node
from torch.nn import functional as F

_FUNCTIONS: Final[frozenset[Any]] = frozenset(
    {F.gelu, F.relu, F.sigmoid, F.silu, F.tanh, torch.relu, torch.sigmoid, torch.tanh}
    | {torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.neg, torch.exp, torch.erf}
    | {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg}
)
_METHODS: Final = frozenset(
    {"relu", "sigmoid", "tanh", "add", "sub", "mul", "div", "pow", "neg", "exp", "erf"}
)


def is_pointwise(node: Node) -> bool:
    """Whether a node surely is; False where nothing is known about it, or it may write."""
    known = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, frozenset())
    in_place = any(arg is True for arg in (*node.args, *node.kwargs.values()))
    writes = in_place or "out" in node.kwargs
    return node.target in known and not writes
