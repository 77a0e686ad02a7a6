"""Small models in known states, whose graphs the golden files hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kasmina_fx import (
    ChunkedKasminaLayer,
    KasminaLayer,
    TelemetryPolicy,
    capture,
    kasminify,
)
from kasmina_fx.graphs.capture import FRONTENDS
from kasmina_fx.graphs.diff import graph_diff
from kasmina_fx.graphs.text import graph_text, inserted_text
from kasmina_fx.passes import GraphPass, find_matches, passes_for, records_of, rewrite
from kasmina_fx.passes.infra.matching import graph_modules
from kasmina_fx.passes.infra.metadata import set_value, value_of
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import assert_golden, graft

GOLDEN = Path(__file__).parents[2] / "golden"
#: The pipeline of most goldens: what is inserted where there are no kernels, or not for a dtype.
PLAIN = passes_for("matmul")
#: For goldens that hold nodes of torch's own: each release spells some in its way.
spelled_as_torch_2_13 = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="the nodes are spelled as torch 2.13 does"
)


class OneLayer(nn.Module):
    """A linear layer and a GELU."""

    def __init__(self, features: int = 12) -> None:
        super().__init__()
        self.fc = nn.Linear(8, features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.fc(x))


class TwoLayers(nn.Module):
    """Two linear layers, each with a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.down(nn.functional.gelu(self.up(x))))


class Convolution(nn.Module):
    """A convolution and a ReLU: features along dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


@dataclass(frozen=True)
class Case:
    """A golden case: its file, the model, an input, and what the passes should find."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    banks: int  # banks of all layers
    markers: int  # blend and observe markers of all layers

    def model(self) -> nn.Module:
        """The same model with the same numbers at each call."""
        torch.manual_seed(0)
        model = self.build()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return model

    def x(self, batch: int | None = None) -> Tensor:
        """An input, of another batch size if wanted."""
        torch.manual_seed(1)
        return torch.randn(batch or self.shape[0], *self.shape[1:])


def wrapped(
    model: nn.Module, seeds: int = 4, telemetry: bool | TelemetryPolicy = False, **kwargs: Any
) -> nn.Module:
    """Kasminified but not compiled."""
    made: nn.Module = kasminify(
        model, num_seeds=seeds, telemetry=telemetry, compile=False, **kwargs
    )
    return made


def layer_of(model: nn.Module, name: str = "fc") -> KasminaLayer:
    """A layer by name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, KasminaLayer)
    return layer


def one_class() -> nn.Module:
    model = wrapped(OneLayer())
    graft(layer_of(model), [0, 2], "mlp")
    return model


def two_classes() -> nn.Module:
    model = one_class()
    graft(layer_of(model), [1], "affine", alpha=0.25)
    return model


def shared_blueprint() -> nn.Module:
    model = wrapped(OneLayer())
    layer = layer_of(model)
    graft(layer, [0, 1, 3], layer.register_blueprint("mlp"))
    return model


def non_divisible() -> nn.Module:
    model = wrapped(OneLayer(), seeds=5)
    graft(layer_of(model), [0, 1, 4], "mlp")
    return model


def caller_sizes() -> nn.Module:
    model = OneLayer()
    model.fc = ChunkedKasminaLayer(  # type: ignore[assignment]  # it stands for the Linear
        model.fc, 5, "fc", False, chunk_sizes=[1, 1, 6, 2, 2]
    )
    graft(layer_of(model), [1, 2, 3], "mlp")
    return model


def telemetry_on() -> nn.Module:
    model = wrapped(OneLayer(), telemetry=True)
    graft(layer_of(model), [0, 2], "mlp")
    return model


def gradients_on() -> nn.Module:
    return wrapped(OneLayer(), telemetry=TelemetryPolicy(gradients=True))


def two_layers() -> nn.Module:
    model = one_of_two_layers()
    layer_of(model, "down").reserve(2, "mlp")
    return model


def one_of_two_layers() -> nn.Module:
    model = wrapped(TwoLayers(), seeds=3)
    graft(layer_of(model, "up"), [0, 1], "mlp")
    return model


def convolution() -> nn.Module:
    model = wrapped(Convolution(), targets=(nn.Conv2d,))
    graft(layer_of(model, "conv"), [0, 3], "mlp")
    return model


CASES = (
    Case("eliminate_dormant/dormant", lambda: wrapped(OneLayer()), (3, 8), 0, 1),
    Case("eliminate_dormant/one_of_two_layers", one_of_two_layers, (3, 8), 1, 2),
    Case("lower_blend/one_class", one_class, (3, 8), 1, 1),
    Case("lower_blend/two_classes", two_classes, (3, 8), 2, 1),
    Case("lower_blend/shared_blueprint", shared_blueprint, (3, 8), 1, 1),
    Case("lower_blend/non_divisible", non_divisible, (3, 8), 2, 1),
    Case("lower_blend/caller_sizes", caller_sizes, (3, 8), 3, 1),
    Case("lower_blend/convolution", convolution, (3, 3, 5, 5), 1, 1),
    Case("lower_blend/two_layers", two_layers, (3, 8), 2, 2),
    Case("place_telemetry/dormant", lambda: wrapped(OneLayer(), telemetry=True), (3, 8), 0, 2),
    Case("place_telemetry/growing", telemetry_on, (3, 8), 1, 2),
    Case("place_telemetry/gradients", gradients_on, (3, 8), 0, 2),
)

each_frontend = pytest.mark.parametrize("frontend", FRONTENDS)


def each_case_of(name: str) -> pytest.MarkDecorator:
    """Run a test with each golden case of a pass."""
    cases = [case for case in CASES if case.name.startswith(f"{name}/")]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def growing_graph(telemetry: bool = True) -> GraphModule:
    """A captured graph that no pass has seen."""
    model = wrapped(OneLayer(), telemetry=telemetry)
    graft(layer_of(model), [0, 2], "mlp")
    return capture(model, torch.randn(3, 8))


def dormant_graph() -> GraphModule:
    """A captured graph that no pass has seen."""
    return capture(wrapped(OneLayer(), telemetry=True), torch.randn(3, 8))


def plain_graph() -> GraphModule:
    """A captured graph without markers."""
    return capture(OneLayer(), torch.randn(3, 8))


#: What a marker's input may turn out to be, and why the marker then stays as it is.
NEAR_MISSES: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "narrow": (lambda y: y[:, :5], "the output has 5 features, its layout 12"),
    "scalar": (lambda y: y.sum(), "the output has 0 dimensions, no feature dim -1"),
    "empty": (lambda y: y[:0], "the output is empty"),
    "integers": (lambda y: y.long(), "the output is torch.int64, not floating point"),
    "unknown": (lambda y: None, "the graph holds no shapes; give rewrite() example_inputs"),
}
each_near_miss = pytest.mark.parametrize("near", NEAR_MISSES)


def near_miss(name: str) -> GraphModule:
    """A captured graph whose only marker, a blend with a bank, can't be rewritten."""
    gm = growing_graph(telemetry=False)
    y: Any = find_matches(gm)[0].node.args[0]
    set_value(y, NEAR_MISSES[name][0](value_of(y)), like=y)
    return gm


