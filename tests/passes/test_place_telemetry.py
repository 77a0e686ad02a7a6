"""Statistics are written once, behind the host."""

from __future__ import annotations

from graph_cases import growing_graph

from kasmina_fx import rewrite
from kasmina_fx.passes.infra.metadata import origin_of
from kasmina_fx.passes.place_telemetry import PlaceTelemetry
from kasmina_fx.passes.verify import writes_to


def test_telemetry_writes_once_and_last() -> None:
    gm = rewrite(growing_graph()).graph_module
    inserted = [n for n in gm.graph.nodes if (o := origin_of(n)) and o.by == PlaceTelemetry.name]
    writes = [node for node in inserted if writes_to(node)]
    assert writes == inserted[-1:]
