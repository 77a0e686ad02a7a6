"""Say of each blend marker which activation a kernel of it could take along; changes no node.

    %blend = kasmina.blend.default(%y, ...)
    %out = getitem(%blend, 0)
    kasmina.observe.default(%out, ...)      statistics may see the output too
    %gelu = gelu(%out)                      and nothing else: the marker is annotated with "gelu"

The activation stays where it is unless the lowering that is chosen takes it along: then
:class:`~kasmina_fx.passes.lower_blend.LowerBlend` puts what it computes in the activation's place,
and hands the statistics the rows that they look at, which are nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.infra.following import follower_of
from kasmina_fx.passes.infra.matching import blend_matches, overload_of, require_normal
from kasmina_fx.passes.infra.metadata import set_then, then_of
from kasmina_fx.passes.infra.pass_base import GraphPass
from kasmina_fx.physical.markers import OBSERVE


@dataclass(frozen=True)
class AbsorbActivation(GraphPass):
    """Annotate blend markers with the activation that alone uses their output."""

    name: ClassVar[str] = "absorb_activation"

    def requires(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.requires`."""
        require_normal(gm, self.name)

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`; annotations don't count as a change."""
        for match in blend_matches(gm):
            follower = follower_of(match.node) if match.banks else None
            set_then(match.node, "" if follower is None else follower.name)
        return False

    def ensures(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.ensures`: it counts who reads what an annotated marker returns."""
        for match in blend_matches(gm):
            if then_of(match.node):
                returned = [user for user in match.node.users if user.args[1] == 0]
                readers = {reader for node in returned for reader in node.users}
                others = [n.name for n in readers if overload_of(n) is not OBSERVE]
                if len(others) != 1:
                    raise RewriteError(f"{match.node.name} is read by {sorted(others)}, not by one")
