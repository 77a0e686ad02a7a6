"""Which activation a kernel could take along, and the near misses that it must leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_cases import (
    GOLDEN,
    OneLayer,
    assert_leaves_alone,
    dormant_graph,
    growing_graph,
    layer_of,
    plain_graph,
    spelled_as_torch_2_13,
    wrapped,
)
from kernel_cases import interpreter
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kasmina_fx import TelemetryPolicy, capture, find_matches
from kasmina_fx.errors import RewriteError
from kasmina_fx.lowerings.rows import ACTIVATIONS, ROWS
from kasmina_fx.passes import passes_for, run_passes
from kasmina_fx.passes.absorb_activation import AbsorbActivation
from kasmina_fx.passes.infra.metadata import lowering_of, set_then, then_of, value_of
from kasmina_fx.passes.infra.outputs import outputs_of
from kasmina_fx.testing import assert_golden, graft

__all__ = ["interpreter"]
Then = Callable[[Tensor], Any]


class Behind(nn.Module):
    """A linear layer and whatever is behind it."""

    def __init__(self, then: Then) -> None:
        super().__init__()
        self.fc, self.then = nn.Linear(8, 12), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.fc(x))


def graph(
    then: Then, telemetry: bool | TelemetryPolicy = True, seeds: int = 4, **how: Any
) -> GraphModule:
    model = wrapped(Behind(then), seeds=seeds, telemetry=telemetry)
    graft(layer_of(model), [0, 2], "mlp")
    return capture(model, torch.randn(3, 8), **how)


def found(gm: GraphModule) -> str:
    """What the marker is annotated with; the pass changes no node."""
    assert_leaves_alone(AbsorbActivation(), gm)
    return then_of(find_matches(gm)[0].node)


SPELLINGS: list[tuple[str, Then]] = [
    ("gelu", nn.GELU()),
    ("gelu", F.gelu),
    ("gelu", lambda y: F.gelu(input=y)),
    ("gelu_tanh", nn.GELU(approximate="tanh")),
    ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")),
    ("relu", nn.ReLU()),
    ("relu", F.relu),
    ("relu", torch.relu),
    ("relu", lambda y: y.relu()),
    ("silu", nn.SiLU()),
    ("silu", F.silu),
    ("tanh", nn.Tanh()),
    ("tanh", F.tanh),
    ("tanh", torch.tanh),
    ("tanh", lambda y: y.tanh()),
    ("sigmoid", nn.Sigmoid()),
    ("sigmoid", F.sigmoid),
    ("sigmoid", torch.sigmoid),
    ("sigmoid", torch.special.expit),
    ("sigmoid", lambda y: y.sigmoid()),
]


@pytest.mark.parametrize(("name", "then"), SPELLINGS)
def test_an_activation_is_known_however_it_is_spelled(name: str, then: Then) -> None:
    assert found(graph(then)) == name


@pytest.mark.parametrize("telemetry", [False, True])
def test_exports_operators_are_known_too(telemetry: bool) -> None:
    for name, then in (("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu), ("tanh", F.tanh)):
        assert found(graph(then, telemetry, frontend="export")) == name


def test_what_stands_behind_the_activation_does_not_matter() -> None:
    assert found(graph(lambda y: F.gelu(y) * 2 + 1)) == "gelu"
    assert found(graph(lambda y: F.relu(F.gelu(y)))) == "gelu"


def test_where_the_outputs_gradient_is_looked_at_the_activation_stays() -> None:
    assert found(graph(F.gelu, TelemetryPolicy(gradients=True))) == ""


def used_twice(y: Tensor) -> Any:
    return F.gelu(y) + y


def activated_twice(y: Tensor) -> Any:
    return F.gelu(y) + F.relu(y)


def returned_too(y: Tensor) -> Any:
    return F.gelu(y), y


def behind_a_view(y: Tensor) -> Any:
    return F.gelu(y.view(-1))


def of_another_dtype(y: Tensor) -> Any:
    return F.gelu(y.double())


def under_autocast(y: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return F.gelu(y)


def without_gradient(y: Tensor) -> Any:
    with torch.no_grad():
        return F.gelu(y)


def in_place(y: Tensor) -> Any:
    return F.relu(y, inplace=True)


def in_place_by_name(y: Tensor) -> Any:
    return torch.relu_(y)


def changed_before(y: Tensor) -> Any:
    return F.gelu(y.add_(1))


def changed_between(y: Tensor) -> Any:
    y.add_(1)
    return F.gelu(y)


def after_other_work(y: Tensor) -> Any:
    other = torch.ones(3, 12).sin()
    return F.gelu(y) + other


def unknown(y: Tensor) -> Any:
    return F.hardswish(y)


def with_another_argument(y: Tensor) -> Any:
    return F.leaky_relu(y, 0.2)


def not_used(y: Tensor) -> Any:
    return y


@pytest.mark.parametrize(
    "then",
    [
        used_twice, activated_twice, returned_too, behind_a_view, of_another_dtype, under_autocast,
        without_gradient, in_place, in_place_by_name, changed_before, changed_between,
        after_other_work, unknown, with_another_argument, not_used, nn.ReLU(inplace=True),
    ],
)  # fmt: skip
def test_a_near_miss_is_left_alone(then: Then) -> None:
    assert found(graph(then)) == ""


def test_an_output_of_another_dtype_than_the_hosts_is_left_alone() -> None:
    gm = graph(F.gelu)
    (gelu,) = [node for node in gm.graph.nodes if node.name == "gelu"]
    for key in ("val", "example_value"):
        if key in gelu.meta:
            gelu.meta[key] = value_of(gelu).half()
    assert found(gm) == ""


def test_dormant_layers_and_other_graphs_are_left_alone() -> None:
    for gm in (plain_graph(), dormant_graph()):
        assert_leaves_alone(AbsorbActivation(), gm)
        assert not any(then_of(node) for node in gm.graph.nodes)


def test_an_annotation_is_stable_and_disabling_the_pass_leaves_none() -> None:
    gm = growing_graph()
    assert found(gm) == found(gm) == "gelu"
    gm = growing_graph()
    run_passes(gm, passes_for("matmul", disabled=["absorb_activation"]))
    assert "gelu" in [node.name for node in gm.graph.nodes]


def test_an_annotation_that_is_not_true_is_an_error() -> None:
    gm = graph(used_twice)
    AbsorbActivation()(gm)
    set_then(find_matches(gm)[0].node, "gelu")
    with pytest.raises(RewriteError, match=r"is read by \['add', 'gelu'\], not by one"):
        AbsorbActivation().ensures(gm)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "then"), SPELLINGS[::2])
def test_the_dense_lowering_takes_the_activation_along(name: str, then: Then) -> None:
    gm = graph(then)
    (behind,) = [u for u in find_matches(gm)[0].node.users for u in u.users if u.op != "output"][:1]
    run_passes(gm, passes_for("dense", strict=True))
    (rows,) = gm.graph.find_nodes(op="call_function", target=ROWS)
    assert name in rows.args
    assert name in ACTIVATIONS
    assert behind not in gm.graph.nodes or behind.target is torch.ops.kasmina.observe.default


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("then", [F.gelu, F.relu, used_twice])
def test_auto_is_dense_where_the_activation_keeps_its_input(then: Then) -> None:
    gm = graph(then, seeds=3 if then is F.gelu else 12)
    matches = find_matches(gm)
    run_passes(gm)
    chosen = lowering_of(matches[0].node)
    assert chosen is not None
    tiles = "fused: the quickest by prediction; not dense: "
    alone = " of the features run: tiles touch these alone, and no activation that keeps its input"
    if then is F.gelu:
        assert chosen.name == "dense"
        assert chosen.why == (
            "the quickest by prediction; not fused: 67% of the features run: one pass over all "
            "takes less"
        )
    else:
        assert f"{chosen.name}: {chosen.why}".startswith(tiles)
        assert alone in chosen.why


def spelled(node: Node) -> str:
    """A node's target as graphs are printed."""
    return (
        str(node.target)
        if node.op == "call_method"
        else str(node._pretty_print_target(node.target))
    )


@spelled_as_torch_2_13
def test_golden() -> None:
    lines: list[str] = []
    for title, gm in (
        ("nn.GELU", graph(nn.GELU())),
        ("nn.ReLU", graph(nn.ReLU())),
        ("nn.ReLU in place", graph(nn.ReLU(inplace=True))),
        ("used twice", graph(used_twice)),
        ("no seed", capture(wrapped(OneLayer()), torch.randn(3, 8))),
    ):
        AbsorbActivation()(gm)
        marker = find_matches(gm)[0].node
        readers = [reader for out in outputs_of(marker)[0] for reader in out.users]
        lines += [f"# {title}: {then_of(marker) or 'nothing'}", "%out is read by"]
        lines += [f"    {node.name} = {spelled(node)}{node.kwargs or ''}" for node in readers]
    assert_golden("\n".join(lines) + "\n", "absorb_activation/spellings", golden_dir=GOLDEN)
