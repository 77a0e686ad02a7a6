"""A layer without a single blueprint slot is its base.

before  %y = linear(x, w, b)
        %blend = kasmina.blend.default(%y, [], [], [], [], [], [], 'dim=-1 runs=8x4', '')
        %out = getitem(%blend, 0)
        %notes = getitem(%blend, 1)
after   %y = linear(x, w, b)            (uses of %out read %y, observe's notes are None)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from kasmina_fx.passes.infra.matching import Match, argument, blend_matches
from kasmina_fx.passes.infra.outputs import outputs_of
from kasmina_fx.passes.infra.pass_base import GraphPass


@dataclass(frozen=True)
class EliminateDormant(GraphPass):
    """Blend markers without banks vanish."""

    name: ClassVar[str] = "eliminate_dormant"

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        modified = False
        for match in blend_matches(gm):
            if not match.banks:
                modified |= self._eliminate(match)
        return modified

    def _eliminate(self, match: Match) -> bool:
        y = argument(match.node, "y")
        out, notes = outputs_of(match.node)
        if any(user.op == "output" for node in notes for user in node.users):
            return False  # somebody returns the marker's second output: let the operator compute it
        for node in out:
            node.replace_all_uses_with(y)
            match.graph_module.graph.erase_node(node)
        for node in notes:
            for user in list(node.users):
                user.args = tuple(None if arg is node else arg for arg in user.args)
            match.graph_module.graph.erase_node(node)
        match.graph_module.graph.erase_node(match.node)
        return True
