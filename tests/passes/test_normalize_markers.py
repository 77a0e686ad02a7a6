"""One spelling of a marker, whatever the front end recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import (
    GOLDEN,
    assert_leaves_alone,
    assert_reference_after,
    growing_graph,
    plain_graph,
    spelled_as_torch_2_13,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from kasmina_fx import find_matches, graph_text, rewrite
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes import records_of
from kasmina_fx.passes.normalize_markers import NormalizeMarkers
from kasmina_fx.physical.markers import BLEND, OBSERVE
from kasmina_fx.testing import assert_golden


def spell_otherwise(gm: GraphModule, observe: bool = False) -> GraphModule:
    """As a front end records markers that were called as packets, blends with keywords."""
    for node in gm.graph.nodes:
        if node.target is BLEND:
            names = [a.name for a in BLEND._schema.arguments]
            node.kwargs = dict(zip(names[1:], node.args[1:], strict=True))
            node.args, node.target = node.args[:1], torch.ops.kasmina.blend
        elif observe and node.target is OBSERVE:
            node.target = torch.ops.kasmina.observe
    gm.recompile()
    return gm


def test_normalize_turns_packets_and_keywords_into_the_normal_form() -> None:
    gm = spell_otherwise(growing_graph(), observe=True)
    assert len(find_matches(gm)) == 2
    assert NormalizeMarkers()(gm).modified
    (record,) = records_of(gm)
    assert record.op_counts == {
        "kasmina.blend": -1,
        "kasmina.blend.default": 1,
        "kasmina.observe": -1,
        "kasmina.observe.default": 1,
    }
    assert not NormalizeMarkers()(gm).modified
    markers = [match.node for match in find_matches(gm)]
    assert [node.target for node in markers] == [BLEND, OBSERVE]
    assert not any(node.kwargs for node in markers)
    assert rewrite(gm).modified


@pytest.mark.parametrize("position", [0, 1])
def test_an_overload_with_one_keyword_is_normalized_without_new_nodes(position: int) -> None:
    gm = growing_graph()
    node = find_matches(gm)[position].node
    last = node.target._schema.arguments[-1].name  # type: ignore[union-attr]  # an overload
    given = node.args
    node.kwargs, node.args = {last: given[-1]}, given[:-1]
    nodes = list(gm.graph.nodes)
    assert NormalizeMarkers()(gm).modified
    assert (node.args, node.kwargs) == (given, {})
    assert list(gm.graph.nodes) == nodes
    assert records_of(gm)[-1].op_counts == {}


def test_a_graph_without_markers_is_the_same_object() -> None:
    assert_leaves_alone(NormalizeMarkers(), plain_graph())


def test_another_operator_as_packet_with_keywords_is_left_alone() -> None:
    class Near(nn.Module):
        def forward(self, y: Tensor, index: Tensor) -> Tensor:
            out: Tensor = torch.ops.kasmina.pull(y, positions=index, seeds=index, dim=-1)
            return out

    gm = torch.fx.symbolic_trace(Near())
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.kasmina.pull)
    assert_leaves_alone(NormalizeMarkers(), gm)
    assert sorted(node.kwargs) == ["dim", "positions", "seeds"]


def test_a_graph_in_its_normal_form_is_left_alone() -> None:
    gm = growing_graph()
    assert not NormalizeMarkers()(gm).modified
    assert graph_text(gm) == graph_text(growing_graph())


def test_normalizing_again_changes_nothing() -> None:
    gm = spell_otherwise(growing_graph(), observe=True)
    assert NormalizeMarkers()(gm).modified
    assert_leaves_alone(NormalizeMarkers(), gm)


@pytest.mark.parametrize("case", ["lower_blend/two_classes", "place_telemetry/growing"])
def test_a_normalized_graph_computes_what_the_reference_does(case: str) -> None:
    def otherwise(gm: GraphModule) -> Any:
        return spell_otherwise(gm, observe=True)

    assert_reference_after(case, otherwise, NormalizeMarkers())


def test_a_spelling_that_is_left_is_an_error() -> None:
    gm = growing_graph()
    find_matches(gm)[0].node.target = torch.ops.kasmina.blend
    with pytest.raises(RewriteError, match="normal form"):
        NormalizeMarkers().ensures(gm)


@spelled_as_torch_2_13
def test_golden() -> None:
    gm = spell_otherwise(growing_graph())
    before = graph_text(gm)
    NormalizeMarkers()(gm)
    text = f"before\n{before}\nafter\n{graph_text(gm)}"
    assert_golden(text, "normalize_markers/packet_with_keywords", golden_dir=GOLDEN)