def nodes_of(gm: GraphModule) -> list[tuple[Any, ...]]:
    """All that a pass could change of the nodes of a graph and of those nested in it."""
    modules = graph_modules(gm)
    return [(n, n.op, n.target, n.args, n.kwargs) for m in modules for n in m.graph.nodes]


def assert_leaves_alone(step: GraphPass, gm: GraphModule) -> None:
    """A pass hands the same object back, with the same nodes, and says so."""
    before = nodes_of(gm)
    result = step(gm)
    assert result.graph_module is gm
    assert not result.modified
    assert nodes_of(gm) == before
    assert records_of(gm)[-1].op_counts == {}


def golden_text(before: GraphModule, after: GraphModule) -> str:
    counts = graph_diff(before, after).op_counts
    ops = "".join(f"{op} {count:+d}\n" for op, count in counts.items())
    return f"# before\n{graph_text(before)}\n# after\n{graph_text(after)}\n# ops\n{ops}"


def assert_golden_of_dynamos_graph(case: Case) -> None:
    """The golden file of a case: the graph before and after the pipeline."""
    before = capture(case.model(), case.x())
    result = rewrite(before, passes=PLAIN)
    assert result.modified
    assert_golden(golden_text(before, result.graph_module), case.name, golden_dir=GOLDEN)


def assert_golden_of_inserted_nodes(case: Case) -> None:
    """The golden file of what is inserted, one for all front ends that keep statistics."""
    kept = case.name.startswith("place_telemetry")
    texts = {
        frontend: inserted_text(
            rewrite(capture(case.model(), case.x(), frontend=frontend), passes=PLAIN).graph_module
        )
        for frontend in FRONTENDS
        if not (kept and frontend == "export")
    }
    # Before the file is read or, on request, written: one text for all.
    assert set(texts.values()) == {texts["dynamo"]}
    assert_golden(texts["dynamo"], f"inserted/{case.name}", golden_dir=GOLDEN)


def golden_tests_of(name: str) -> tuple[Callable[[Case], None], Callable[[Case], None]]:
    """Make the two golden tests of a pass: of Dynamo's whole graph, and of what is inserted."""

    @each_case_of(name)
    @spelled_as_torch_2_13
    def test_golden_of_dynamos_graph(case: Case) -> None:
        assert_golden_of_dynamos_graph(case)

    @each_case_of(name)
    def test_golden_of_inserted_nodes_is_one_for_all_front_ends(case: Case) -> None:
        assert_golden_of_inserted_nodes(case)

    return test_golden_of_dynamos_graph, test_golden_of_inserted_nodes_is_one_for_all_front_ends


def assert_reference_after(name: str, *steps: Callable[[GraphModule], Any]) -> None:
    """A case computes what the reference does after these steps alone; the last changes nodes."""
    (case,) = [case for case in CASES if case.name == name]
    model = case.model().double()
    gm = capture(model, case.x().double(), frontend="fx")
    for step in steps:
        step(gm)
    assert records_of(gm)[-1].modified
    assert_outcome(model, case, gm)


def assert_outcome(model: nn.Module, case: Case, run: Any) -> None:
    """Whatever runs the model's graph computes what the reference does, gradients too."""
    for batch in (3, 7):
        x = case.x(batch).double()
        assert_close(outcome(model, x, run), outcome(model, x))


def outcome(model: nn.Module, x: Tensor, run: Any = None) -> dict[str, Tensor]:
    """Output and all gradients, without ``run`` those of the reference."""
    x, ran = x.clone().requires_grad_(), model if run is None else run
    model.zero_grad()
    ran.zero_grad()
    with reference_mode(model) if run is None else nullcontext():
        out = ran(x)
    out.square().sum().backward()
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad} | gradients(ran)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    # Exported programs name their parameters as the model does; torch.fx calls a view of the base.
    return {
        name.removeprefix("_orig_mod.").replace(".base.", "."): torch.zeros_like(p)
        if p.grad is None
        else p.grad.clone()
        for name, p in module.named_parameters()
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-10) -> None:
    missing = {name for name in expected.keys() - got.keys() if bool(expected[name].any())}
    assert not missing
    for name in expected.keys() & got.keys():
        torch.testing.assert_close(got[name], expected[name], atol=atol, rtol=atol, msg=name)
