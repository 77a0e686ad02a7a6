"""Find the marker nodes of a graph, in every front end's spelling and inside nested graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node

from kasmina_fx.arguments import check_instance
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.errors import KasminaError, RewriteError
from kasmina_fx.passes.infra.metadata import layer_path, value_of
from kasmina_fx.passes.infra.pass_base import MATCHES as _MATCHES
from kasmina_fx.physical.graph_inputs import BlendArguments
from kasmina_fx.physical.layout import BankSpec, ChunkLayout, parse_banks
from kasmina_fx.physical.markers import BLEND, MARKERS, OBSERVE

_PACKETS: Final[dict[Any, Any]] = {
    torch.ops.kasmina.blend: BLEND,
    torch.ops.kasmina.observe: OBSERVE,
}


@dataclass(frozen=True)
class Match:
    """A marker: where it is, what it says, and why it can't be rewritten (None if it can)."""

    graph_module: GraphModule
    node: Node
    layer: str
    chunks: ChunkLayout
    banks: tuple[BankSpec, ...]
    reason: str | None

    @property
    def is_blend(self) -> bool:
        """Whether it is a blend marker (else observe)."""
        return overload_of(self.node) is BLEND


def overload_of(node: Node) -> Any:
    """Return the marker overload that a node calls, or None for any other node."""
    if node.op != "call_function":
        return None
    if node.target in MARKERS:
        return node.target
    # Called as a packet, some front ends record the packet.
    return _PACKETS.get(node.target) if type(node.target).__name__ == "OpOverloadPacket" else None


def graph_modules(gm: GraphModule) -> list[GraphModule]:
    """Return ``gm`` and the graphs nested in it (bodies of checkpoints, of conditions)."""
    return [module for module in gm.modules() if isinstance(module, GraphModule)]


def marker_nodes(gm: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    """Yield every marker of ``gm`` and its nested graphs, in order."""
    for module in graph_modules(gm):
        for node in list(module.graph.nodes):
            if overload_of(node) is not None:
                yield module, node


def has_markers(gm: GraphModule) -> bool:
    """Say whether there is anything to rewrite."""
    return next(marker_nodes(gm), None) is not None


#: Names of a marker's arguments, in the order of its schema.
_NAMES: Final = {marker: tuple(a.name for a in marker._schema.arguments) for marker in MARKERS}


def argument(node: Node, name: str) -> Any:
    """Return an argument of a marker by its schema name, however it was passed."""
    position = _NAMES[overload_of(node)].index(name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def require_normal(gm: GraphModule, name: str) -> None:
    """Refuse a graph without ``normalize_markers`` before a pass that reads by position.

    Raises:
        RewriteError: A marker is spelled in another way.
    """
    for _, node in marker_nodes(gm):
        if node.target not in MARKERS or node.kwargs:
            raise RewriteError(f"{name} needs normalize_markers before it: see {node.name}")


def blend_arguments(node: Node) -> Any:
    """Return a blend marker's arguments as :class:`BlendArguments` whose tensors are nodes."""
    return BlendArguments(*(argument(node, name) for name in BlendArguments._fields))


def find_matches(gm: GraphModule) -> tuple[Match, ...]:
    """Return every candidate, rewritable or not; pure.

    Raises:
        InvalidType: No graph module.
    """
    check_instance("gm", gm, GraphModule)
    return tuple(_match(module, node) for module, node in marker_nodes(gm))


def known_matches(gm: GraphModule) -> tuple[Match, ...]:
    """Return the matches of a graph, found anew only once a pass has changed it."""
    found: tuple[Match, ...] | None = gm.meta.get(_MATCHES)
    if found is None:
        found = gm.meta[_MATCHES] = find_matches(gm)
    return found


def blend_matches(gm: GraphModule) -> list[Match]:
    """Return the blend markers that can be rewritten."""
    return [match for match in known_matches(gm) if match.is_blend and match.reason is None]


def _match(module: GraphModule, node: Node) -> Match:
    chunks = ChunkLayout.parse(argument(node, "chunks"))
    banks: tuple[BankSpec, ...] = ()
    reason = None
    if overload_of(node) is BLEND:
        try:
            banks = parse_banks(argument(node, "banks"))
            for bank in banks:
                lookup(bank.kind)
        except KasminaError as error:
            reason = str(error)
    if banks or overload_of(node) is OBSERVE:
        reason = reason or _why_not(argument(node, "y"), _tensors(node), chunks)
    return Match(module, node, layer_path(node), chunks, banks, reason)


def _tensors(node: Node) -> Sequence[Node]:
    return [n for n in node.all_input_nodes if n is not argument(node, "y")]


def _why_not(y: Node, others: Sequence[Node], chunks: ChunkLayout) -> str | None:
    if value_of(y) is None or any(value_of(n) is None for n in others):
        return "the graph holds no shapes; give rewrite() example_inputs"
    shape = value_of(y).shape
    if not -len(shape) <= chunks.feature_dim < len(shape):
        return f"the output has {len(shape)} dimensions, no feature dim {chunks.feature_dim}"
    if shape[chunks.feature_dim] != chunks.width:
        return f"the output has {shape[chunks.feature_dim]} features, its layout {chunks.width}"
    if any(isinstance(size, int) and size == 0 for size in shape):
        return "the output is empty"
    if not value_of(y).dtype.is_floating_point:
        return f"the output is {value_of(y).dtype}, not floating point"
    return None
