"""Of the inserted nodes what is used stays."""

from __future__ import annotations

import pytest
import torch
from graph_cases import (
    CASES,
    GOLDEN,
    Case,
    assert_leaves_alone,
    assert_reference_after,
    golden_text,
    growing_graph,
    plain_graph,
    spelled_as_torch_2_13,
)
from torch.fx import GraphModule

from kasmina_fx import capture
from kasmina_fx.passes import records_of
from kasmina_fx.passes.eliminate_dead_code import EliminateDeadCode
from kasmina_fx.passes.infra.copying import copy_graph_module
from kasmina_fx.passes.infra.metadata import inherit, origin_of
from kasmina_fx.passes.infra.pass_base import node_counts
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.passes.place_telemetry import PlaceTelemetry
from kasmina_fx.testing import assert_golden


def lowered() -> GraphModule:
    """As LowerBlend leaves it: nothing reads the blend's notes."""
    gm = growing_graph(telemetry=False)
    LowerBlend()(gm)
    return gm


def test_dead_inserted_nodes_go_and_dead_host_nodes_stay() -> None:
    gm = growing_graph(telemetry=False)
    with gm.graph.inserting_before(gm.graph.output_node()):
        dead = gm.graph.call_function(torch.neg, (gm.graph.find_nodes(op="placeholder")[0],))
    LowerBlend()(gm)
    before = len(gm.graph.nodes)
    assert EliminateDeadCode()(gm).modified
    assert len(gm.graph.nodes) < before
    assert dead in gm.graph.nodes
    assert not EliminateDeadCode()(gm).modified


def test_what_goes_is_what_only_dead_nodes_read_and_all_that_stays_is_read() -> None:
    gm = lowered()
    assert EliminateDeadCode()(gm).modified
    counts = records_of(gm)[-1].op_counts
    assert all(count < 0 for count in counts.values())
    assert counts == {"kasmina.notes.default": -1}  # all else blends or has a gradient
    inserted = [node for node in gm.graph.nodes if origin_of(node) is not None]
    assert inserted
    assert all(node.users for node in inserted)


def test_a_graph_without_markers_is_the_same_object() -> None:
    gm = plain_graph()
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(torch.neg, (gm.graph.find_nodes(op="placeholder")[0],))
    assert_leaves_alone(EliminateDeadCode(), gm)


def test_a_graph_that_no_pass_has_lowered_is_left_alone() -> None:
    assert_leaves_alone(EliminateDeadCode(), growing_graph())


@spelled_as_torch_2_13
def test_golden() -> None:
    gm = growing_graph(telemetry=False)
    LowerBlend()(gm)
    before = node_counts(gm)
    EliminateDeadCode()(gm)
    gone = before - node_counts(gm)
    lines = [f"-{count} {target}" for target, count in sorted(gone.items())]
    assert_golden("\n".join(lines) + "\n", "eliminate_dead_code/one_class", golden_dir=GOLDEN)


@spelled_as_torch_2_13
def test_golden_of_the_whole_graph_before_and_after() -> None:
    gm = lowered()
    before = copy_graph_module(gm)
    EliminateDeadCode()(gm)
    assert_golden(golden_text(before, gm), "eliminate_dead_code/before_after", golden_dir=GOLDEN)


def test_what_looks_inserted_and_has_no_origin_stays() -> None:
    gm = growing_graph(telemetry=False)
    LowerBlend()(gm)
    with gm.graph.inserting_before(gm.graph.output_node()):
        x = gm.graph.find_nodes(op="placeholder")[0]
        near = gm.graph.call_function(torch.ops.aten.neg.default, (x,))
    EliminateDeadCode()(gm)
    assert near in gm.graph.nodes


def test_the_same_node_with_an_origin_goes_and_takes_along_what_it_alone_reads() -> None:
    gm = growing_graph(telemetry=False)
    host = gm.graph.find_nodes(op="call_function", target=torch._C._nn.linear)[0]
    with gm.graph.inserting_before(gm.graph.output_node()):
        inner = gm.graph.call_function(torch.ops.aten.neg.default, (host,))
        outer = gm.graph.call_function(torch.ops.aten.abs.default, (inner,))
    for node in (inner, outer):
        inherit(node, host, "lower_blend")
    assert EliminateDeadCode()(gm).modified
    assert records_of(gm)[-1].op_counts == {"aten.abs.default": -1, "aten.neg.default": -1}
    assert host in gm.graph.nodes


def test_an_inserted_node_that_nothing_reads_and_that_writes_stays() -> None:
    gm = growing_graph()
    LowerBlend()(gm)
    PlaceTelemetry()(gm)
    EliminateDeadCode()(gm)
    (write,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    assert not write.users
    assert origin_of(write) is not None


@pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: case.name)
def test_eliminating_again_changes_nothing(case: Case) -> None:
    gm = capture(case.model(), case.x())
    LowerBlend()(gm)
    assert EliminateDeadCode()(gm).modified
    assert_leaves_alone(EliminateDeadCode(), gm)


@pytest.mark.parametrize("case", ["lower_blend/two_classes", "lower_blend/non_divisible"])
def test_what_is_left_computes_what_the_reference_does(case: str) -> None:
    assert_reference_after(case, LowerBlend(), EliminateDeadCode())
