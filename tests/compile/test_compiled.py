"""Compiled models against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_cases import COMPILERS, SLOW, compiled, judged, mixed, outcome, pair
from graph_cases import Convolution, OneLayer, layer_of, wrapped
from torch import Tensor, nn

from kasmina_fx import (
    SeedLifecycle,
    host_state_dict,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

# Coverage doubles the time that torch takes to compile; the files beside this one cover the lines.
pytestmark = pytest.mark.untraced


@pytest.mark.parametrize(
    ("build", "dtype", "atol", "compiler"),
    [
        (mixed, torch.float64, 1e-10, "eager"),
        (pair, torch.float32, 1e-5, "eager"),
        (pair, torch.float32, 1e-5, "aot_eager"),
        pytest.param(mixed, torch.float64, 1e-10, "aot_eager", marks=SLOW),
        pytest.param(mixed, torch.float64, 1e-10, "inductor", marks=SLOW),
        pytest.param(pair, torch.float32, 1e-5, "inductor", marks=SLOW),
        *(pytest.param(mixed, torch.float32, 1e-5, name, marks=SLOW) for name in COMPILERS[:3]),
    ],
)
def test_any_mix_of_seeds_equals_the_reference(
    compiler: str, build: Callable[[], nn.Module], dtype: torch.dtype, atol: float
) -> None:
    model, x = build().to(dtype), torch.randn(6, 8, dtype=dtype)
    got, expected = outcome(model, compiled(model, compiler), x), judged(model, x)
    torch.testing.assert_close(got, expected, atol=atol, rtol=atol)


def test_life_through_inductor() -> None:
    model, x = kasminify(OneLayer(), num_seeds=5), torch.randn(6, 8)
    dormant = outcome(model, model, x)
    plain = OneLayer()
    plain.load_state_dict(host_state_dict(model))
    torch.testing.assert_close(dormant["out"], outcome(plain, plain, x)["out"])
    layers = list(kasmina_layers(model).values())
    for layer in layers:
        graft(layer, [0, 2], "mlp")
    outcome(model, model, x)
    before = [layer.kasmina.telemetry.accumulated.clone() for layer in layers]
    with assert_no_recompiles():
        for seeds in ([1], [3, 4]):
            for layer in layers:
                graft(layer, seeds, "mlp", alpha=0.3)
            got, expected = outcome(model, model, x), judged(model, x)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for layer, earlier in zip(layers, before, strict=True):
        steps = 6 * torch.tensor(layer.chunks.sizes) * 2.0
        now = layer.kasmina.telemetry.accumulated
        torch.testing.assert_close(now[0] - earlier[0], steps)


@pytest.mark.parametrize("compiler", [*COMPILERS[:2], pytest.param("inductor", marks=SLOW)])
def test_telemetry_is_the_same_however_it_is_compiled(compiler: str) -> None:
    model = wrapped(OneLayer(), seeds=5, telemetry=True)
    graft(layer_of(model), [1, 4], "mlp")
    eager, run = copy.deepcopy(model), compiled(model, compiler)
    for _ in range(3):
        x = 5 + torch.randn(6, 8)
        run(x)
        eager(x)
    got, expected = (layer_of(m).get_health_report() for m in (model, eager))
    for key in ("count", "mean", "variance"):
        torch.testing.assert_close(got[key], expected[key], atol=1e-4, rtol=1e-4)


def test_all_dormant_is_the_host_to_the_bit_and_node_for_node() -> None:
    model, plain = wrapped(OneLayer(), seeds=5), OneLayer()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "kasmina" not in k})
    ours, theirs = RecordingBackend("aot_eager"), RecordingBackend("aot_eager")
    x = torch.randn(3, 8)
    out = torch.compile(model, backend=ours, fullgraph=True)(x)
    expected = torch.compile(plain, backend=theirs, fullgraph=True)(x)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))
    rewritten, host = (
        [
            (node.op, str(node.target).replace("modules_base_", ""))
            for node in b.after[0].graph.nodes
        ]
        for b in (ours, theirs)
    )
    assert rewritten == host


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_a_rejected_blueprint_does_not_reach_the_host(compiler: str) -> None:
    torch.manual_seed(0)
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer = layer_of(model)
    graft(layer, [0, 1], "mlp")
    run, x = compiled(model, compiler), torch.randn(5, 8)
    first = next(iter(layer.blueprint_parameters()))
    with torch.no_grad():
        first[0, 0, 0] = torch.nan
    got = outcome(model, run, x)
    layer.advance(0, SeedLifecycle.CULLED)
    expected = outcome(model, run, x)
    for name in ("out", "x", "fc.weight", "fc.bias"):
        assert bool(got[name].isfinite().all())
        torch.testing.assert_close(got[name], expected[name])
    assert layer.get_health_report()["rejected"].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_autocast_around_and_inside_the_model(compiler: str, inside: bool) -> None:
    class Cast(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                return self.inner(x).float()  # type: ignore[no-any-return]  # modules return Any

    model = Cast(pair())
    run, x = compiled(model, compiler), torch.randn(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        got = outcome(model, run, x)
        expected = judged(model, x)
    assert got["out"].dtype is torch.float32
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1.0)
        assert (got[name] - value).abs().max() <= 0.06 * scale, name


def test_bfloat16_weights() -> None:
    model, x = pair(), torch.randn(6, 8)
    expected = judged(model, x)["out"]
    half = model.to(torch.bfloat16)
    out = compiled(half, "aot_eager")(x.bfloat16())
    assert out.dtype is torch.bfloat16
    assert (out.float() - expected).abs().max() <= 0.05 * expected.abs().max()
    assert layer_of(half, "up").state.alpha.dtype is torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    model, x = pair().eval(), torch.randn(6, 8)
    run = compiled(model, "aot_eager")
    with mode():
        out = run(x)
        assert not out.requires_grad
    with reference_mode(model):
        torch.testing.assert_close(out, model(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels_last", [pytest.param(False, marks=pytest.mark.slow), True])
def test_convolution_in_both_memory_formats(channels_last: bool) -> None:
    model = wrapped(Convolution(), seeds=3, telemetry=True, targets=(nn.Conv2d,))
    graft(layer_of(model, "conv"), [0, 2], "mlp")
    x = torch.randn(2, 3, 5, 5)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
        x = x.to(memory_format=torch.channels_last)
    got = outcome(model, compiled(model, "aot_eager"), x)
    torch.testing.assert_close(got, judged(model, x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_users_module_through_torch_func() -> None:
    class Gate(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.gate = nn.Linear(size, size)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.gate(x))

    model = wrapped(OneLayer(), seeds=5)
    layer = layer_of(model)
    shared = layer.register_blueprint(Gate, name="gate")
    graft(layer, [0, 3, 4], shared)
    graft(layer, [1, 2], "gate")
    run = compiled(model, "aot_eager")
    for batch in (4, 9):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(outcome(model, run, x), judged(model, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("shape", "approximate"), [((6, 8), "none"), ((2, 3, 8), "tanh")])
def test_telemetry_keeps_nothing_for_backward(shape: tuple[int, ...], approximate: str) -> None:
    def kept(telemetry: bool) -> list[tuple[torch.dtype, torch.Size]]:
        model: nn.Module = nn.Sequential(nn.Linear(8, 12), nn.GELU(approximate), nn.Linear(12, 4))
        model = wrapped(model, seeds=4, telemetry=telemetry, filter_fn=lambda _, name: name == "0")
        run, found = compiled(model.to(torch.bfloat16), "inductor"), []

        def pack(t: Tensor) -> Tensor:
            found.append((t.dtype, t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(torch.randn(shape, dtype=torch.bfloat16))
        return sorted(found, key=str)

    assert kept(telemetry=True) == kept(telemetry=False) != []


def test_an_empty_batch() -> None:
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    graft(layer_of(model), [0, 2], "mlp")
    run = compiled(model, "aot_eager")
    assert run(torch.randn(0, 8)).shape == (0, 12)
    assert layer_of(model).get_health_report()["count"].tolist() == [0.0] * 4
    x = torch.randn(3, 8)
    torch.testing.assert_close(outcome(model, run, x), judged(model, x), atol=1e-5, rtol=1e-5)


def test_a_users_module_that_insists_on_a_size_costs_recompiles_and_stays_right() -> None:
    def factory(size: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.Tanh())

    model = wrapped(OneLayer(), seeds=4)
    layer = layer_of(model)
    layer.register_blueprint(factory, name="normed")
    graft(layer, [0, 3], "normed")
    run = compiled(model, "aot_eager")
    for batch in (4, 9, 17):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(outcome(model, run, x), judged(model, x), atol=1e-5, rtol=1e-4)
    graft(layer, [1, 2], "normed")
    torch.testing.assert_close(outcome(model, run, x), judged(model, x), atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", COMPILERS)
def test_any_mix_of_seeds_on_cuda(compiler: str) -> None:
    model, x = mixed().double().cuda(), torch.randn(6, 8, dtype=torch.float64, device="cuda")
    got, expected = outcome(model, compiled(model, compiler), x), judged(model, x)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
