"""Put a template's nodes in place of a marker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from kasmina_fx._torch_compat import fake_call
from kasmina_fx.passes.metadata import inherit, set_value, value_of


def splice(
    gm: GraphModule, marker: Node, template: GraphModule, inputs: Sequence[Node], *, by: str
) -> list[Node]:
    """Copy a template before ``marker`` and return the nodes of its outputs.

    New nodes carry values, the marker's stack trace and module stack, and their origin. Constants
    of the template (a user's module may hold some) become attributes of ``gm``.
    """
    placeholders = template.graph.find_nodes(op="placeholder")
    env: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
    results: list[Node] = []
    with gm.graph.inserting_before(marker):
        for node in template.graph.nodes:
            if node.op == "output":
                results = [env[arg] for arg in node.args[0]]
            elif node.op != "placeholder":
                copied = gm.graph.node_copy(node, env.__getitem__)
                copied.meta = {}
                if node.op == "get_attr":
                    copied.target = _adopt(gm, template, str(node.target))
                set_value(copied, _value(gm, copied, value_of(inputs[0])), like=marker)
                inherit(copied, marker, by)
                env[node] = copied
    return results


def _adopt(gm: GraphModule, template: GraphModule, name: str) -> str:
    number = 0
    while hasattr(gm, f"_kasmina_constant{number}"):
        number += 1
    setattr(gm, f"_kasmina_constant{number}", getattr(template, name))
    return f"_kasmina_constant{number}"


def _value(gm: GraphModule, node: Node, like: Any) -> Any:
    if node.op == "get_attr":
        return getattr(gm, str(node.target))

    def of(arg: Any) -> Any:
        return value_of(arg) if isinstance(arg, Node) else arg

    args, kwargs = map_aggregate(node.args, of), map_aggregate(node.kwargs, of)
    target: Any = node.target  # a template holds get_attr and call_function nodes alone
    return fake_call(target, args, kwargs, like)
