"""Tables are replaced at every change of seeds: no CUDA graph may hold on to their addresses.

Dynamo (2.11 to 2.13) takes every tensor that it reaches through a module for one whose address
stays. A CUDA graph is recorded on such addresses, recorded anew when one changes, and given up
after 128 times; what may move is copied into its own inputs at each call. Stacks of parameters, and
the statistics, stay where they are.

before  %seeds  tensor_dict={"_dynamo_static_input_type": "unguarded", ...}
after   %seeds  tensor_dict={"_dynamo_static_input_type": None, ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from kasmina_fx._torch.dynamo import STATIC_INPUT, placeholder_source
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.infra.matching import argument, known_matches
from kasmina_fx.passes.infra.pass_base import GraphPass
from kasmina_fx.physical.graph_inputs import TABLES, is_table_source


@dataclass(frozen=True)
class UnpinTables(GraphPass):
    """Inputs that are tables may move; no node changes."""

    name: ClassVar[str] = "unpin_tables"

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`: it finds tables by where Dynamo found them."""
        for node in gm.graph.find_nodes(op="placeholder"):
            if keeps_address(node) and is_table_source(placeholder_source(node)):
                node.meta["tensor_dict"] = {**node.meta["tensor_dict"], STATIC_INPUT: None}
        return False

    def ensures(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.ensures`: it finds tables by what markers take."""
        for match in known_matches(gm):
            if not match.is_blend:
                continue
            for field in TABLES:
                for node in argument(match.node, field):
                    if node.op == "placeholder" and keeps_address(node):
                        raise RewriteError(
                            f"table {node.name} ({field} of {match.layer or match.node.name}), "
                            f"found at {placeholder_source(node)!r}, is taken for one whose "
                            "address stays"
                        )


def keeps_address(node: Node) -> bool:
    """Say whether Dynamo takes an input's address for one that stays."""
    return node.meta.get("tensor_dict", {}).get(STATIC_INPUT) is not None
