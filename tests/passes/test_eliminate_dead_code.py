"""Of the inserted nodes what is used stays."""

from __future__ import annotations

import torch
from graph_cases import GOLDEN, growing_graph, spelled_as_torch_2_13

from kasmina_fx.passes.eliminate_dead_code import EliminateDeadCode
from kasmina_fx.passes.infra.pass_base import node_counts
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.testing import assert_golden


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


@spelled_as_torch_2_13
def test_golden() -> None:
    gm = growing_graph(telemetry=False)
    LowerBlend()(gm)
    before = node_counts(gm)
    EliminateDeadCode()(gm)
    gone = before - node_counts(gm)
    lines = [f"-{count} {target}" for target, count in sorted(gone.items())]
    assert_golden("\n".join(lines) + "\n", "eliminate_dead_code/one_class", golden_dir=GOLDEN)


def test_what_looks_inserted_and_has_no_origin_stays() -> None:
    gm = growing_graph(telemetry=False)
    LowerBlend()(gm)
    with gm.graph.inserting_before(gm.graph.output_node()):
        x = gm.graph.find_nodes(op="placeholder")[0]
        near = gm.graph.call_function(torch.ops.aten.neg.default, (x,))
    EliminateDeadCode()(gm)
    assert near in gm.graph.nodes
