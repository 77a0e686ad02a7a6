"""Markers get one spelling, whatever the front end recorded.

before  kasmina.blend(y, seeds=..., positions=..., ...)
after   kasmina.blend.default(y, ..., ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.infra.matching import argument, graph_modules, marker_nodes, overload_of
from kasmina_fx.passes.infra.pass_base import GraphPass
from kasmina_fx.physical.markers import MARKERS


@dataclass(frozen=True)
class NormalizeMarkers(GraphPass):
    """Markers become ``.default`` overloads with positional arguments."""

    name: ClassVar[str] = "normalize_markers"

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        modified = False
        for _, node in marker_nodes(gm):
            overload = overload_of(node)
            arguments = tuple(argument(node, a.name) for a in overload._schema.arguments)
            if node.target is not overload or node.kwargs:
                node.target, node.args, node.kwargs = overload, arguments, {}
                modified = True
        return modified

    def ensures(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.ensures`."""
        names = {str(marker.overloadpacket) for marker in MARKERS}
        for module in graph_modules(gm):
            for node in module.graph.nodes:
                # By its name: a spelling that the call did not know is found too.
                if any(str(node.target).startswith(name) for name in names) and (
                    node.target not in MARKERS or node.kwargs
                ):
                    raise RewriteError(f"marker {node.name} is not in its normal form")
