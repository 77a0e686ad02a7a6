"""Observe markers become statistics of the layer's output, merged into their buffer.

    before  kasmina.observe.default(%y, %notes, telemetry, 'dim=-1 runs=8x4', 1, 1024)
    after   %seen = index(%y, [...])                at most 1,024 rows, spread evenly
            %merged = stack([count, mean, ...])     from sums over rows, then over chunks
            copy_(telemetry, %merged)
    or, where a kernel was chosen for it,
            kasmina.observe_rows.default([%y], [%notes], [telemetry], ...)

The write is the last of the inserted nodes and the only one; nothing of the host reads what it
wrote. All of it stands behind an activation that reads the output, see :func:`_behind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node

from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.passes.choose_lowerings import FUSED_STATISTICS
from kasmina_fx.passes.infra.matching import Match, argument, known_matches, require_normal
from kasmina_fx.passes.infra.metadata import lowering_of
from kasmina_fx.passes.infra.pass_base import GraphPass
from kasmina_fx.passes.infra.pointwise import is_pointwise
from kasmina_fx.passes.infra.regions import autocast_at
from kasmina_fx.passes.infra.splicing import splice
from kasmina_fx.passes.infra.templates import Meaning, fixed_argument, trace_template
from kasmina_fx.physical import statistics


@dataclass(frozen=True)
class PlaceTelemetry(GraphPass):
    """Every observe marker becomes the traced graph of :mod:`kasmina_fx.physical.statistics`."""

    name: ClassVar[str] = "place_telemetry"

    def requires(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.requires`."""
        require_normal(gm, self.name)

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        matches = [m for m in known_matches(gm) if not m.is_blend and m.reason is None]
        for match in matches:
            self._lower(match)
        return bool(matches)

    def _lower(self, match: Match) -> None:
        node = match.node
        y, notes, telemetry = (argument(node, n) for n in ("y", "notes", "telemetry"))
        _behind(y, node)
        inputs = [n for n in (y, notes, telemetry) if n is not None]
        arguments = [fixed_argument(y, {match.chunks.feature_dim})]
        arguments += [fixed_argument(n, {0, 1}) for n in inputs[1:]]
        chunks, one_in, rows = (argument(node, n) for n in ("chunks", "one_in", "rows"))
        lowering = lowering_of(node)
        kernel = lowering is not None and lowering.name == FUSED_STATISTICS
        meaning = _Observe(chunks, one_in or 1, rows or 0, kernel)
        template = trace_template(meaning, arguments, inputs, autocast_at(node))
        splice(match.graph_module, node, template, inputs, by=self.name)
        match.graph_module.graph.erase_node(node)


def _behind(y: Node, observe: Node) -> None:
    """Move a marker behind the pointwise nodes that read the output, where only such ones do.

    AOTAutograd's partitioner recomputes nothing in backward that reads a tensor after another
    reader of it which it can't fuse: of a GELU in bfloat16 behind statistics it would keep a
    float32 intermediate of the output's size, instead of the output itself.
    """
    readers = {user for user in y.users if user is not observe}
    node = last = observe
    while readers and is_pointwise(node.next):
        node = node.next
        if node in readers:
            readers.remove(node)
            last = node
    if not readers and last is not observe:
        last.append(observe)


@dataclass(frozen=True)
class _Observe(Meaning):
    """The meaning of an observe marker."""

    chunks: str
    one_in: int
    rows: int
    in_one_kernel: bool

    def __call__(self, *tensors: Tensor) -> tuple[()]:
        y, *notes, telemetry = tensors  # notes may be missing
        said = notes[0] if notes else None
        if self.in_one_kernel:
            how = (self.chunks, [self.one_in], [self.rows])
            OBSERVE_ROWS([y], [said], [telemetry], *how)
        else:
            statistics.observe(y, said, telemetry, self.chunks, self.one_in, self.rows)
        return ()
