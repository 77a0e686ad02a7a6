"""Blend markers become chunked subgraphs."""

from __future__ import annotations

import pytest
import torch
from graph_cases import (
    GOLDEN,
    NEAR_MISSES,
    PLAIN,
    Case,
    OneLayer,
    assert_leaves_alone,
    assert_reference_after,
    dormant_graph,
    each_case_of,
    each_near_miss,
    golden_tests_of,
    growing_graph,
    layer_of,
    near_miss,
    plain_graph,
    spelled_as_torch_2_13,
    wrapped,
)
from kernel_cases import interpreter, kernels

from kasmina_fx import capture, find_matches, inserted_text, op_counts, rewrite
from kasmina_fx.errors import RewriteError
from kasmina_fx.graphs.text import graph_text
from kasmina_fx.lifecycle import RUNS, SeedLifecycle
from kasmina_fx.passes import passes_for, records_of, run_passes
from kasmina_fx.passes.infra.metadata import origin_of, value_of
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.testing import assert_golden, graft

__all__ = ["interpreter", "kernels"]
each_case = each_case_of("lower_blend")


def test_lowering_inserts_one_of_each_move_a_bank() -> None:
    gm = growing_graph(telemetry=False)
    assert LowerBlend()(gm).modified
    counts = op_counts(gm)
    assert counts["kasmina.gather.default"] == 1
    assert counts["kasmina.mix.default"] == counts["kasmina.notes.default"] == 1
    assert counts["kasmina.guard.default"] == counts["kasmina.reconstruct.default"] == 1
    assert counts["aten.bmm.default"] == 2
    assert not find_matches(gm)


@each_case
def test_moves_are_as_many_as_banks_and_no_marker_is_left(case: Case) -> None:
    gm = capture(case.model(), case.x())
    assert LowerBlend()(gm).modified
    counts = records_of(gm)[-1].op_counts
    assert counts["kasmina.gather.default"] == case.banks
    assert counts["kasmina.guard.default"] == counts["kasmina.reconstruct.default"] == case.banks
    # Once a run, however many banks it has.
    runs = 1 if case.name == "lower_blend/two_classes" else case.banks
    assert counts["kasmina.mix.default"] == counts["kasmina.notes.default"] == runs
    assert counts["kasmina.blend.default"] == -case.markers
    assert not find_matches(gm)


def test_what_is_inserted_says_by_whom_and_what_reads_it_has_the_markers_value() -> None:
    gm = growing_graph()
    marker = find_matches(gm)[0].node
    out, notes = sorted(marker.users, key=lambda node: int(node.args[1]))  # type: ignore[arg-type]
    values = value_of(out), value_of(notes)
    observe = find_matches(gm)[1].node
    host = set(gm.graph.nodes) - {marker, out, notes}
    LowerBlend()(gm)
    inserted = [node for node in gm.graph.nodes if node not in host]
    assert inserted
    assert {origin_of(node) for node in inserted} == {origin_of(inserted[0])}
    origin = origin_of(inserted[0])
    assert origin is not None
    assert (origin.by, origin.marker) == ("lower_blend", marker.name)
    assert [value_of(node) for node in observe.args[:2]] == list(values)  # type: ignore[arg-type]


def test_a_graph_without_markers_is_the_same_object() -> None:
    assert_leaves_alone(LowerBlend(), plain_graph())


def test_a_dormant_marker_is_left_alone() -> None:
    assert_leaves_alone(LowerBlend(), dormant_graph())


@each_near_miss
def test_a_near_miss_is_left_alone_with_its_reason(near: str) -> None:
    gm = near_miss(near)
    assert_leaves_alone(LowerBlend(), gm)
    assert [match.reason for match in find_matches(gm)] == [NEAR_MISSES[near][1]]


def test_an_unregistered_blueprint_is_a_reason_not_a_crash() -> None:
    gm = growing_graph()
    match = find_matches(gm)[0]
    match.node.args = (*match.node.args[:-1], "unheard@0*4")
    assert "unheard" in str(find_matches(gm)[0].reason)
    assert_leaves_alone(LowerBlend(), gm)


def test_lowering_again_changes_nothing() -> None:
    gm = growing_graph()
    assert LowerBlend()(gm).modified
    assert_leaves_alone(LowerBlend(), gm)


@each_case
def test_a_lowered_graph_computes_what_the_reference_does(case: Case) -> None:
    assert_reference_after(case.name, LowerBlend())


def test_a_marker_that_is_left_for_no_reason_is_an_error() -> None:
    with pytest.raises(RewriteError, match="lower_blend left"):
        LowerBlend().ensures(growing_graph())


test_golden_of_dynamos_graph, test_golden_of_inserted_nodes_is_one_for_all_front_ends = (
    golden_tests_of("lower_blend")
)


@pytest.mark.parametrize("stage", sorted(RUNS), ids=lambda stage: stage.name)
def test_golden_of_one_class_is_that_of_every_stage(stage: SeedLifecycle) -> None:
    # What a stage means for a blueprint is in the tables `roles` and `modes`, never in the graph.
    model = wrapped(OneLayer())
    graft(layer_of(model), [0, 2], "mlp", stage=stage)
    after = rewrite(capture(model, torch.randn(3, 8)), passes=PLAIN).graph_module
    assert_golden(inserted_text(after), "inserted/lower_blend/one_class", golden_dir=GOLDEN)


@spelled_as_torch_2_13
def test_golden_of_the_fused_lowering(kernels: str) -> None:
    gm = growing_graph()
    run_passes(gm, passes_for("fused"))
    name = {"interpreter": "lower_blend/fused", "native": "lower_blend/fused_on_cpu"}[kernels]
    assert_golden(graph_text(gm), name, golden_dir=GOLDEN)


@spelled_as_torch_2_13
@pytest.mark.usefixtures("interpreter")
def test_golden_of_the_dense_lowering() -> None:
    gm = growing_graph()
    run_passes(gm, passes_for("dense"))
    assert_golden(graph_text(gm), "lower_blend/dense", golden_dir=GOLDEN)
