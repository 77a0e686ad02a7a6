"""A switch of a compiled hybrid layer compiles nothing that was compiled before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybrid_cases import FEATURE, flags_in_memory
from layer_cases import perturb
from torch import nn

from kasmina_fx import HybridKasminaLayer, compiles
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

pytestmark = [
    pytest.mark.untraced,
    # Dynamo (2.13) looks for `.grad` of what a frame is given, and hides the warning by showing
    # none, for which an error comes too early.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def model_of(layers: int, **kwargs: Any) -> nn.Sequential:
    kwargs.setdefault("feature_flags", flags_in_memory())
    named = (
        HybridKasminaLayer(nn.Linear(4 + i, 5 + i), f"h.{i}", 3, **kwargs) for i in range(layers)
    )
    return nn.Sequential(*named, nn.Linear(4 + layers, 2))


class Around(nn.Module):
    """A model with code of its own around its layers."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x.sin())
        return out.cos()


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    out: torch.Tensor = model(x)
    out.square().mean().backward()
    return out.detach()


def test_ten_layers_move_over_one_by_one_and_back_with_one_compile_each() -> None:
    flags = flags_in_memory()
    model = Around(model_of(10, feature_flags=flags))  # more than Dynamo's limit of recompiles
    layers = [m for m in model.modules() if isinstance(m, HybridKasminaLayer)]
    for layer in layers:
        graft(layer, [0, 2], "mlp", 0.5)
        perturb(layer)
    model.compile(backend="eager")
    backends = [RecordingBackend("aot_eager") for _ in layers]
    for layer, backend in zip(layers, backends, strict=True):
        layer.compile(backend=backend)
    x = torch.randn(8, 4)
    expected = step(model, x)
    around = compiles()
    for i in range(10):
        flags.add_to_allowlist(FEATURE, f"h.{i}")
        torch.testing.assert_close(step(model, x), expected, atol=1e-5, rtol=1e-5)
        assert [backend.compiles for backend in backends] == [1] * (i + 1) + [0] * (9 - i)
    assert compiles() == around + 10
    assert all(layer.switch.stats()["calls"]["chunked"] for layer in layers)
    with assert_no_recompiles():
        for i in (3, 7, 0):
            flags.remove_from_allowlist(FEATURE, f"h.{i}")
            step(model, x)
        flags.set_rollout_percentage(FEATURE, 50, by="layer")
        step(model, x)
        for layer in layers:
            layer.enable_legacy_mode()
        step(model, x)
        for layer in layers:
            layer.enable_chunked_mode()
            layer.set_alpha(0, 0.9)
        step(model, x)
    assert all(layer.switch.off == {} for layer in layers)


def test_below_a_compiled_model_it_takes_our_backend_and_gives_the_same() -> None:
    model = Around(model_of(2, force_implementation="legacy"))
    layers = [m for m in model.modules() if isinstance(m, HybridKasminaLayer)]
    for layer in layers:
        graft(layer, [0, 1], "mlp", 0.5)
        perturb(layer)
    x = torch.randn(8, 4)
    expected = step(model, x)
    grads = [p.grad for p in model.parameters()]
    model.compile(backend="kasmina")
    for layer in layers:
        layer.enable_chunked_mode()
    out = step(model, x)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    for p, grad in zip(model.parameters(), grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-5)
    assert all(layer.__dict__["_compiled"] is not None for layer in layers)
    with assert_no_recompiles():
        for name in ("legacy", "chunked") * 2:
            for layer in layers:
                layer.force_implementation = name
            torch.testing.assert_close(step(model, x), expected, atol=1e-6, rtol=1e-6)


def test_a_graph_that_can_not_be_compiled_or_run_is_switched_off() -> None:
    def broken(gm: Any, inputs: Any) -> Any:
        raise RuntimeError("no kernel for this device")

    (layer, *_) = model_of(1, force_implementation="chunked")
    assert isinstance(layer, HybridKasminaLayer)
    layer.compile(backend=broken)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert "no kernel for this device" in layer.switch.off["chunked"]
    assert layer.switch.stats()["calls"] == {"legacy": 1, "chunked": 0}


def test_settled_its_graph_is_part_of_the_models() -> None:
    model = Around(model_of(1, force_implementation="chunked"))
    (layer,) = (m for m in model.modules() if isinstance(m, HybridKasminaLayer))
    graft(layer, 0, "mlp", 0.5)
    x = torch.randn(3, 4)
    expected = model(x)
    layer.settle()
    backend = RecordingBackend("eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, atol=1e-6, rtol=1e-6)
    assert backend.compiles == 1
