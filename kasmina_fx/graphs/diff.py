"""Align two graphs by structure and say what a pass changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from kasmina_fx.arguments import check_instance
from kasmina_fx.graphs.text import canonical_names, graph_text, node_line, op_counts, operation
from kasmina_fx.passes.infra.metadata import role_of


@dataclass(frozen=True)
class GraphDiff:
    """What differs between two graphs; ``str()`` is a unified diff of their texts."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[tuple[str, str], ...]
    op_counts: dict[str, int]
    _texts: tuple[str, str]

    @property
    def identical(self) -> bool:
        """The same nodes with the same operands."""
        return not (self.added or self.removed or self.changed)

    def __str__(self) -> str:
        """Unified diff, "" for identical graphs."""
        before, after = (text.splitlines() for text in self._texts)
        return "\n".join(difflib.unified_diff(before, after, "before", "after", lineterm=""))


def graph_diff(before: GraphModule, after: GraphModule) -> GraphDiff:
    """Align ``before`` and ``after``, first from the inputs on, then from the outputs back.

    Nodes are partners if they do the same to partners (whatever their names and order), or the same
    for partners. What has none is added or removed; partners whose other operands differ are
    changed.
    """
    check_instance("before", before, GraphModule)
    check_instance("after", after, GraphModule)
    left, right = _flow(before), _flow(after)
    partner = _align(left, right)
    taken = set(partner.values())
    names = canonical_names(before), canonical_names(after)
    changed = [
        (node_line(old, names[0]), node_line(new, names[1]))
        for old, new in partner.items()
        if old.op not in ("placeholder", "get_attr")
        and _operands(old, partner) != _operands(new, {})
    ]
    counts = op_counts(after)
    counts.subtract(op_counts(before))
    return GraphDiff(
        added=_lines((n for n in right if n not in taken), names[1]),
        removed=_lines((n for n in left if n not in partner), names[0]),
        changed=tuple(changed),
        op_counts=dict(sorted((op, n) for op, n in counts.items() if n)),
        _texts=(graph_text(before), graph_text(after)),
    )


def _flow(gm: GraphModule) -> nx.DiGraph:
    flow = nx.DiGraph()
    for node in gm.graph.nodes:
        flow.add_node(node, label=_label(node))
        flow.add_edges_from((source, node) for source in node.all_input_nodes)
    return flow


def _label(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return role_of(node) or f"{node.op} {node.target}"
    return operation(node)


def _align(left: nx.DiGraph, right: nx.DiGraph) -> dict[Node, Node]:
    partner: dict[Node, Node] = {}
    free: dict[Any, list[Node]] = {}
    for node in nx.topological_sort(right):
        free.setdefault(_signature(right, node, {}), []).append(node)
    for node in nx.topological_sort(left):  # forward: the same operation on partners
        candidates = free.get(_signature(left, node, partner))
        if candidates:
            partner[node] = candidates.pop(0)
    taken = set(partner.values())
    for node in reversed(list(nx.topological_sort(left))):  # backward: the same, read by partners
        if node in partner:
            continue
        readers = {partner[user] for user in left.successors(node) if user in partner}
        for candidate in right:
            same = left.nodes[node]["label"] == right.nodes[candidate]["label"]
            if candidate in taken or not same:
                continue
            if node.op == "output" or readers & set(right.successors(candidate)):
                partner[node] = candidate
                taken.add(candidate)
                break
    return partner


def _signature(flow: nx.DiGraph, node: Node, partner: dict[Node, Node]) -> Any:
    return flow.nodes[node]["label"], _operands(node, partner)


def _operands(node: Node, partner: dict[Node, Node]) -> str:
    """A node's operands with partners in place of nodes, as text that can be compared."""

    def of(arg: Any) -> Any:
        return f"node {id(partner.get(arg, arg))}" if isinstance(arg, Node) else arg

    return repr((map_aggregate(node.args, of), sorted(map_aggregate(node.kwargs, of).items())))


def _lines(nodes: Iterable[Node], names: dict[Node, str]) -> tuple[str, ...]:
    return tuple(
        names[node] if node.op in ("placeholder", "get_attr") else node_line(node, names)
        for node in nodes
    )


__all__ = ["GraphDiff", "graph_diff"]
