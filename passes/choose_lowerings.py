"""Say for each blend marker what becomes of it, and why; changes no node.

``dormant``  no bank anywhere: the marker vanishes
``matmul``   stacked products on gathered chunks, pulled back
``none``     it can't be rewritten; it runs as the composite operator that it is
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from torch.fx import GraphModule

from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.passes.infra.matching import Match, known_matches
from kasmina_fx.passes.infra.metadata import Lowering, set_lowering
from kasmina_fx.passes.infra.pass_base import GraphPass

LOWERINGS: Final = ("auto", "matmul")


@dataclass(frozen=True)
class ChooseLowerings(GraphPass):
    """Annotate every marker with a :class:`Lowering`.

    Args:
        lowering: "auto" lets the pass choose; "matmul" forces that lowering where a bank exists.
    """

    name: ClassVar[str] = "choose_lowerings"
    lowering: str = "auto"

    def __post_init__(self) -> None:
        """Refuse a lowering that does not exist."""
        if self.lowering not in LOWERINGS:
            raise InvalidArgument(
                f"lowering {shown(self.lowering)}: this release has {', '.join(LOWERINGS)}"
            )

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`; annotations don't count as a change."""
        for match in known_matches(gm):
            set_lowering(match.node, self.choose(match))
        return False

    def choose(self, match: Match) -> Lowering:
        """Return the lowering for one marker."""
        if match.reason is not None:
            return Lowering("none", match.reason)
        if not match.is_blend:
            return Lowering("statistics", "telemetry is on")
        if not match.banks:
            return Lowering("dormant", "no blueprint slot is allocated")
        why = "forced by the option" if self.lowering != "auto" else "the only one that is built"
        return Lowering("matmul", why)
