"""Tables are replaced at every change of seeds: no CUDA graph may hold on to their addresses.

Dynamo (2.11 to 2.13) takes every tensor that it reaches through a module for one whose address
stays. A CUDA graph is recorded on such addresses, recorded anew when one changes, and given up
after 128 times; what may move is copied into its own inputs at each call. Stacks of parameters, and
the statistics, stay where they are.

before  %seeds  tensor_dict={"_dynamo_static_input_type": "unguarded", ...}
after   %seeds  tensor_dict={"_dynamo_static_input_type": None, ...}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final

from torch.fx import GraphModule, Node

from kasmina_fx._dynamo_compat import STATIC_INPUT, placeholder_source
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.pass_base import GraphPass

#: Where :class:`~kasmina_fx.published.Published` keeps tables, in a source's spelling.
_TABLE: Final = re.compile(r"\._published\.(layer|seeds|positions|modes|trainees)\[")


@dataclass(frozen=True)
class UnpinTables(GraphPass):
    """Inputs that are tables may move; no node changes."""

    name: ClassVar[str] = "unpin_tables"

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        for node in pinned_tables(gm):
            node.meta["tensor_dict"] = {**node.meta["tensor_dict"], STATIC_INPUT: None}
        return False

    def ensures(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.ensures`."""
        if pinned := pinned_tables(gm):
            raise RewriteError(f"table {pinned[0].name} is taken for one whose address stays")


def keeps_address(node: Node) -> bool:
    """Does Dynamo say of an input that its address stays?"""
    return node.meta.get("tensor_dict", {}).get(STATIC_INPUT) is not None


def pinned_tables(gm: GraphModule) -> list[Node]:
    """Inputs that are tables, and that Dynamo takes for tensors whose address stays."""
    inputs = gm.graph.find_nodes(op="placeholder")
    return [n for n in inputs if keeps_address(n) and _TABLE.search(placeholder_source(n))]
