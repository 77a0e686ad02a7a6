"""A layer without a slot is its base."""

from __future__ import annotations

from typing import Any

import torch
from graph_cases import dormant_graph, growing_graph
from torch import Tensor, nn

from kasmina_fx import find_matches, rewrite
from kasmina_fx.passes.eliminate_dormant import EliminateDormant


def test_dormant_elimination_takes_the_marker_and_leaves_growing_ones() -> None:
    gm = dormant_graph()
    assert EliminateDormant()(gm).modified
    assert [match.is_blend for match in find_matches(gm)] == [False]
    observe: Any = find_matches(gm)[0].node
    assert observe.args[0].target is torch._C._nn.linear
    assert observe.args[1] is None
    assert not EliminateDormant()(growing_graph()).modified


def test_a_marker_whose_second_output_is_returned_stays() -> None:
    class Both(nn.Module):
        def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
            out, notes = torch.ops.kasmina.blend.default(
                y, [], [], [], [], [], [], "dim=-1 runs=4x3", ""
            )
            return out, notes

    gm = torch.fx.symbolic_trace(Both())
    result = rewrite(gm, [torch.randn(2, 12)])
    assert not result.modified
    notes = result.graph_module(torch.ones(2, 12))[1]
    assert notes.tolist() == [[0.0] * 4, [-1.0] * 4, [0.0] * 4]
