"""What all passes share: contracts, records, matches, values."""

from __future__ import annotations

from collections import Counter

import pytest
from graph_cases import growing_graph

from kasmina_fx.errors import RewriteError
from kasmina_fx.passes import DEFAULT_PASSES, records_of, run_passes
from kasmina_fx.passes.infra import matching
from kasmina_fx.passes.infra.metadata import has_value, origin_of, value_of
from kasmina_fx.passes.infra.pass_base import node_counts
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.passes.place_telemetry import PlaceTelemetry
from kasmina_fx.physical.markers import BLEND, OBSERVE


@pytest.mark.parametrize(("step", "marker"), [(LowerBlend(), BLEND), (PlaceTelemetry(), OBSERVE)])
def test_a_pass_that_reads_by_position_says_what_it_needs(step: LowerBlend, marker: object) -> None:
    gm = growing_graph()
    for node in gm.graph.nodes:
        if node.target is marker:
            schema = (BLEND if marker is BLEND else OBSERVE)._schema
            names = [a.name for a in schema.arguments]
            node.kwargs, node.args = dict(zip(names, node.args, strict=True)), ()
    with pytest.raises(RewriteError, match=f"{step.name} needs normalize_markers before it"):
        step(gm)


def test_each_pass_records_its_time_and_what_it_changed() -> None:
    gm = growing_graph()
    before = node_counts(gm)
    run_passes(gm)
    records = records_of(gm)
    assert [record.name for record in records] == [step.name for step in DEFAULT_PASSES]
    assert all(record.seconds >= 0 for record in records)
    assert {r.name for r in records if r.modified} >= {"lower_blend", "place_telemetry"}
    total: Counter[str] = Counter(before)
    for record in records:
        assert bool(record.op_counts) == record.modified
        total.update(record.op_counts)
    assert {t: n for t, n in total.items() if n} == dict(node_counts(gm))
    assert records[4].op_counts["kasmina.blend.default"] == -1


def test_matches_are_found_once_unless_a_pass_changed_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, calls = matching.find_matches, []

    def counted(gm: object) -> object:
        calls.append(gm)
        return found(gm)  # type: ignore[arg-type]  # a graph module

    monkeypatch.setattr(matching, "find_matches", counted)
    run_passes(growing_graph())
    changes = sum(record.modified for record in records_of(calls[0]))  # type: ignore[arg-type]
    assert len(calls) <= 1 + changes


def test_values_are_computed_when_somebody_asks() -> None:
    gm = growing_graph()
    run_passes(gm)
    inserted = [node for node in gm.graph.nodes if origin_of(node) is not None]
    waiting = [node for node in inserted if "val" not in node.meta]
    assert len(waiting) > len(inserted) / 2
    assert all(has_value(node) for node in inserted)
    assert all("val" not in node.meta for node in waiting)  # asking whether is not asking
    first = waiting[0]
    assert value_of(first) is value_of(first) is first.meta["val"] is first.meta["example_value"]
