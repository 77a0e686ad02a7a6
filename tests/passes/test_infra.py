"""What all passes share: contracts, matches, templates, splicing, records, values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graph_cases import (
    CASES,
    PLAIN,
    Case,
    OneLayer,
    dormant_graph,
    each_frontend,
    growing_graph,
    layer_of,
    near_miss,
    plain_graph,
    wrapped,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from kasmina_fx import capture, find_matches
from kasmina_fx._torch.tracing import fake_call, without_writes
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes import DEFAULT_PASSES, GraphPass, records_of, run_passes
from kasmina_fx.passes.choose_lowerings import ChooseLowerings
from kasmina_fx.passes.eliminate_dormant import EliminateDormant
from kasmina_fx.passes.infra import matching, splicing, templates
from kasmina_fx.passes.infra.copying import copy_graph_module
from kasmina_fx.passes.infra.metadata import Origin, has_value, origin_of, value_of
from kasmina_fx.passes.infra.pass_base import node_counts
from kasmina_fx.passes.infra.regions import autocast_at
from kasmina_fx.passes.infra.splicing import splice
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.passes.normalize_markers import NormalizeMarkers
from kasmina_fx.passes.place_telemetry import PlaceTelemetry
from kasmina_fx.physical.markers import BLEND, OBSERVE
from kasmina_fx.testing import graft

each_reader = pytest.mark.parametrize(
    ("step", "marker"), [(LowerBlend(), BLEND), (PlaceTelemetry(), OBSERVE)]
)


def by_keyword(gm: GraphModule, marker: Any) -> GraphModule:
    """Spell a marker with keywords alone."""
    names = [a.name for a in marker._schema.arguments]
    for node in gm.graph.find_nodes(op="call_function", target=marker):
        node.kwargs, node.args = dict(zip(names, node.args, strict=True)), ()
    return gm


@each_reader
def test_a_pass_that_reads_by_position_says_what_it_needs(step: GraphPass, marker: Any) -> None:
    gm = by_keyword(growing_graph(), marker)
    with pytest.raises(RewriteError, match=f"{step.name} needs normalize_markers before it"):
        step(gm)


@each_reader
def test_a_pass_that_is_refused_has_changed_and_recorded_nothing(
    step: GraphPass, marker: Any
) -> None:
    gm = by_keyword(growing_graph(), marker)
    nodes = list(gm.graph.nodes)
    with pytest.raises(RewriteError, match="normalize_markers"):
        step(gm)
    assert list(gm.graph.nodes) == nodes
    assert records_of(gm) == ()
    assert NormalizeMarkers()(gm).modified
    assert step(gm).modified


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@each_frontend
def test_golden_cases_match_what_they_should(case: Case, frontend: str) -> None:
    matches = find_matches(capture(case.model(), case.x(), frontend=frontend))
    left_out = case.name.startswith("place_telemetry") and frontend == "export"
    assert len(matches) == case.markers - left_out  # an exported graph keeps no statistics
    assert sum(len(match.banks) for match in matches) == case.banks
    assert all(match.reason is None and match.layer for match in matches)


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
    (lowered,) = [record for record in records if record.name == "lower_blend"]
    assert lowered.op_counts["kasmina.blend.default"] == -1


#: Which passes change which graph.
CHANGED_BY: dict[str, tuple[Callable[[], GraphModule], list[str]]] = {
    "growing": (growing_graph, ["lower_blend", "place_telemetry"]),
    "unwatched": (lambda: growing_graph(telemetry=False), ["lower_blend", "eliminate_dead_code"]),
    "dormant": (dormant_graph, ["eliminate_dormant", "place_telemetry"]),
    "near": (lambda: near_miss("narrow"), []),
}
each_graph = pytest.mark.parametrize("name", CHANGED_BY)


@each_graph
def test_records_add_up_to_the_whole_change_of_any_graph(name: str) -> None:
    make, changed_by = CHANGED_BY[name]
    gm = make()
    before = node_counts(gm)
    assert run_passes(gm).modified == bool(changed_by)
    records = records_of(gm)
    assert [record.name for record in records] == [step.name for step in DEFAULT_PASSES]
    assert [record.name for record in records if record.modified] == changed_by
    total: Counter[str] = Counter()
    for record in records:
        assert record.seconds >= 0
        assert 0 not in record.op_counts.values()
        total.update(record.op_counts)
    after = node_counts(gm)
    change = {t: after[t] - before[t] for t in before | after if after[t] != before[t]}
    assert {t: n for t, n in total.items() if n} == change


def test_a_graph_without_markers_has_no_records() -> None:
    gm = plain_graph()
    run_passes(gm)
    assert records_of(gm) == ()


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs that matches were looked for in, once a search."""
    found, calls = matching.find_matches, list[GraphModule]()

    def counted(gm: GraphModule) -> tuple[matching.Match, ...]:
        calls.append(gm)
        return found(gm)

    monkeypatch.setattr(matching, "find_matches", counted)
    return calls


