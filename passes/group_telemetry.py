"""Kernels for statistics of several layers become one.

    before  kasmina.observe_rows.default([%y1], [%notes1], [telemetry1], 'dim=-1 runs=8x4', ...)
            ...
            kasmina.observe_rows.default([%y2], [%notes2], [telemetry2], 'dim=-1 runs=8x8', ...)
    after   ...
            kasmina.observe_rows.default([%y1, %y2], [%notes1, %notes2], [telemetry1, telemetry2],
                                         'dim=-1 runs=8x4;dim=-1 runs=8x8', [1, 1], [1024, 1024])

It stands where the last of them stood. Outputs live until then, so that only a few layers come
together; nothing between them may write to what they read, no buffer is written twice, and none
that anything else in the graph reads or writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch.fx import GraphModule, Node

from kasmina_fx._torch.tracing import written_by
from kasmina_fx.lowerings.sample import OBSERVE_ROWS, TOGETHER
from kasmina_fx.passes.infra.matching import graph_modules
from kasmina_fx.passes.infra.metadata import inherit, value_of
from kasmina_fx.passes.infra.pass_base import GraphPass
from kasmina_fx.passes.infra.writing import may_write


@dataclass(frozen=True)
class GroupTelemetry(GraphPass):
    """Statistics of up to ``TOGETHER`` layers that follow one another become one call."""

    name: ClassVar[str] = "group_telemetry"

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        modified = False
        for module in graph_modules(gm):
            for group in _groups(module):
                self._join(module, group)
                modified = True
        return modified

    def _join(self, gm: GraphModule, group: list[_Call]) -> None:
        last = group[-1].node
        y, notes, telemetry, chunks, one_in, rows = zip(
            *(call.node.args for call in group), strict=True
        )
        layers = [list(chain(*lists)) for lists in (y, notes, telemetry)]
        how = [";".join(chunks), *(list(chain(*numbers)) for numbers in (one_in, rows))]
        with gm.graph.inserting_before(last):
            joined = gm.graph.call_function(OBSERVE_ROWS, (*layers, *how))
        inherit(joined, last, self.name)
        for call in group:
            gm.graph.erase_node(call.node)


class _Call(NamedTuple):
    """Holds a call for some layers: what it reads on which device, and the buffers it writes.

    Two nodes may read one attribute, so that a buffer goes by what its nodes read.
    """

    node: Node
    layers: int
    device: torch.device
    buffers: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, node: Node) -> _Call:
        read: Any = node.args[0]
        buffers = frozenset(map(_read_by, written_by(node)))
        return cls(node, len(read), value_of(read[0]).device, buffers)

    def fits(self, group: list[_Call]) -> bool:
        """Say whether a call can follow others as a part of theirs."""
        return (
            sum(call.layers for call in (*group, self)) <= TOGETHER
            and all(call.device == self.device for call in group)
            and not any(call.buffers & self.buffers for call in group)
        )


def _read_by(node: Node) -> tuple[str, str]:
    return node.op, str(node.target)


def _used_by_others(gm: GraphModule) -> set[tuple[str, str]]:
    """Return what of inputs and attributes anything but such calls reads or writes."""
    return {
        _read_by(node)
        for node in gm.graph.nodes
        if node.op in ("placeholder", "get_attr")
        and any(user.target is not OBSERVE_ROWS for user in node.users)
    }


def _groups(gm: GraphModule) -> list[list[_Call]]:
    """Return the calls that can be one, where there are several."""
    groups: list[list[_Call]] = [[]]
    used = _used_by_others(gm)
    for node in gm.graph.nodes:
        if node.target is OBSERVE_ROWS:
            call = _Call.of(node)
            if call.buffers & used:
                continue
            if groups[-1] and not call.fits(groups[-1]):
                groups.append([])
            groups[-1].append(call)
        elif may_write(node):
            groups.append([])
    return [group for group in groups if len(group) > 1]
