"""Observe markers become statistics of the layer's output, merged into their buffer.

    before  kasmina.observe.default(%y, %notes, telemetry, 'dim=-1 runs=8x4', 1)
    after   %merged = stack([count, mean, ...])     from sums of y over rows, then over chunks
            copy_(telemetry, %merged)

The write is the last of the inserted nodes and the only one; nothing of the host reads what it
wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from kasmina_fx import physical
from kasmina_fx.passes.matching import Match, argument, find_matches
from kasmina_fx.passes.pass_base import GraphPass
from kasmina_fx.passes.regions import autocast_at
from kasmina_fx.passes.splicing import splice
from kasmina_fx.passes.templates import tensor_argument, trace_template


@dataclass(frozen=True)
class PlaceTelemetry(GraphPass):
    """Every observe marker becomes the traced graph of :func:`kasmina_fx.physical.observe`."""

    name: ClassVar[str] = "place_telemetry"

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        matches = [m for m in find_matches(gm) if not m.is_blend and m.reason is None]
        for match in matches:
            self._lower(match)
        return bool(matches)

    def _lower(self, match: Match) -> None:
        node = match.node
        y, notes, telemetry = (argument(node, n) for n in ("y", "notes", "telemetry"))
        chunks, one_in = argument(node, "chunks"), argument(node, "one_in") or 1
        inputs = [n for n in (y, notes, telemetry) if n is not None]
        arguments = [tensor_argument(y, fixed={match.chunks.feature_dim})]
        arguments += [tensor_argument(n, fixed={0, 1}) for n in inputs[1:]]

        def observe(y: Tensor, *rest: Tensor) -> tuple[()]:
            physical.observe(y, rest[0] if len(rest) > 1 else None, rest[-1], chunks, one_in)
            return ()

        template = trace_template(
            ("observe", chunks, one_in, len(inputs)), observe, arguments, inputs, autocast_at(node)
        )
        splice(match.graph_module, node, template, inputs, by=self.name)
        match.graph_module.graph.erase_node(node)
