"""Prove on the rewritten graph itself what the pipeline promises.

With networkx, on the graph of data flow:

- nothing of the host reads what telemetry inserted, so statistics can't change the model's output;
- the host reads one tensor of a blend, and a blend reads one tensor that the host computes with;
- blend writes to nothing, telemetry to its own buffer alone;
- every inserted node has a value and an origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import networkx as nx
from torch import Tensor
from torch.fx import GraphModule, Node

from kasmina_fx._torch.tracing import written_by
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.group_telemetry import GroupTelemetry
from kasmina_fx.passes.infra.matching import find_matches, graph_modules
from kasmina_fx.passes.infra.metadata import has_value, lowering_of, origin_of, value_of
from kasmina_fx.passes.infra.pass_base import GraphPass
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.passes.place_telemetry import PlaceTelemetry


@dataclass(frozen=True)
class Verify(GraphPass):
    """Raise RewriteError when a promise of the pipeline does not hold.

    Args:
        strict: Raise also when a marker was left.
    """

    name: ClassVar[str] = "verify"
    strict: bool = False

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`: it changes nothing."""
        return False

    def ensures(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.ensures`."""
        for module in graph_modules(gm):
            flow = data_flow(module)
            _check_values(flow)
            _check_writes(flow)
            _check_telemetry(flow)
            _check_blends(flow)
        if self.strict:
            left = [(m.layer or m.node.name, _why(m.node, m.reason)) for m in find_matches(gm)]
            if left:
                layer, why = left[0]
                raise RewriteError(
                    f"{len(left)} markers were not rewritten; the first is of {layer}: {why}"
                )


def data_flow(gm: GraphModule) -> nx.DiGraph:
    """Return the graph's nodes, with an edge from each to its readers."""
    flow = nx.DiGraph()
    for node in gm.graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((source, node) for source in node.all_input_nodes)
    return flow


def _why(node: Node, reason: str | None) -> str:
    lowering = lowering_of(node)
    return reason or (lowering.why if lowering else "a pass was disabled")


#: Who inserts telemetry.
_TELEMETRY: Final = (PlaceTelemetry.name, GroupTelemetry.name)


def _inserted_by(flow: nx.DiGraph, *names: str) -> set[Node]:
    return {node for node in flow if (origin := origin_of(node)) is not None and origin.by in names}


def _check_values(flow: nx.DiGraph) -> None:
    for node in flow:
        if origin_of(node) is not None and not has_value(node) and not written_by(node):
            raise RewriteError(f"inserted node {node.name} carries no value")


def _check_writes(flow: nx.DiGraph) -> None:
    for node in _inserted_by(flow, LowerBlend.name):
        if written_by(node):
            raise RewriteError(f"{node.name} of a blend writes to {written_by(node)}")
    for node in _inserted_by(flow, *_TELEMETRY):
        for target in written_by(node):
            if target.op not in ("placeholder", "get_attr"):
                raise RewriteError(f"telemetry's {node.name} writes to {target.name}, not a buffer")


def _check_telemetry(flow: nx.DiGraph) -> None:
    inserted = _inserted_by(flow, *_TELEMETRY)
    # Whoever depends on an inserted node reads one, or reads one that does.
    for node, reader in nx.edge_boundary(flow, inserted):
        raise RewriteError(
            f"the host's {reader.name} depends on telemetry's {node.name}: statistics must not "
            "reach the model's output"
        )


def _check_blends(flow: nx.DiGraph) -> None:
    blends: dict[str, set[Node]] = {}
    for node in _inserted_by(flow, LowerBlend.name):
        origin = origin_of(node)
        assert origin is not None  # an inserted node
        blends.setdefault(origin.marker, set()).add(node)
    for marker, nodes in blends.items():
        left = {n for n in nodes if any(_is_host(reader) for reader in flow.successors(n))}
        outside = {s for node in nodes for s in flow.predecessors(node)} - nodes
        read = {s for s in outside if isinstance(value_of(s), Tensor) and _host_computes(flow, s)}
        for strangers, way in ((left, "the host reads"), (read, "it reads of the host")):
            if len(strangers) > 1:
                names = sorted(node.name for node in strangers)
                raise RewriteError(f"blend {marker} is not isolated: {way} {names}, not one tensor")


def _is_host(node: Node) -> bool:
    return origin_of(node) is None


def _host_computes(flow: nx.DiGraph, node: Node) -> bool:
    """Say whether it is a tensor of the host's, and no table or stack that blends alone read."""
    if node.op not in ("placeholder", "get_attr"):
        return _is_host(node)
    return any(_is_host(reader) for reader in flow.successors(node))
