"""Gradients by layers' outputs, looked at in compiled training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_cases import (
    assert_rms,
    expected_rms,
    gradients_of,
    layers_of,
    loss_of,
    net,
    rms_of,
)
from torch import Tensor, nn

from kasmina_fx import TelemetryPolicy
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

pytestmark = pytest.mark.untraced
POLICY = TelemetryPolicy(gradients=True, every=2, rows=16)


def assert_sees(
    model: nn.Module, run: Any, steps: list[Tensor], before: list[list[Tensor]]
) -> None:
    """Reports hold what the definition says of every other step, those ``before`` included."""
    expected = [gradients_of(model, x) for x in steps]
    for x in steps:
        loss_of(run(x)).backward()
    before += expected[::2]
    for found, mine in zip(rms_of(model), zip(*before, strict=True), strict=True):
        assert_rms(found, expected_rms(mine, rows=16), rtol=1e-5)


@pytest.mark.parametrize(
    ("compiler", "device"),
    [
        pytest.param("plain aot_eager", "cpu", marks=pytest.mark.slow),
        ("aot_eager", "cpu"),
        ("inductor", "cpu"),
        pytest.param("inductor", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_life_looks_at_gradients_without_a_recompile(compiler: str, device: str) -> None:
    torch._dynamo.reset()
    model = net(POLICY, reserve=4).to(device)
    backend: Any = compiler.removeprefix("plain ")
    backend = backend if compiler.startswith("plain") else RecordingBackend(backend)
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    seen: list[list[Tensor]] = []
    assert_sees(model, run, [torch.randn(n, 5, device=device) for n in (6, 9)], seen)
    with assert_no_recompiles():
        graft(layers_of(model)[0], [0, 2], alpha=0.7)
        assert_sees(model, run, [torch.randn(n, 5, device=device) for n in (6, 40, 9, 33)], seen)
        graft(layers_of(model)[1], 1, alpha=1.0)
        assert_sees(model, run, [torch.randn(n, 5, device=device) for n in (12, 7)], seen)


def test_a_frozen_layer_and_evaluation_compile_to_no_gradient() -> None:
    torch._dynamo.reset()
    model = net(POLICY)
    layers_of(model)[0].requires_grad_(False)
    run: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(run(torch.randn(4, 5))).backward()
    first, second = rms_of(model)
    assert bool(first.isnan().all())
    assert not bool(second.isnan().any())
    with torch.no_grad():
        assert not run(torch.randn(4, 5)).requires_grad
    assert not model.requires_grad_(False)(torch.randn(4, 5)).requires_grad


@pytest.mark.slow
def test_inductor_writes_the_sums_out() -> None:
    torch._dynamo.reset()
    model = net(POLICY)
    with torch._inductor.utils.fresh_inductor_cache():
        run: Any = torch.compile(model, backend=RecordingBackend("inductor"))
        code = torch._inductor.utils.run_and_get_code(
            lambda: loss_of(run(torch.randn(40, 5))).backward()
        )[1]
    assert len(code) == 2
    assert not any("kasmina.sense" in text for text in code)
