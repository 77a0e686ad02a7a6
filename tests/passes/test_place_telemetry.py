"""Statistics are written once, behind the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_cases import (
    Case,
    assert_leaves_alone,
    assert_reference_after,
    dormant_graph,
    each_case_of,
    each_frontend,
    golden_tests_of,
    growing_graph,
    layer_of,
    plain_graph,
    wrapped,
)
from telemetry_cases import expected_of, summary
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from kasmina_fx import capture, find_matches, reference, rewrite
from kasmina_fx._torch.tracing import written_by
from kasmina_fx.passes import passes_for, records_of, run_passes
from kasmina_fx.passes.eliminate_dormant import EliminateDormant
from kasmina_fx.passes.infra.metadata import origin_of
from kasmina_fx.passes.place_telemetry import PlaceTelemetry

each_case = each_case_of("place_telemetry")


def test_telemetry_writes_once_and_last() -> None:
    gm = rewrite(growing_graph()).graph_module
    inserted = [n for n in gm.graph.nodes if (o := origin_of(n)) and o.by == PlaceTelemetry.name]
    writes = [node for node in inserted if written_by(node)]
    assert writes == inserted[-1:]


@each_case
@each_frontend
def test_a_marker_becomes_one_write_and_no_operator_of_ours(case: Case, frontend: str) -> None:
    gm = capture(case.model(), case.x(), frontend=frontend)
    if frontend == "export":
        assert not PlaceTelemetry()(gm).modified
        return
    (blend, marker) = (match.node for match in find_matches(gm))
    written = marker.args[2]
    assert PlaceTelemetry()(gm).modified
    counts = records_of(gm)[-1].op_counts
    assert {op: n for op, n in counts.items() if op.startswith("kasmina.")} == {
        "kasmina.observe.default": -1
    }
    assert counts["aten.copy_.default"] == 1
    (write,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    assert written_by(write) == [written]
    assert [match.node for match in find_matches(gm)] == [blend]


def order_of(after: Callable[[Tensor], Tensor]) -> list[str]:
    """Return what stands behind a layer in a rewritten graph: the host's nodes and the write."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return after(self.fc(x))

    gm = capture(wrapped(Model(), seeds=4, telemetry=True), torch.randn(3, 8), frontend="dynamo")
    nodes = [n for n in rewrite(gm).graph_module.graph.nodes if n.op.startswith("call")]
    return [
        "write" if origin else node.name
        for node in nodes[1:]
        if (origin := origin_of(node)) is None or written_by(node)
    ]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (functional.gelu, ["gelu", "write"]),
        (lambda y: functional.relu(y).exp_(), ["relu", "write", "exp_"]),
        (
            lambda y: 0.5 * y * (1.0 + torch.tanh(y + y.pow(3))),
            ["mul", "pow_1", "add", "write", "tanh", "add_1", "mul_1"],
        ),
        (lambda y: torch.tanh(y) @ y.T, ["write", "tanh", "getattr_1", "matmul"]),  # a view of it
        (lambda y: torch.tanh(y).sum() + y, ["write", "tanh", "sum_1", "add"]),
        (lambda y: functional.relu(y, inplace=True), ["write", "relu"]),
        (lambda y: y.view(4, 9).tanh(), ["write", "view", "tanh"]),
        (lambda y: torch.softmax(y, -1), ["write", "softmax"]),
    ],
)
def test_statistics_stand_behind_the_pointwise_readers_of_an_output(
    after: Callable[[Tensor], Tensor], expected: list[str]
) -> None:
    assert order_of(after) == expected


def test_a_graph_without_markers_is_the_same_object() -> None:
    assert_leaves_alone(PlaceTelemetry(), plain_graph())


def test_a_layer_without_telemetry_is_left_alone() -> None:
    assert_leaves_alone(PlaceTelemetry(), growing_graph(telemetry=False))


NEAR = pytest.mark.parametrize(
    ("chunks", "shape", "dtype", "reason"),
    [
        ("dim=-1 runs=4x3", (2, 11), torch.float32, "11 features, its layout 12"),
        ("dim=2 runs=4x3", (2, 12), torch.float32, "no feature dim 2"),
        ("dim=-1 runs=4x3", (2, 12), torch.int64, "not floating point"),
        ("dim=-1 runs=4x3", (0, 12), torch.float32, "the output is empty"),
    ],
)


def near_observe(chunks: str) -> GraphModule:
    """An observe marker and nothing else; as symbolic_trace leaves it, without shapes."""

    class Near(nn.Module):
        def forward(self, y: Tensor, telemetry: Tensor) -> Tensor:
            torch.ops.kasmina.observe.default(y, None, telemetry, chunks)
            return y

    return torch.fx.symbolic_trace(Near())


@NEAR
def test_a_near_miss_is_left_with_its_reason(
    chunks: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str
) -> None:
    graph = near_observe(chunks)
    assert "example_inputs" in str(find_matches(graph)[0].reason)
    assert_leaves_alone(PlaceTelemetry(), near_observe(chunks))
    for node, value in zip(
        graph.graph.find_nodes(op="placeholder"),
        (torch.zeros(shape, dtype=dtype), torch.zeros(5, 4)),
        strict=True,
    ):
        node.meta["val"] = value
    assert reason in str(find_matches(graph)[0].reason)
    assert not run_passes(graph, passes_for()).modified
    assert_leaves_alone(PlaceTelemetry(), graph)


def test_placing_again_changes_nothing() -> None:
    for gm in (growing_graph(), dormant_graph()):
        assert PlaceTelemetry()(gm).modified
        assert_leaves_alone(PlaceTelemetry(), gm)


def test_the_statistics_do_not_change_what_the_reference_computes() -> None:
    assert_reference_after("place_telemetry/growing", PlaceTelemetry())
    assert_reference_after("place_telemetry/dormant", PlaceTelemetry())
    # Without notes: the blend is gone before.
    assert_reference_after("place_telemetry/dormant", EliminateDormant(), PlaceTelemetry())


@each_case
def test_the_buffer_holds_statistics_of_the_references_output(case: Case) -> None:
    model = case.model().double()
    layer = layer_of(model)
    steps = [case.x(batch).double() for batch in (3, 7)]
    outputs = [reference.forward(layer, x).detach() for x in steps]
    gm = capture(model, case.x().double(), frontend="fx")
    layout = find_matches(gm)[0].chunks
    assert PlaceTelemetry()(gm).modified
    for x in steps:
        gm(x)
    accumulated = model.get_buffer("fc.kasmina.telemetry.accumulated")
    mean, variance = expected_of(outputs, layout)
    found = summary(accumulated)
    assert found["count"].tolist() == [10 * size for size in layer.chunks.sizes]
    torch.testing.assert_close(found["mean"].double(), torch.tensor(mean).double(), msg="mean")
    torch.testing.assert_close(found["variance"].double(), torch.tensor(variance).double())


test_golden_of_dynamos_graph, test_golden_of_inserted_nodes_is_one_for_all_front_ends = (
    golden_tests_of("place_telemetry")
)
