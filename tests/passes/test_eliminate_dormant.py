"""A layer without a slot is its base."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from graph_cases import (
    assert_leaves_alone,
    assert_reference_after,
    dormant_graph,
    each_case_of,
    each_near_miss,
    golden_tests_of,
    growing_graph,
    near_miss,
    plain_graph,
)
from torch import Tensor, nn

from kasmina_fx import find_matches, rewrite
from kasmina_fx.passes import records_of
from kasmina_fx.passes.eliminate_dormant import EliminateDormant
from kasmina_fx.passes.infra.metadata import origin_of

each_case = each_case_of("eliminate_dormant")


def test_dormant_elimination_takes_the_marker_and_leaves_growing_ones() -> None:
    gm = dormant_graph()
    assert EliminateDormant()(gm).modified
    assert [match.is_blend for match in find_matches(gm)] == [False]
    observe: Any = find_matches(gm)[0].node
    assert observe.args[0].target is torch._C._nn.linear
    assert observe.args[1] is None
    assert not EliminateDormant()(growing_graph()).modified


def test_nothing_goes_but_the_marker_with_its_outputs_and_nothing_is_inserted() -> None:
    gm = dormant_graph()
    EliminateDormant()(gm)
    assert records_of(gm)[-1].op_counts == {str(operator.getitem): -2, "kasmina.blend.default": -1}
    assert all(origin_of(node) is None for node in gm.graph.nodes)


def test_a_marker_goes_without_shapes() -> None:
    class Dormant(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            out: Tensor = torch.ops.kasmina.blend.default(
                y, [], [], [], [], [], [], [], "dim=-1 runs=4x3", ""
            )[0]
            return out

    gm = torch.fx.symbolic_trace(Dormant())
    assert EliminateDormant()(gm).modified
    assert records_of(gm)[-1].op_counts == {str(operator.getitem): -1, "kasmina.blend.default": -1}
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "output"]


def test_a_graph_without_markers_is_the_same_object() -> None:
    assert_leaves_alone(EliminateDormant(), plain_graph())


def test_a_graph_with_a_bank_is_left_alone() -> None:
    assert_leaves_alone(EliminateDormant(), growing_graph())


@each_near_miss
def test_a_near_miss_is_left_alone(near: str) -> None:
    assert_leaves_alone(EliminateDormant(), near_miss(near))


def test_a_marker_whose_second_output_is_returned_stays() -> None:
    class Both(nn.Module):
        def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
            out, notes = torch.ops.kasmina.blend.default(
                y, [], [], [], [], [], [], [], "dim=-1 runs=4x3", ""
            )
            return out, notes

    gm = torch.fx.symbolic_trace(Both())
    result = rewrite(gm, [torch.randn(2, 12)])
    assert not result.modified
    notes = result.graph_module(torch.ones(2, 12))[1]
    assert notes.tolist() == [[0.0] * 4, [-1.0] * 4, [0.0] * 4]


def test_eliminating_again_changes_nothing() -> None:
    gm = dormant_graph()
    assert EliminateDormant()(gm).modified
    assert_leaves_alone(EliminateDormant(), gm)


@pytest.mark.parametrize("case", ["eliminate_dormant/dormant", "place_telemetry/dormant"])
def test_a_graph_without_the_marker_computes_what_the_reference_does(case: str) -> None:
    assert_reference_after(case, EliminateDormant())


test_golden_of_dynamos_graph, test_golden_of_inserted_nodes_is_one_for_all_front_ends = (
    golden_tests_of("eliminate_dormant")
)
