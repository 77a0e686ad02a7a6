"""Compiled models against the reference, and all else that torch does with modules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import Convolution, OneLayer, TwoLayers, layer_of, wrapped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    host_state_dict,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

# Coverage doubles the time that torch takes to compile; the files beside this one cover the lines.
pytestmark = pytest.mark.untraced
COMPILERS = ("eager", "aot_eager", "inductor")
SLOW = pytest.mark.slow  # many kernels for a C++ compiler


def mixed() -> nn.Module:
    """Every built-in, private and shared, several chunk sizes; some seeds not blended."""
    torch.manual_seed(0)
    model = wrapped(TwoLayers(), seeds=5, telemetry=True)
    up, down = layer_of(model, "up"), layer_of(model, "down")
    graft(up, [0, 3], alpha=0.7)
    graft(up, [1], "lora", alpha=1.0)
    graft(up, [2], up.register_blueprint("affine"), alpha=0.2)
    graft(down, [0, 1], "bottleneck", alpha=0.4)
    down.request_germination([3])
    down.request_germination([4])
    down.advance([4], SeedLifecycle.TRAINING)
    for layer in (up, down):
        for parameter in layer.blueprint_parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def pair() -> nn.Module:
    """Two layers with a private and a shared class each: a quarter of the compile time."""
    torch.manual_seed(0)
    model = wrapped(TwoLayers(), seeds=3, telemetry=True)
    up, down = layer_of(model, "up"), layer_of(model, "down")
    graft(up, [0], alpha=0.7)
    shared = up.register_blueprint("affine")
    graft(up, [1], shared, alpha=0.2)
    up.request_germination([2], shared)
    up.advance([2], SeedLifecycle.TRAINING)
    graft(down, [0, 2], alpha=0.4)
    for layer in (up, down):
        for parameter in layer.blueprint_parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def outcome(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    assert x.grad is not None
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return {"out": out.detach(), "x": x.grad} | grads


def judged(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with reference_mode(model):
        return outcome(model, model, x)


def compiled(model: nn.Module, compiler: str) -> Any:
    return torch.compile(model, backend=RecordingBackend(compiler), fullgraph=True)


@pytest.mark.parametrize("compiler", [*COMPILERS[:2], pytest.param("inductor", marks=SLOW)])
@pytest.mark.parametrize(
    ("build", "dtype", "atol"),
    [
        (mixed, torch.float64, 1e-10),
        (pair, torch.float32, 1e-5),
        pytest.param(mixed, torch.float32, 1e-5, marks=SLOW),
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
        graft(layer, [0, 2])
    outcome(model, model, x)
    before = [layer.kasmina.telemetry.accumulated.clone() for layer in layers]
    with assert_no_recompiles():
        for seeds in ([1], [3, 4]):
            for layer in layers:
                graft(layer, seeds, alpha=0.3)
            got, expected = outcome(model, model, x), judged(model, x)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for layer, earlier in zip(layers, before, strict=True):
        steps = 6 * torch.tensor(layer.chunks.sizes) * 2.0
        now = layer.kasmina.telemetry.accumulated
        torch.testing.assert_close(now[0] - earlier[0], steps)


@pytest.mark.parametrize("compiler", [*COMPILERS[:2], pytest.param("inductor", marks=SLOW)])
def test_telemetry_is_the_same_however_it_is_compiled(compiler: str) -> None:
    model = wrapped(OneLayer(), seeds=5, telemetry=True)
    graft(layer_of(model), [1, 4])
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
    graft(layer, [0, 1])
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


def test_deepcopies_live_apart() -> None:
    model, x = kasminify(OneLayer(), num_seeds=4, compile=False), torch.randn(3, 8)
    graft(layer_of(model), [0])
    twin = copy.deepcopy(model)
    run, run_twin = (compiled(m, "eager") for m in (model, twin))
    torch.testing.assert_close(run(x), run_twin(x))
    graft(layer_of(twin), [1, 2, 3])
    torch.testing.assert_close(run(x), model(x))
    torch.testing.assert_close(run_twin(x), twin(x))
    assert not torch.equal(run(x), run_twin(x))


def test_a_deepcopy_of_a_compiled_model_can_be_compiled_again() -> None:
    model = kasminify(OneLayer(), num_seeds=4, options={"strict": True})
    twin = copy.deepcopy(model)
    x = torch.randn(3, 8)
    with assert_no_recompiles():  # as torch does, a copy is not compiled
        torch.testing.assert_close(twin(x), nn.functional.gelu(layer_of(model).base(x)))
    run = compiled(twin, "eager")
    graft(layer_of(twin), [0])
    run(x)
    with assert_no_recompiles():  # copied stacks are still marked dynamic
        graft(layer_of(twin), [1, 2, 3])
        run(x)


def test_a_saved_state_dict_loads_into_a_compiled_model() -> None:
    model, x = pair(), torch.randn(6, 8)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = wrapped(TwoLayers(), seeds=3, telemetry=True)
    run = compiled(fresh, "eager")
    run(x)
    layer_of(fresh, "up").register_blueprint("affine")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(run(x), model(x))


def test_activation_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return out

    model, x = Checkpointed(pair()), torch.randn(6, 8)
    backend = RecordingBackend("aot_eager", strict=True)
    run = torch.compile(model, backend=backend, fullgraph=True)
    counts = layer_of(model, "inner.up").kasmina.telemetry.accumulated[0]
    got = outcome(model, run, x)
    once = counts.clone()
    torch.testing.assert_close(got, judged(model, x), atol=1e-5, rtol=1e-5)
    assert once.tolist() == [6.0 * size for size in layer_of(model, "inner.up").chunks.sizes]


def test_two_layers_share_a_base_and_one_is_never_called() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = nn.Linear(8, 8)
            self.a, self.b = (
                KasminaLayer(base, 4, layer_id="a"),
                KasminaLayer(base, 2, layer_id="b"),
            )
            self.unused = KasminaLayer(nn.Linear(8, 8), 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    model, x = Odd(), torch.randn(5, 8)
    graft(model.a, [0, 1])
    graft(model.b, [1], "affine")
    graft(model.unused, [0])
    got = outcome(model, compiled(model, "aot_eager"), x)
    torch.testing.assert_close(got, judged(model, x), atol=1e-5, rtol=1e-5)


def test_a_model_called_twice_in_one_step() -> None:
    model, x = pair(), torch.randn(6, 8)
    run = compiled(model, "aot_eager")

    def twice(run: Any) -> Any:
        return lambda x: run(x) + run(2 * x)

    got = outcome(model, twice(run), x)
    with reference_mode(model):
        expected = outcome(model, twice(model), x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_one_layer_called_twice_in_one_graph() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = KasminaLayer(nn.Linear(8, 8), 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.layer(x))
            return out

    model, x = Twice(), torch.randn(5, 8)
    graft(model.layer, [0, 3])
    got = outcome(model, compiled(model, "aot_eager"), x)
    assert model.layer.get_health_report()["count"].tolist() == [20.0] * 4
    torch.testing.assert_close(got, judged(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_in_both_memory_formats(channels_last: bool) -> None:
    model = wrapped(Convolution(), seeds=3, telemetry=True, targets=(nn.Conv2d,))
    graft(layer_of(model, "conv"), [0, 2])
    x = torch.randn(2, 3, 5, 5)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
        x = x.to(memory_format=torch.channels_last)
    got = outcome(model, compiled(model, "aot_eager"), x)
    torch.testing.assert_close(got, judged(model, x), atol=1e-5, rtol=1e-4)


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


def test_telemetry_keeps_nothing_for_backward() -> None:
    def kept(telemetry: bool) -> list[tuple[torch.dtype, torch.Size]]:
        model = wrapped(nn.Sequential(nn.Linear(8, 12), nn.GELU()), seeds=4, telemetry=telemetry)
        run, found = compiled(model.to(torch.bfloat16), "inductor"), []

        def pack(t: Tensor) -> Tensor:
            found.append((t.dtype, t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(torch.randn(6, 8, dtype=torch.bfloat16))
        return sorted(found, key=str)

    assert kept(telemetry=True) == kept(telemetry=False) != []


def test_an_empty_batch() -> None:
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    graft(layer_of(model), [0, 2])
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
