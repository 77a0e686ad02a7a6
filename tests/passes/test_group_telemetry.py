"""Statistics of several layers are one call, where nothing can come between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_cases import GOLDEN, TwoLayers, assert_leaves_alone, growing_graph, layer_of, wrapped
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kasmina_fx import capture, kasmina_layers
from kasmina_fx._torch.tracing import written_by
from kasmina_fx.graphs.text import graph_text
from kasmina_fx.lowerings.sample import OBSERVE_ROWS, TOGETHER
from kasmina_fx.passes import passes_for, records_of, run_passes
from kasmina_fx.passes.group_telemetry import GroupTelemetry, _Call
from kasmina_fx.passes.infra.metadata import inherit
from kasmina_fx.passes.infra.writing import may_write
from kasmina_fx.passes.place_telemetry import PlaceTelemetry
from kasmina_fx.testing import RecordingBackend, assert_golden, graft


class Layers(nn.Module):
    """Some layers one after the other, with something between the first and the second."""

    def __init__(self, count: int, between: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.layers
        x = self.between(first(x))
        for layer in others:
            x = layer(x)
        return x


def captured(model: nn.Module) -> GraphModule:
    return capture(wrapped(model, telemetry=True), torch.randn(3, 8), frontend="dynamo")


def calls(gm: GraphModule) -> list[Node]:
    return gm.graph.find_nodes(op="call_function", target=OBSERVE_ROWS)


def layers_of_calls(gm: GraphModule) -> list[int]:
    """Run the pipeline; return how many layers each call is for."""
    run_passes(gm)
    return [len(node.args[0]) for node in calls(gm)]  # type: ignore[arg-type]  # a list


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [1]), (2, [2]), (TOGETHER, [TOGETHER]), (2 * TOGETHER + 1, [TOGETHER, TOGETHER, 1])],
)
def test_layers_that_follow_one_another_share_a_call(count: int, expected: list[int]) -> None:
    gm = captured(Layers(count))
    assert layers_of_calls(gm) == expected
    counts = next(r.op_counts for r in records_of(gm) if r.name == GroupTelemetry.name)
    fewer = len(expected) - count
    assert counts == ({"kasmina.observe_rows.default": fewer} if fewer else {})


@torch.library.custom_op("kasmina_tests::double", mutates_args={"x"})
def double(x: Tensor) -> None:
    x.mul_(2)


def _doubled(x: Tensor) -> Tensor:
    double(x)
    return x


def _set(x: Tensor) -> Tensor:
    x[0] = 1.0
    return x


def _added(x: Tensor) -> Tensor:
    x += 1.0
    return x


def _filled(x: Tensor) -> Tensor:
    numbers = x.detach().numpy()
    numbers.fill(7.0)
    return x


def _looked_up(x: Tensor, **how: Any) -> Tensor:
    return x + F.embedding(torch.tensor([0, 1, 2]), x.detach(), **how)


MEAN, VARIANCE = torch.zeros(8), torch.ones(8)


def _normed(x: Tensor, mean: Tensor) -> Tensor:
    return F.batch_norm(x, mean, VARIANCE, training=True)


WRITING: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.mul_(2),
    "function": lambda x: torch.relu_(x),
    "inplace": lambda x: F.relu(x, inplace=True),
    "inplace by position": lambda x: F.dropout(x, 0.5, True, True),
    "item": _set,
    "augmented": _added,
    "operator": _doubled,
    "overload": lambda x: torch.ops.aten.add_.Tensor(x, 1.0),
    "packet": lambda x: torch.ops.aten.add_(x, 1.0),
    "out": lambda x: torch.add(x.detach(), 1.0, out=torch.empty(3, 8)),
    "numpy": _filled,
    "norms of rows": lambda x: _looked_up(x, max_norm=1.0),
    "running mean": lambda x: _normed(x, x.detach()[0]),
    "running mean, in C": lambda x: torch.batch_norm(
        x, None, None, x.detach()[0], VARIANCE, True, 0.1, 1e-5, False
    ),
}
READING: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "view": lambda x: x.view(-1).view(3, 8).transpose(0, 1).t(),
    "norm": lambda x: F.layer_norm(x, (8,)),
    "arithmetic": lambda x: x + 2 * x.pow(2),
    "lookup": _looked_up,
    "batch norm": lambda x: _normed(x, MEAN),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "overload": lambda x: torch.ops.aten.add.Tensor(x, 1.0),
    "size": lambda x: x.reshape(x.shape[0], x.size(1)).abs().__add__(1),
}


@pytest.mark.parametrize("name", WRITING)
def test_nothing_that_may_write_lies_between_the_layers_of_a_call(name: str) -> None:
    assert layers_of_calls(captured(Layers(3, WRITING[name]))) == [1, 2]


@pytest.mark.parametrize("name", READING)
def test_what_only_reads_may_lie_between(name: str) -> None:
    assert layers_of_calls(captured(Layers(3, READING[name]))) == [3]


def test_a_module_that_is_called_may_write() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    assert [node.op for node in gm.graph.nodes if may_write(node)] == ["call_module"]


def test_layers_of_a_call_are_on_one_device() -> None:
    gm = captured(Layers(2))
    run_passes(gm, passes_for(disabled=[GroupTelemetry.name]))
    first, second = (_Call.of(node) for node in calls(gm))
    assert second.fits([first])
    assert not second._replace(device=torch.device("meta")).fits([first])


def test_nothing_moves_past_a_change_of_streams() -> None:
    graph = torch.fx.Graph()
    assert may_write(graph.call_function(torch.cuda.set_stream, (None,)))
    assert not may_write(graph.call_function(torch.cuda.is_available))


def test_a_layer_that_is_called_twice_has_two_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))  # type: ignore[no-any-return]

    assert layers_of_calls(captured(Twice())) == [1, 1]


def test_a_graph_without_two_of_them_is_left_alone() -> None:
    gm = growing_graph()
    PlaceTelemetry()(gm)
    assert_leaves_alone(GroupTelemetry(), gm)


def model_of_two() -> Any:
    torch.manual_seed(0)
    model = wrapped(TwoLayers(), seeds=4, telemetry=True)
    graft(layer_of(model, "up"), [0, 2], "affine")
    return model


def test_golden_of_two_layers() -> None:
    gm = capture(model_of_two(), torch.randn(3, 8))
    run_passes(gm)
    assert_golden(graph_text(gm), "group_telemetry/two_layers", golden_dir=GOLDEN)


def test_a_layer_to_whose_statistics_anything_else_writes_has_its_own_call() -> None:
    """As plain statistics do, where a layer is called again in a dtype without a kernel."""
    gm = captured(Layers(3))
    run_passes(gm, passes_for(disabled=[GroupTelemetry.name]))
    first, second, _ = calls(gm)
    (buffer,) = written_by(first)
    with gm.graph.inserting_after(second):
        copied = gm.graph.call_function(torch.ops.aten.copy_.default, (buffer, buffer))
    inherit(copied, second, "place_telemetry")
    GroupTelemetry()(gm)
    assert [len(node.args[0]) for node in calls(gm)] == [1, 2]  # type: ignore[arg-type]  # a list


class Read(nn.Module):
    """Two layers, between which the forward reads what was measured of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        measured: Any = self.first
        counts = measured.kasmina.telemetry.accumulated[0] + 0
        return self.second(y), counts


