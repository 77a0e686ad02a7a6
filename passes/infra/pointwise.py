"""Which nodes of a host are pointwise: they read tensors, and make one that shares no memory.

Activations, and the arithmetic that models write them with.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch.fx import Node

from kasmina_fx.passes.infra.following import activation_of

_FUNCTIONS: Final[frozenset[Any]] = frozenset(
    {torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.neg, torch.exp, torch.erf}
    | {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg}
)
_METHODS: Final = frozenset({"add", "sub", "mul", "div", "pow", "neg", "exp", "erf"})


def is_pointwise(node: Node) -> bool:
    """Whether a node surely is; False where nothing is known about it, or it may write."""
    if activation_of(node):
        return True
    known = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, frozenset())
    return node.target in known and "out" not in node.kwargs
