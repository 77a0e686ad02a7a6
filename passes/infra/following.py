"""What follows a blend: the activation that alone uses a layer's output, if it is one we know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Node

from kasmina_fx.passes.infra.matching import argument, overload_of
from kasmina_fx.passes.infra.metadata import value_of
from kasmina_fx.passes.infra.outputs import outputs_of
from kasmina_fx.physical.markers import OBSERVE

_ATEN: Final = torch.ops.aten
#: Spellings of activations that have one meaning each, out of place.
_PLAIN: Final[dict[Callable[..., Any] | str, str]] = {
    F.relu: "relu",
    torch.relu: "relu",
    _ATEN.relu.default: "relu",
    "relu": "relu",
    F.silu: "silu",
    _ATEN.silu.default: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    _ATEN.tanh.default: "tanh",
    "tanh": "tanh",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.special.expit: "sigmoid",
    _ATEN.sigmoid.default: "sigmoid",
    "sigmoid": "sigmoid",
}
_GELU: Final = {"none": "gelu", "tanh": "gelu_tanh"}


class Follower(NamedTuple):
    """Holds an activation, by its name in ``lowerings.rows.ACTIVATIONS``, and its node."""

    name: str
    node: Node


def activation_of(node: Node) -> str:
    """Return the activation that a node computes of its first input, or "".

    In place, or given anything but that input, it is none.
    """
    given = dict(node.kwargs)
    if len(node.args) + ("input" in given) != 1:
        return ""
    given.pop("input", None)
    if node.op == "call_function" and node.target in (F.gelu, _ATEN.gelu.default):
        approximate = given.pop("approximate", "none")
        return "" if given else _GELU.get(str(approximate), "")
    if given.pop("inplace", False) or given:
        return ""
    known = node.op == "call_function" or (node.op == "call_method" and len(node.args) == 1)
    return _PLAIN.get(node.target, "") if known else ""


def observers_of(marker: Node) -> list[Node]:
    """Return the observe markers that read a blend's first output."""
    out, _ = outputs_of(marker)
    users = [user for node in out for user in node.users]
    return [u for u in users if overload_of(u) is OBSERVE and argument(u, "y") in out]


def follower_of(marker: Node) -> Follower | None:
    """Return the activation that alone uses a blend's output, observe markers apart.

    Between the two lie nothing but what the marker returns, observe markers and inputs: no node
    that could change what either of them runs under, or write to what it reads.
    """
    out, notes = outputs_of(marker)
    observers = observers_of(marker)
    users = [u for node in out for u in node.users if u not in observers]
    if len(users) != 1:
        return None
    (node,) = users
    name, (old, new) = activation_of(node), (value_of(argument(marker, "y")), value_of(node))
    if not name or new is None or (old.dtype, old.device) != (new.dtype, new.device):
        return None
    between, passed = marker.next, [*out, *notes, *observers]
    while between is not node:
        if between not in passed and between.op not in ("placeholder", "get_attr"):
            return None
        between = between.next
    return Follower(name, node)
