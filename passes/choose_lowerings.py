"""Say for each blend marker what becomes of it, and why; changes no node.

``dormant``  no bank anywhere: the marker vanishes
``dense``    one kernel a bank over all features, with the activation that follows the layer
``fused``    one kernel a bank on the chunks of active seeds, in place
``matmul``   stacked products on gathered chunks, pulled back
``loop``     plain operators on one chunk after the other
``statistics``, ``fused statistics``  of an observe marker: plain operators, or one kernel
``none``     it can't be rewritten; it runs as the composite operator that it is
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Final

import torch
from torch.fx import GraphModule

from kasmina_fx._torch.tracing import is_dense, usual
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.lowerings import FALLBACK, LOWERINGS, Site, cost, lowering_named
from kasmina_fx.lowerings.base import Lowering as Able
from kasmina_fx.lowerings.sample import can_observe
from kasmina_fx.passes.infra.matching import Match, argument, blend_arguments, known_matches
from kasmina_fx.passes.infra.metadata import Lowering, set_lowering, then_of, value_of
from kasmina_fx.passes.infra.outputs import outputs_of
from kasmina_fx.passes.infra.pass_base import GraphPass

#: What becomes of an observe marker where a kernel computes it.
FUSED_STATISTICS: Final = "fused statistics"
CHOICES: Final = ("auto", *(lowering.name for lowering in LOWERINGS))


@dataclass(frozen=True)
class ChooseLowerings(GraphPass):
    """Annotate every marker with a :class:`Lowering`.

    Args:
        lowering: "auto" takes the one of :data:`kasmina_fx.lowerings.LOWERINGS` that
            :mod:`kasmina_fx.lowerings.cost` predicts to be the quickest, of those that can; a name
            forces that one where a bank exists and it can.
    """

    name: ClassVar[str] = "choose_lowerings"
    lowering: str = "auto"

    def __post_init__(self) -> None:
        """Refuse a lowering that does not exist."""
        if self.lowering not in CHOICES:
            raise InvalidArgument(
                f"lowering {shown(self.lowering)}: this release has {', '.join(CHOICES)}"
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
            kernel = self.lowering in ("auto", "dense", "fused") and can_observe(site_of(match))
            return Lowering(FUSED_STATISTICS if kernel else "statistics", "telemetry is on")
        if not match.banks:
            return Lowering("dormant", "no blueprint slot is allocated")
        site = site_of(match)
        if self.lowering != "auto":
            return _forced(lowering_named(self.lowering), site)
        found = cost.candidates(LOWERINGS, site)
        refused: dict[str, list[str]] = {}  # who, by the reason
        for each in found:
            if each.why_not is not None:
                refused.setdefault(each.why_not, []).append(each.name)
        alone = sum(each.why_not is None for each in found) == 1
        why = "the only one that can" if alone else "the quickest by prediction"
        not_taken = [f"not {' or '.join(names)}: {reason}" for reason, names in refused.items()]
        return Lowering(cost.quickest(found).name, "; ".join([why, *not_taken]), found)


def _forced(asked: Able, site: Site) -> Lowering:
    why_not = asked.why_not(site)
    if why_not is None:
        return Lowering(asked.name, "forced by the option")
    return Lowering(FALLBACK, f"not {asked.name}: {why_not}")


def site_of(match: Match) -> Site:
    """Describe a marker to lowerings."""
    y = value_of(argument(match.node, "y"))
    stacks = [value_of(n) for n in (blend_arguments(match.node).params if match.banks else ())]
    rest = iter(stacks)
    sizes = [
        tuple(tuple(int(n) for n in next(rest).shape[1:]) for _ in range(bank.num_params))
        for bank in match.banks
    ]
    asked = blend_arguments(match.node) if match.banks else None
    orders, seeds = (asked.order, asked.seeds) if asked else ((), ())
    return Site(
        match.chunks,
        match.banks,
        y.dtype,
        y.device,
        y.dim(),
        is_dense(y),
        tuple(sizes),
        frozenset(stack.dtype for stack in stacks),
        then_of(match.node),
        running=tuple(usual(value_of(order).shape[0]) for order in orders),
        places=tuple(prod(map(usual, value_of(table).shape)) for table in seeds),
        rows=prod(map(usual, y.shape)) // match.chunks.width,
        training=torch.is_grad_enabled(),
        notes=match.is_blend and any(node.users for node in outputs_of(match.node)[1]),
    )
