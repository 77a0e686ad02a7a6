"""Blend markers become chunked subgraphs."""

from __future__ import annotations

import pytest
import torch
from graph_cases import growing_graph
from torch import Tensor, nn

from kasmina_fx import find_matches, op_counts
from kasmina_fx.passes import passes_for, run_passes
from kasmina_fx.passes.lower_blend import LowerBlend


def test_lowering_inserts_one_of_each_move_a_bank() -> None:
    gm = growing_graph(telemetry=False)
    assert LowerBlend()(gm).modified
    counts = op_counts(gm)
    assert counts["kasmina.gather.default"] == 1
    assert counts["kasmina.pull.default"] == 4  # outcomes, which are finite, which faulty, losses
    assert counts["kasmina.guard.default"] == counts["kasmina.reconstruct.default"] == 1
    assert counts["aten.bmm.default"] == 2
    assert not find_matches(gm)


@pytest.mark.parametrize(
    ("chunks", "shape", "dtype", "reason"),
    [
        ("dim=-1 runs=4x3", (2, 11), torch.float32, "11 features, its layout 12"),
        ("dim=2 runs=4x3", (2, 12), torch.float32, "no feature dim 2"),
        ("dim=-1 runs=4x3", (2, 12), torch.int64, "not floating point"),
    ],
)
def test_a_near_miss_is_left_with_its_reason(
    chunks: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str
) -> None:
    class Near(nn.Module):
        def forward(self, y: Tensor, telemetry: Tensor) -> Tensor:
            torch.ops.kasmina.observe.default(y, None, telemetry, chunks)
            return y

    graph = torch.fx.symbolic_trace(Near())
    assert "example_inputs" in str(find_matches(graph)[0].reason)
    for node, value in zip(
        graph.graph.find_nodes(op="placeholder"),
        (torch.zeros(shape, dtype=dtype), torch.zeros(5, 4)),
        strict=True,
    ):
        node.meta["val"] = value
    assert reason in str(find_matches(graph)[0].reason)
    assert not run_passes(graph, passes_for()).modified


def test_an_unregistered_blueprint_is_a_reason_not_a_crash() -> None:
    gm = growing_graph()
    match = find_matches(gm)[0]
    match.node.args = (*match.node.args[:-1], "unheard@0*4")
    assert "unheard" in str(find_matches(gm)[0].reason)
