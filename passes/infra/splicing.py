"""Put a template's nodes in place of a marker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from kasmina_fx._torch.tracing import fake_call
from kasmina_fx.passes.infra.metadata import LazyValues, inherit, set_lazy_value, value_of


def splice(
    gm: GraphModule, marker: Node, template: GraphModule, inputs: Sequence[Node], *, by: str
) -> list[Node]:
    """Copy a template before ``marker`` and return the nodes of its outputs.

    New nodes carry values, the marker's stack trace and module stack, and their origin. Constants
    of the template (a user's module may hold some) become attributes of ``gm``.
    """
    placeholders = template.graph.find_nodes(op="placeholder")
    env: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
    values, results = _TemplateValues(template, [value_of(node) for node in inputs]), []
    with gm.graph.inserting_before(marker):
        for node in template.graph.nodes:
            if node.op == "output":
                results = [env[arg] for arg in node.args[0]]
            elif node.op != "placeholder":
                copied = gm.graph.node_copy(node, env.__getitem__)
                copied.meta = {}
                if node.op == "get_attr":
                    copied.target = _adopt(gm, template, str(node.target))
                set_lazy_value(copied, values, node.name, like=marker)
                inherit(copied, marker, by)
                env[node] = copied
    return results


def _adopt(gm: GraphModule, template: GraphModule, name: str) -> str:
    number = 0
    while hasattr(gm, f"_kasmina_constant{number}"):
        number += 1
    setattr(gm, f"_kasmina_constant{number}", getattr(template, name))
    return f"_kasmina_constant{number}"


class _TemplateValues(LazyValues):
    """Holds values of a template's nodes for those of its inputs: computed once, and all at once.

    A deep model gets thousands of nodes, and a fake call for each takes longer than all passes.
    """

    def __init__(self, template: GraphModule, inputs: Sequence[Any]) -> None:
        self._template, self._inputs = template, inputs
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Return the value of the template's node of that name."""
        if not self._known:
            graph = self._template.graph
            names = [node.name for node in graph.find_nodes(op="placeholder")]
            self._known.update(zip(names, self._inputs, strict=True))
            for node in graph.nodes:
                if node.op not in ("placeholder", "output"):
                    self._known[node.name] = self._value(node)
        return self._known[name]

    def _value(self, node: Node) -> Any:
        if node.op == "get_attr":
            return getattr(self._template, str(node.target))

        def of(arg: Any) -> Any:
            return self._known[arg.name] if isinstance(arg, Node) else arg

        args, kwargs = map_aggregate(node.args, of), map_aggregate(node.kwargs, of)
        target: Any = node.target  # a template holds get_attr and call_function nodes alone
        return fake_call(target, args, kwargs, self._inputs[0])
