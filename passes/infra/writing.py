"""Which nodes of a host might write to a tensor that is there already."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from torch.fx import Node

from kasmina_fx._torch.tracing import Operator
from kasmina_fx.passes.infra.metadata import origin_of

_ITEM: Final = frozenset({"setitem", "__setitem__", "delitem", "__delitem__"})
#: ``operator.iadd`` and its like, as functions and as methods.
_AUGMENTED: Final = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}
    | {"iand", "ior", "ixor", "ilshift", "irshift", "iconcat"}
)

_KNOWN: Final = ("torch", "_operator", "builtins", "math")
#: Operators over graphs; and what stands for numpy's functions, by names that Dynamo made.
_OTHERS: Final = ("torch.ops", "torch._ops", "torch._higher_order_ops", "torch._dynamo")
#: Arguments that ask a function to write, and those that some write to: a host's own state mostly.
_ASKING: Final = ("inplace", "max_norm")
_STATE: Final = ("running_mean", "running_var")
#: In names of functions in C, whose arguments have none: they may write their state.
_STATEFUL: Final = ("batch_norm", "instance_norm", "moving_avg")


def may_write(node: Node) -> bool:
    """Say whether a node of the host surely writes to nothing (False), or might.

    Torch names what writes with an underscore at the end, or asks for it by ``inplace``, ``out``
    or ``max_norm``. Modules and operators that hold graphs might do anything; what changes streams
    is taken for one that writes, for nothing may be moved past it either.
    """
    if node.op in ("placeholder", "get_attr", "output") or origin_of(node) is not None:
        return False
    if node.op == "call_module" or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if isinstance(node.target, Operator):
        return bool(node.target._schema.is_mutable) or node.target.namespace == "streams"
    if node.op == "call_method":
        return _writes_by_name(str(node.target))
    return _function_writes(node)


def _writes_by_name(name: str) -> bool:
    plain = name.strip("_")
    if name.startswith("__") and name.endswith("__"):
        return name in _ITEM or plain in _AUGMENTED
    return name in _ITEM or name in _AUGMENTED or name.endswith("_")


def _function_writes(node: Node) -> bool:
    function: Any = node.target
    name = getattr(function, "__name__", "")
    if _writes_by_name(name) or "stream" in name or not _is_a_known_kind(function):
        return True
    names = _names_of(function)
    if not names and any(part in name for part in _STATEFUL):
        return True
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    state = [given.get(name) for name in _STATE]
    return any(given.get(name) for name in _ASKING) or not all(map(_is_kept, state))


def _is_a_known_kind(function: Any) -> bool:
    """Say whether it is a function of torch's or Python's that means what its name says."""
    module = str(getattr(function, "__module__", None))
    return module.partition(".")[0] in _KNOWN and not module.startswith(_OTHERS)


def _is_kept(state: Any) -> bool:
    """Say whether it is no tensor that the graph computes."""
    return not isinstance(state, Node) or state.op in ("get_attr", "placeholder")


@cache
def _names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # one in C
        return ()