@pytest.mark.untraced
def test_statistics_that_the_forward_reads_are_there_when_it_does() -> None:
    model = wrapped(Read(), telemetry=True)
    run = torch.compile(model, backend=RecordingBackend("eager"), fullgraph=True)
    for step in range(1, 3):
        seen: Any = run(torch.randn(3, 8))[1]
        assert seen.tolist() == [step * 3 * 8 / seen.numel()] * seen.numel()


@pytest.mark.untraced
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_statistics_are_those_of_a_call_a_layer_to_the_bit(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Layers(5)
        model.layers[3], model.layers[4] = nn.Linear(8, 7), nn.Linear(7, 8)  # two runs of chunks
        wrapped(model, telemetry=True)
        for layer in kasmina_layers(model).values():
            graft(layer, [1], "affine")
        run = torch.compile(model, backend=RecordingBackend(backend), fullgraph=True)
        for _ in range(3):
            run(torch.randn(5, 8) * 3).sum().backward()
        return {n: b.clone() for n, b in model.named_buffers() if n.endswith("accumulated")}

    together = found()
    monkeypatch.setattr("kasmina_fx.passes.group_telemetry.TOGETHER", 1)
    torch._dynamo.reset()
    alone = found()
    assert len(alone) == 5
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert all(bool(counts.any()) for counts in alone.values())