def test_matches_are_found_once_unless_a_pass_changed_the_graph(
    searches: list[GraphModule],
) -> None:
    run_passes(growing_graph())
    changes = sum(record.modified for record in records_of(searches[0]))
    assert len(searches) <= 1 + changes


def test_matches_of_a_graph_that_no_pass_changes_are_found_once(
    searches: list[GraphModule],
) -> None:
    gm = near_miss("narrow")
    searches.clear()
    assert not run_passes(gm).modified
    assert searches == [gm]
    assert not run_passes(gm).modified
    assert searches == [gm]


def test_matches_are_found_again_once_a_pass_changed_a_node(searches: list[GraphModule]) -> None:
    gm = dormant_graph()
    searches.clear()
    ChooseLowerings()(gm)
    assert [match.is_blend for match in matching.known_matches(gm)] == [True, False]
    assert len(searches) == 1
    assert EliminateDormant()(gm).modified
    assert [match.is_blend for match in matching.known_matches(gm)] == [False]
    assert len(searches) == 2


class Twins(nn.Module):
    """Two layers of one layout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = OneLayer(), OneLayer(8)
        self.second.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def twins(batch: int, frontend: str) -> GraphModule:
    model = wrapped(Twins())
    for name in ("first.fc", "second.fc"):
        graft(layer_of(model, name), [0, 2], "mlp")
    return capture(model, torch.randn(batch, 8), frontend=frontend)


def test_one_template_serves_layers_batch_sizes_and_front_ends_of_one_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = []

    def counted(function: Any, inputs: Any) -> Any:
        traced.append(function)
        return without_writes(function, inputs)

    monkeypatch.setattr(templates, "without_writes", counted)
    assert LowerBlend()(twins(3, "dynamo")).modified
    assert len(traced) <= 1  # none if another test has traced it
    traced.clear()
    for batch, frontend in ((3, "dynamo"), (5, "fx"), (7, "export")):
        assert LowerBlend()(twins(batch, frontend)).modified
    assert traced == []


SHIFT = torch.tensor([1.0, 2.0])


@dataclass(frozen=True)
class Shifted(templates.Meaning):
    """A meaning with a constant, as a user's module may hold some."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (y,) = tensors
        return (y * torch.tensor([1.0, 2.0]).sum(),)


def test_a_spliced_template_brings_its_constants_its_origin_and_its_outputs() -> None:
    gm = dormant_graph()
    marker = find_matches(gm)[0].node
    y: Any = marker.args[0]
    arguments = [templates.fixed_argument(y, {-1})]
    results = []
    for _ in range(2):
        template = templates.trace_template(Shifted(), arguments, [y], autocast_at(marker))
        results += splice(gm, marker, template, [y], by="a test")
    constants = [n for n in gm.graph.find_nodes(op="get_attr") if origin_of(n) is not None]
    assert [n.target for n in constants] == ["_kasmina_constant0", "_kasmina_constant1"]
    assert all(torch.equal(getattr(gm, str(n.target)), SHIFT) for n in constants)
    nodes = list(gm.graph.nodes)
    for result in results:
        assert origin_of(result) == Origin("a test", marker.name)
        assert nodes.index(y) < nodes.index(result) < nodes.index(marker)
        assert value_of(result).shape == value_of(y).shape
    gm.graph.lint()


def test_a_copy_has_its_own_nodes_and_the_same_tensors() -> None:
    gm = capture(wrapped(OneLayer(), telemetry=True), torch.randn(3, 8), frontend="fx")
    copied = copy_graph_module(gm)
    assert copied.code == gm.code
    assert not set(copied.graph.nodes) & set(gm.graph.nodes)
    theirs = dict(copied.named_parameters())
    assert theirs.keys() == dict(gm.named_parameters()).keys()
    assert all(theirs[name] is parameter for name, parameter in gm.named_parameters())
    assert run_passes(copied).modified
    assert len(find_matches(gm)) == 2


def test_values_are_computed_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def counted(target: Any, *given: Any) -> Any:
        computed.append(target)
        return fake_call(target, *given)

    monkeypatch.setattr(splicing, "fake_call", counted)
    gm = growing_graph()
    run_passes(gm, PLAIN)
    inserted = [node for node in gm.graph.nodes if origin_of(node) is not None]
    waiting = [node for node in inserted if "val" not in node.meta]
    assert len(waiting) > len(inserted) / 2
    computed.clear()
    assert all(has_value(node) for node in inserted)
    assert all("val" not in node.meta for node in waiting)  # asking whether is not asking
    assert computed == []
    first = waiting[0]
    assert value_of(first) is value_of(first) is first.meta["val"] is first.meta["example_value"]
    assert computed
    assert all(value_of(node) is not None for node in waiting)
    once = len(computed)
    assert all(value_of(node) is not None for node in waiting)
    assert len(computed) == once
