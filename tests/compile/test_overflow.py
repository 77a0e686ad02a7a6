"""Numbers too large for their dtype: what they do, and whose fault they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import OneLayer, layer_of, wrapped
from torch import nn

import kasmina_fx
from kasmina_fx import KasminaLayer, reference
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.testing import RecordingBackend, graft

pytestmark = pytest.mark.untraced
each_compiler = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])


def compiled(model: nn.Module, compiler: str) -> Any:
    if compiler == "eager":
        return model
    return torch.compile(model, backend=RecordingBackend(compiler), fullgraph=True)


def errors(layer: KasminaLayer) -> list[float]:
    found: list[float] = layer.get_health_report()["errors"].tolist()
    return found


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize(
    ("compiler", "shared"),
    [
        ("eager", False),
        ("eager", True),
        ("aot_eager", False),
        pytest.param("aot_eager", True, marks=pytest.mark.slow),
    ],
)
def test_in_float16_seeds_learn_to_reconstruct_whatever_the_scale(
    compiler: str, shared: bool
) -> None:
    found = {}
    for scale in (1.0, 2.0**16, 2.0**20):
        torch.manual_seed(0)
        model = wrapped(OneLayer(), seeds=4, telemetry=True)
        layer = layer_of(model)
        graft(layer, range(4), layer.register_blueprint("mlp") if shared else "mlp", 0, S.TRAINING)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        kasmina_fx.follow_scaler(model, scaler)
        run = compiled(model, compiler)
        for number in range(3):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
            with torch.autocast("cpu", torch.float16):
                out = run(8 * x)
            # The loss is the host's alone, and so small that it never overflows.
            scaler.scale((out * 1e-8).sum()).backward()
        assert errors(layer) == [0] * 4
        assert bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())
        grads = [p.grad / scale for p in layer.blueprint_parameters() if p.grad is not None]
        found[scale] = torch.cat([grad.flatten() for grad in grads])
    assert bool((found[1.0] != 0).any())
    for scale in (2.0**16, 2.0**20):
        torch.testing.assert_close(found[scale], found[1.0], rtol=2e-3, atol=1e-4)


@each_compiler
def test_overflow_under_a_scaler_is_how_it_finds_its_scale(compiler: str) -> None:
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer = layer_of(model)
    graft(layer, range(4), "mlp", 0.5)
    scaler = torch.amp.GradScaler("cpu")
    kasmina_fx.follow_scaler(model, scaler)
    run = compiled(model, compiler)
    for bad in (torch.inf, torch.nan):
        run(torch.randn(3, 8)).backward(torch.full((3, 12), bad))
    assert errors(layer) == [0] * 4
    kasmina_fx.follow_scaler(model, None)
    for _ in range(2):
        layer.zero_grad()
        spoiled = layer.bank_of(2)
        assert spoiled is not None
        spoiled[0].slot_tensors(spoiled[1])["up.weight"].data.fill_(torch.nan)
        run(torch.randn(3, 8)).sum().backward()
    assert errors(layer) == [0, 0, 2, 0]


def affine(layer: KasminaLayer, seed: int, scale: float, shift: float) -> None:
    held = layer.bank_of(seed)
    assert held is not None
    tensors = held[0].slot_tensors(held[1])
    tensors["scale"].data.fill_(scale)
    tensors["shift"].data.fill_(shift)


@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.FOSSILIZED], ids=lambda s: s.name)
@each_compiler
def test_what_does_not_fit_the_hosts_dtype_is_rejected(compiler: str, stage: S) -> None:
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer = layer_of(model)
    graft(layer, range(4), "affine", 0.5, stage)
    affine(layer, 1, 1.0, 1e5)  # float16 ends at 65,504; the blueprint computes in float32
    run, x = compiled(model, compiler), torch.randn(3, 8)
    with torch.autocast("cpu", torch.float16):
        out, host = run(x), layer.base(x)
        expected = reference.forward(layer, x)
    assert out.dtype == torch.float16
    assert bool(out.isfinite().all())
    with torch.autocast("cpu", torch.float16):
        chunk = layer(x)[:, 3:6]
    assert torch.equal(chunk, host[:, 3:6])
    assert bool(expected.isfinite().all())
    assert errors(layer)[1] >= 1
    assert errors(layer)[0] == 0


@each_compiler
def test_a_blend_of_finite_values_that_overflows_is_rejected(compiler: str) -> None:
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer = layer_of(model)
    graft(layer, range(4), "affine", 0.5)
    affine(layer, 1, 0.0, 3e38)
    with torch.no_grad():
        layer.bias.fill_(-1e38)
    run, x = compiled(model, compiler), torch.randn(3, 8)
    out = run(x)
    out.sum().backward()
    assert bool(out.isfinite().all())
    torch.testing.assert_close(layer(x), reference.forward(layer, x))
    assert errors(layer) == [0, 2, 0, 0]  # layer(x) is a step as well


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.STABILIZATION], ids=lambda s: s.name)
@each_compiler
def test_what_is_wrong_with_the_host_is_not_the_blueprints_fault(
    compiler: str, stage: S, value: float
) -> None:
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer = layer_of(model)
    graft(layer, [0, 1], "mlp", 0.5, stage)
    graft(layer, [2, 3], layer.register_blueprint("mlp"), 0.5, stage)
    with torch.no_grad():
        layer.weight[4].fill_(value)  # chunks of 3: seed 1
        layer.weight[8].fill_(value)  # and 2, which shares with 3
    run = compiled(model, compiler)
    for _ in range(5):
        run(torch.randn(3, 8)).sum().backward()
    report = layer.get_health_report()
    assert report["errors"].tolist() == [0] * 4
    assert report["non_finite"].tolist() == [0, 5, 5, 0]
    assert layer.state.stages.tolist() == [stage] * 4


@each_compiler
def test_a_stage_without_a_blueprint_is_no_fault(compiler: str) -> None:
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer = layer_of(model)
    graft(layer, 0, "mlp")
    layer.advance(1, S.GERMINATED)
    layer.advance(1, S.TRAINING)
    run = compiled(model, compiler)
    for _ in range(5):
        run(torch.randn(3, 8)).sum().backward()
    assert errors(layer) == [0] * 4
