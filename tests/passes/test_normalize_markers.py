"""One spelling of a marker, whatever the front end recorded."""

from __future__ import annotations

import torch
from graph_cases import GOLDEN, growing_graph, spelled_as_torch_2_13
from torch.fx import GraphModule

from kasmina_fx import find_matches, graph_text, rewrite
from kasmina_fx.passes.normalize_markers import NormalizeMarkers
from kasmina_fx.physical.markers import BLEND, OBSERVE
from kasmina_fx.testing import assert_golden


def test_normalize_turns_packets_and_keywords_into_the_normal_form() -> None:
    gm = growing_graph()
    for node in gm.graph.nodes:
        if node.target is BLEND:
            names = [a.name for a in BLEND._schema.arguments]
            node.kwargs = dict(zip(names[1:], node.args[1:], strict=True))
            node.args, node.target = node.args[:1], torch.ops.kasmina.blend
        elif node.target is OBSERVE:
            node.target = torch.ops.kasmina.observe
    assert len(find_matches(gm)) == 2
    assert NormalizeMarkers()(gm).modified
    assert not NormalizeMarkers()(gm).modified
    markers = [match.node for match in find_matches(gm)]
    assert [node.target for node in markers] == [BLEND, OBSERVE]
    assert not any(node.kwargs for node in markers)
    assert rewrite(gm).modified


def spelled_otherwise() -> GraphModule:
    """As a front end records markers that were called as packets, with keywords."""
    gm = growing_graph()
    for node in gm.graph.nodes:
        if node.target is BLEND:
            names = [a.name for a in BLEND._schema.arguments]
            node.kwargs = dict(zip(names[1:], node.args[1:], strict=True))
            node.args, node.target = node.args[:1], torch.ops.kasmina.blend
    return gm


@spelled_as_torch_2_13
def test_golden() -> None:
    gm = spelled_otherwise()
    before = graph_text(gm)
    NormalizeMarkers()(gm)
    text = f"before\n{before}\nafter\n{graph_text(gm)}"
    assert_golden(text, "normalize_markers/packet_with_keywords", golden_dir=GOLDEN)


def test_a_graph_in_its_normal_form_is_left_alone() -> None:
    gm = growing_graph()
    assert not NormalizeMarkers()(gm).modified
    assert graph_text(gm) == graph_text(growing_graph())
