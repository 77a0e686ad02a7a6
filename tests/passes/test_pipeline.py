"""The standing tests of every pass: near misses, idempotence, contracts, isolation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import CASES, Case, OneLayer, layer_of, wrapped
from torch import Tensor, nn
from torch.fx import GraphModule

from kasmina_fx import capture, find_matches, graph_text, op_counts, rewrite
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes import DEFAULT_PASSES, GraphPass, passes_for, run_passes
from kasmina_fx.passes.choose_lowerings import ChooseLowerings
from kasmina_fx.passes.eliminate_dead_code import EliminateDeadCode
from kasmina_fx.passes.eliminate_dormant import EliminateDormant
from kasmina_fx.passes.infra.metadata import lowering_of, origin_of, value_of
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.passes.normalize_markers import NormalizeMarkers
from kasmina_fx.passes.place_telemetry import PlaceTelemetry
from kasmina_fx.passes.verify import Verify, writes_to
from kasmina_fx.physical.markers import BLEND, OBSERVE
from kasmina_fx.testing import graft

each_pass = pytest.mark.parametrize("step", DEFAULT_PASSES, ids=lambda step: step.name)


def growing(telemetry: bool = True) -> GraphModule:
    model = wrapped(OneLayer(), telemetry=telemetry)
    graft(layer_of(model), [0, 2])
    return capture(model, torch.randn(3, 8))


def dormant() -> GraphModule:
    return capture(wrapped(OneLayer(), telemetry=True), torch.randn(3, 8))


def test_a_graph_without_markers_is_the_same_object() -> None:
    gm = capture(OneLayer(), torch.randn(3, 8))
    for result in (rewrite(gm), run_passes(gm)):
        assert result.graph_module is gm
        assert not result.modified


def test_rewrite_leaves_the_captured_graph_alone() -> None:
    gm = growing()
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


def test_normalize_turns_packets_and_keywords_into_the_normal_form() -> None:
    gm = growing()
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


def test_lowerings_are_chosen_with_their_reason() -> None:
    chosen = {}
    for name, gm in {"growing": growing(), "dormant": dormant()}.items():
        ChooseLowerings()(gm)
        chosen[name] = [lowering_of(match.node) for match in find_matches(gm)]
    names = {name: [low.name for low in found if low] for name, found in chosen.items()}
    assert names == {"growing": ["matmul", "statistics"], "dormant": ["dormant", "statistics"]}
    forced = ChooseLowerings(lowering="matmul").choose(find_matches(growing())[0])
    assert forced.why == "forced by the option"


def test_dormant_elimination_takes_the_marker_and_leaves_growing_ones() -> None:
    gm = dormant()
    assert EliminateDormant()(gm).modified
    assert [match.is_blend for match in find_matches(gm)] == [False]
    observe: Any = find_matches(gm)[0].node
    assert observe.args[0].target is torch._C._nn.linear
    assert observe.args[1] is None
    assert not EliminateDormant()(growing()).modified


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


def test_lowering_inserts_one_of_each_move_a_bank() -> None:
    gm = growing(telemetry=False)
    assert LowerBlend()(gm).modified
    counts = op_counts(gm)
    assert counts["kasmina.gather.default"] == 1
    assert counts["kasmina.pull.default"] == 4  # outcomes, which are finite, which faulty, losses
    assert counts["kasmina.guard.default"] == counts["kasmina.reconstruct.default"] == 1
    assert counts["aten.bmm.default"] == 2
    assert not find_matches(gm)


def test_telemetry_writes_once_and_last() -> None:
    gm = rewrite(growing()).graph_module
    inserted = [n for n in gm.graph.nodes if (o := origin_of(n)) and o.by == PlaceTelemetry.name]
    writes = [node for node in inserted if writes_to(node)]
    assert writes == inserted[-1:]


def test_dead_inserted_nodes_go_and_dead_host_nodes_stay() -> None:
    gm = growing(telemetry=False)
    with gm.graph.inserting_before(gm.graph.output_node()):
        dead = gm.graph.call_function(torch.neg, (gm.graph.find_nodes(op="placeholder")[0],))
    LowerBlend()(gm)
    before = len(gm.graph.nodes)
    assert EliminateDeadCode()(gm).modified
    assert len(gm.graph.nodes) < before
    assert dead in gm.graph.nodes
    assert not EliminateDeadCode()(gm).modified


def test_verify_refuses_a_host_that_reads_statistics() -> None:
    gm = rewrite(growing()).graph_module
    stack = [n for n in gm.graph.nodes if n.target is torch.ops.aten.stack.default][-1]
    out = gm.graph.output_node()
    with gm.graph.inserting_before(out):
        leak = gm.graph.call_function(torch.add, (out.args[0][0], stack))
    out.args = ((leak,),)
    with pytest.raises(RewriteError, match="statistics must not reach"):
        Verify()(gm)


def test_verify_refuses_a_write_in_a_blend_and_to_the_host() -> None:
    for by in ("lower_blend", "place_telemetry"):
        gm = rewrite(growing()).graph_module
        inserted = [n for n in gm.graph.nodes if (o := origin_of(n)) and o.by == by]
        host = next(n for n in gm.graph.nodes if n.target is torch._C._nn.linear)
        with gm.graph.inserting_after(inserted[0]):
            write = gm.graph.call_function(torch.ops.aten.copy_.default, (host, host))
        write.meta.update(inserted[0].meta)
        with pytest.raises(RewriteError, match="writes to"):
            Verify()(gm)


def test_verify_refuses_a_blend_that_leaks_and_one_that_spies() -> None:
    gm = rewrite(growing()).graph_module
    inner = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default)
    out = gm.graph.output_node()
    with gm.graph.inserting_before(out):
        leak = gm.graph.call_function(torch.sum, (inner,))
    out.args = ((*out.args[0], leak),)
    with pytest.raises(RewriteError, match="not isolated: the host reads"):
        Verify()(gm)
    gm = rewrite(growing()).graph_module
    inner = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default)
    x = next(n for n in gm.graph.find_nodes(op="placeholder") if value_of(n).shape == (3, 8))
    inner.args = (x, inner.args[1])
    with pytest.raises(RewriteError, match="not isolated: it reads of the host"):
        Verify()(gm)


def test_verify_refuses_an_inserted_node_without_a_value() -> None:
    gm = rewrite(growing()).graph_module
    node = next(n for n in gm.graph.nodes if origin_of(n) is not None)
    assert value_of(node) is not None
    for key in ("val", "example_value"):
        node.meta.pop(key, None)
    with pytest.raises(RewriteError, match="carries no value"):
        Verify()(gm)


def test_postconditions_catch_a_broken_pass() -> None:
    gm = growing()
    with pytest.raises(RewriteError, match="lower_blend left"):
        LowerBlend().ensures(gm)
    find_matches(gm)[0].node.target = torch.ops.kasmina.blend
    with pytest.raises(RewriteError, match="normal form"):
        NormalizeMarkers().ensures(gm)


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
    gm = growing()
    match = find_matches(gm)[0]
    match.node.args = (*match.node.args[:-1], "unheard@0*4")
    assert "unheard" in str(find_matches(gm)[0].reason)
