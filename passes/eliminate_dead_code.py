"""Inserted nodes that nothing uses are erased.

The host's own nodes are left to the compiler behind us: a dormant graph is the host's, node for
node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from kasmina_fx.passes.infra.matching import graph_modules
from kasmina_fx.passes.infra.metadata import origin_of
from kasmina_fx.passes.infra.pass_base import GraphPass


@dataclass(frozen=True)
class EliminateDeadCode(GraphPass):
    """Erase inserted nodes that nothing reads and that write nothing."""

    name: ClassVar[str] = "eliminate_dead_code"

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        modified = False
        for module in graph_modules(gm):
            for node in reversed(module.graph.nodes):
                if origin_of(node) is not None and not node.users and not node.is_impure():
                    module.graph.erase_node(node)
                    modified = True
        return modified
