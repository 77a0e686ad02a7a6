"""Entries of ``node.meta``: those that front ends write, and our own.

Values are under ``val`` (export, ``FakeTensorProp``) or ``example_value`` (Dynamo); those of
inserted nodes are computed when :func:`value_of` first asks for one. Inserted nodes carry
``kasmina``, an :class:`Origin`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from kasmina_fx._torch.tracing import FakeTensorMode
from kasmina_fx.lowerings.cost import Candidate

_LAZY: Final = "kasmina_lazy_value"
_ORIGIN: Final = "kasmina"
_LOWERING: Final = "kasmina_lowering"
_ROLE: Final = "kasmina_role"
_THEN: Final = "kasmina_then"
_COPIED: Final = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass(frozen=True)
class Origin:
    """Says which pass inserted a node, for which marker."""

    by: str
    marker: str


@dataclass(frozen=True)
class Lowering:
    """Says what becomes of a marker, and why; and what was considered, where there was a choice."""

    name: str
    why: str
    candidates: tuple[Candidate, ...] = ()


class LazyValues(ABC):
    """Holds values of several nodes, computed when one of them is asked for."""

    @abstractmethod
    def __getitem__(self, name: str) -> Any:
        """Return the value of that name."""


def value_of(node: Node) -> Any:
    """Return the fake tensor (or number) that a node stands for; None if the graph doesn't say."""
    lazy = node.meta.pop(_LAZY, None)
    if lazy is not None:
        values, name, as_dynamo = lazy
        node.meta["val"] = values[name]
        if as_dynamo:
            node.meta["example_value"] = node.meta["val"]
    return node.meta.get("val", node.meta.get("example_value"))


def has_value(node: Node) -> bool:
    """Say whether a node has a value; asking computes nothing."""
    return _LAZY in node.meta or value_of(node) is not None


def set_lazy_value(node: Node, values: LazyValues, name: str, *, like: Node) -> None:
    """Let a node have the value of that name, stored as the graph of ``like`` stores values."""
    node.meta[_LAZY] = (values, name, "example_value" in like.meta)


def set_value(node: Node, value: Any, *, like: Node) -> None:
    """Store a node's value the way the graph of ``like`` does."""
    node.meta.pop(_LAZY, None)
    node.meta["val"] = value
    if "example_value" in like.meta:
        node.meta["example_value"] = value


def origin_of(node: Node) -> Origin | None:
    """Say which pass inserted the node; return None for the host's own."""
    origin: Origin | None = node.meta.get(_ORIGIN)
    return origin


def inherit(node: Node, marker: Node, by: str) -> None:
    """Give an inserted node the marker's place in the source, and its origin."""
    for key in _COPIED:
        if key in marker.meta:
            node.meta.setdefault(key, marker.meta[key])
    node.meta[_ORIGIN] = Origin(by, marker.name)


def lowering_of(node: Node) -> Lowering | None:
    """Return what was chosen for a marker, or None."""
    lowering: Lowering | None = node.meta.get(_LOWERING)
    return lowering


def set_lowering(node: Node, lowering: Lowering) -> None:
    """Choose what becomes of a marker."""
    node.meta[_LOWERING] = lowering


def then_of(node: Node) -> str:
    """Return the activation that a kernel of a marker could take along, or ""."""
    then: str = node.meta.get(_THEN, "")
    return then


def set_then(node: Node, then: str) -> None:
    """Say which activation a kernel of a marker could take along."""
    node.meta[_THEN] = then


def layer_path(node: Node) -> str:
    """Return the FQN of the layer of a marker, "" where the front end doesn't say."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return clean_path(paths[-1]) if paths else ""


def clean_path(path: str) -> str:
    """Make an FQN from a front end's spelling: ``L['self']._modules['a'].b`` is ``a.b``.

    The model may be the first of ``*args``, and what a bound method is of.
    """
    path = re.sub(r"^L\['args'\]\[0\]", "", path)
    path = re.sub(r"^L\['\w+'\](\.__self__)?", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    parts = [part for part in path.split(".") if part]
    return ".".join(p for p in parts if p not in ("_modules", "_parameters", "_buffers"))


def propagate_if_missing(gm: GraphModule, example_inputs: Sequence[Any] | None) -> None:
    """Give a graph without shapes (``symbolic_trace`` leaves none) those of ``example_inputs``."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and value_of(n) is None]
    if not nodes or example_inputs is None:
        return
    fakes = [value.fake_mode for value in example_inputs if hasattr(value, "fake_mode")]
    mode = fakes[0] if fakes else FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [
        mode.from_tensor(v) if isinstance(v, Tensor) and not hasattr(v, "fake_mode") else v
        for v in example_inputs
    ]
    _Propagation(gm, mode=mode).propagate_dont_convert_inputs(*inputs)


class _Propagation(FakeTensorProp):
    """Makes attributes fake before operators see them: torch 2.11 does not take our stacks."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value


def set_role(node: Node, role: str) -> None:
    """Name an input.

    Names are ``param fc.weight``, ``buffer fc.kasmina.telemetry.accumulated``,
    ``table fc.kasmina.roles``, ``input x``.
    """
    node.meta[_ROLE] = role


def role_of(node: Node) -> str | None:
    """Return the name that :func:`capture` gave an input."""
    role: str | None = node.meta.get(_ROLE)
    return role
