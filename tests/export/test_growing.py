"""Programs of a model that still grows: operators of torch alone, and what one can do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folded_cases import Root
from host_cases import by_reference
from torch import Tensor, nn

from kasmina_fx import SeedLifecycle, capture, kasmina_layers, kasminify
from kasmina_fx.blueprints import register
from kasmina_fx.physical.programs import recording_markers
from kasmina_fx.testing import graft

S = SeedLifecycle
X = torch.linspace(-2, 2, 30).view(5, 6)
ROWS = ({0: torch.export.Dim.DYNAMIC},)


def growing(*kinds: str) -> Any:
    """Seeds that learn, that are frozen, that share, that reconstruct; double, in training."""
    torch.manual_seed(0)
    model = kasminify(Root(nn.Linear(6, 14), nn.GELU()), num_seeds=4, compile=False).double()
    layer = kasmina_layers(model)["0"]
    for seed, kind in enumerate(kinds):
        graft(layer, seed, kind, 0.3 + 0.2 * seed, (S.GRAFTING, S.EVALUATING, S.TRAINING)[seed])
    with torch.no_grad():
        for stack in layer.blueprint_parameters(False):
            stack.normal_(std=0.5)
    return model


def operators(program: Any) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kinds", [(), ("mlp", "bottleneck", "lora")], ids=["dormant", "growing"])
def test_a_program_is_of_torchs_operators_for_any_batch(
    kinds: tuple[str, ...], strict: bool
) -> None:
    model = growing(*kinds)
    counted = kasmina_layers(model)["0"].get_health_report()["count"].tolist()
    program = torch.export.export(model, (X.double(),), dynamic_shapes=ROWS, strict=strict)
    names = operators(program)
    assert not [name for name in names if "kasmina" in name]
    assert not program.graph_signature.buffers_to_mutate
    if not kinds:
        assert names == {"aten.linear.default", "aten.gelu.default"}
    x = torch.randn(3, 6).double()
    torch.testing.assert_close(program.module()(x), by_reference(model, x), atol=1e-12, rtol=1e-12)
    assert kasmina_layers(model)["0"].get_health_report()["count"].tolist() == counted


def test_a_program_has_the_gradients_of_the_models_loss() -> None:
    model = growing("mlp", "bottleneck", "residual_mlp")
    program = torch.export.export(model, (X.double(),))
    trained: nn.Module = program.module()
    trained(X.double()).square().mean().backward()
    with_grads = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    layer = kasmina_layers(model)["0"]
    layer.reset(2)  # its reconstruction loss is no part of a program
    model(X.double()).square().mean().backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    compared = {name for name in own if "bottleneck" not in name and "residual" not in name}
    assert {"0.weight", "0.bias"} < compared
    for name in compared:
        torch.testing.assert_close(with_grads[name], own[name], atol=1e-12, rtol=1e-12)
    for name, grad in with_grads.items():  # frozen, or with no say in the output
        assert name in compared or not bool(grad.any())


def test_alphas_are_buffers_of_a_program_and_blueprints_its_parameters() -> None:
    model = growing("mlp", "mlp")
    module: nn.Module = torch.export.export(model, (X.double(),)).module()
    state = module.state_dict()
    parameters = dict(module.named_parameters())
    assert "0.kasmina.banks.mlp_run0.up/weight" in parameters
    with torch.no_grad():
        state["0.kasmina.state.alpha"].zero_()
    host: Tensor = nn.functional.gelu(
        nn.functional.linear(X.double(), model[0].weight, model[0].bias)
    )
    torch.testing.assert_close(module(X.double()), host, atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_users_module_runs_once_a_place_with_no_batch_size_in_it() -> None:
    kind = register(lambda size: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size)))
    model = growing(kind, "affine")
    layer = kasmina_layers(model)["0"]
    graft(layer, [2, 3], layer.register_blueprint(kind), 0.4)
    x = torch.randn(3, 6).double()
    want = by_reference(model, x)
    program = torch.export.export(model, (X.double(),), dynamic_shapes=ROWS)
    assert not [name for name in operators(program) if "kasmina" in name]
    torch.testing.assert_close(program.module()(x), want, atol=1e-12, rtol=1e-12)
    traced = torch.jit.trace(model, X.double(), check_trace=False)
    assert "kasmina::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), want, atol=1e-12, rtol=1e-12)


def test_who_rewrites_graphs_gets_markers() -> None:
    model = growing("mlp")
    with recording_markers():
        program = torch.export.export(model, (X.double(),))
    assert "kasmina.blend.default" in operators(program)
    assert "kasmina.blend.default" in operators(capture(model, X.double(), frontend="export"))
    assert "kasmina.blend.default" not in operators(torch.export.export(model, (X.double(),)))
