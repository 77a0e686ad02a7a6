"""The pipeline as a whole: unmatched graphs, idempotence, contracts of every pass."""

from __future__ import annotations

import pytest
import torch
from graph_cases import CASES, Case, OneLayer, growing_graph
from torch import Tensor, nn

from kasmina_fx import capture, find_matches, graph_text, rewrite
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes import DEFAULT_PASSES, GraphPass, run_passes
from kasmina_fx.passes.infra.metadata import origin_of, value_of
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.passes.normalize_markers import NormalizeMarkers

each_pass = pytest.mark.parametrize("step", DEFAULT_PASSES, ids=lambda step: step.name)


def test_a_graph_without_markers_is_the_same_object() -> None:
    gm = capture(OneLayer(), torch.randn(3, 8))
    for result in (rewrite(gm), run_passes(gm)):
        assert result.graph_module is gm
        assert not result.modified


def test_rewrite_leaves_the_captured_graph_alone() -> None:
    gm = growing_graph()
    text = graph_text(gm)
    assert rewrite(gm).graph_module is not gm
    assert graph_text(gm) == text


@each_pass
def test_no_pass_changes_a_graph_from_something_else(step: GraphPass) -> None:
    class Near(nn.Module):  # an operator with a similar name, and no marker
        def forward(self, y: Tensor, index: Tensor) -> Tensor:
            out: Tensor = torch.ops.kasmina.pull.default(y, index, index)
            return out

    gm = torch.fx.symbolic_trace(Near())
    code = gm.code
    assert not step(gm).modified
    assert gm.code == code


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pipeline_is_idempotent_and_every_inserted_node_has_its_metadata(case: Case) -> None:
    once = rewrite(capture(case.model(), case.x())).graph_module
    again = run_passes(once)
    assert not again.modified
    inserted = [node for node in once.graph.nodes if origin_of(node) is not None]
    assert all(value_of(node) is not None for node in inserted)
    assert all("stack_trace" in node.meta and "nn_module_stack" in node.meta for node in inserted)
    assert not find_matches(once)


def test_postconditions_catch_a_broken_pass() -> None:
    gm = growing_graph()
    with pytest.raises(RewriteError, match="lower_blend left"):
        LowerBlend().ensures(gm)
    find_matches(gm)[0].node.target = torch.ops.kasmina.blend
    with pytest.raises(RewriteError, match="normal form"):
        NormalizeMarkers().ensures(gm)
