"""What blueprints must not do to their host: compiled models, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graph_cases import OneLayer, layer_of, wrapped
from torch import Tensor, nn

from kasmina_fx import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.physical.statistics import REJECTED
from kasmina_fx.testing import RecordingBackend, graft

# Coverage doubles the time that torch takes to compile; the files beside this one cover the lines.
pytestmark = pytest.mark.untraced
SLOW = pytest.mark.slow
each_compiler = pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=SLOW)]
)


def step(run: Any, host: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, loss and what reaches the host."""
    x = x.clone().requires_grad_()
    host.zero_grad()
    out = run(x)
    loss = out.square().mean()
    loss.backward()
    grads = {"x": x.grad} | {name: p.grad for name, p in host.named_parameters()}
    return {"out": out.detach(), "loss": loss.detach()} | {
        name: grad.clone() for name, grad in grads.items() if grad is not None
    }


def bits(values: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: t.view(torch.int32).flatten().tolist() for name, t in values.items()}


def compiled(model: nn.Module, compiler: str) -> Any:
    return torch.compile(model, backend=RecordingBackend(compiler), fullgraph=True)


# Seeds in TRAINING.


@each_compiler
def test_the_host_is_the_same_to_the_bit_with_and_without_seeds_in_training(compiler: str) -> None:
    model = wrapped(OneLayer(), seeds=5, telemetry=True)
    layer, x = layer_of(model), torch.randn(6, 8)
    graft(layer, [4], "mlp", alpha=0.5)
    layer.request_germination([0, 1, 2], "mlp")
    run = compiled(model, compiler)
    without = step(run, layer.base, x)
    layer.advance([0, 1, 2], S.TRAINING)
    learnt = step(run, layer.base, x)
    assert bits(learnt) == bits(without)
    held = [layer.bank_of(seed) for seed in range(3)]
    for bank, slot in (h for h in held if h is not None):
        for stack in bank.tensors():
            assert stack.grad is not None
            assert bool(stack.grad[slot].any())


@each_compiler
def test_training_beside_dormant_seeds_leaves_the_dormant_graphs_numbers(compiler: str) -> None:
    model = wrapped(OneLayer(), seeds=4)
    layer, x = layer_of(model), torch.randn(6, 8)
    run = compiled(model, compiler)
    dormant = step(run, layer.base, x)  # the plain host's own graph
    layer.request_germination([0, 1, 2, 3], "mlp")
    layer.advance([0, 1, 2, 3], S.TRAINING)
    training = step(run, layer.base, x)
    if compiler == "aot_eager":
        assert bits(training) == bits(dormant)
    else:  # another graph may fuse, and so round, otherwise
        torch.testing.assert_close(training, dormant, atol=1e-6, rtol=1e-6)


def train(
    steps: int, *, scale: float | None, stage: S = S.TRAINING, weight: float = 1.0
) -> tuple[KasminaLayer, list[float]]:
    """A compiled training loop, with a GradScaler or without; the layer and its scales."""
    torch.manual_seed(0)
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer = layer_of(model)
    # Made before the seeds train, as in most scripts; a power of two scales float32 exactly.
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    layer.request_germination([0, 2], "mlp")
    layer.advance([0, 2], S.TRAINING)
    if stage is S.GRAFTING:
        layer.advance([0, 2], stage)
        layer.set_alpha([0, 2], 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run, scales = compiled(model, "aot_eager"), []
    for _ in range(steps):
        x = torch.randn(6, 8)
        optimizer.zero_grad()
        scaler.scale(weight * run(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return layer, scales


@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING], ids=lambda stage: stage.name)
def test_a_grad_scaler_changes_nothing_of_what_seeds_learn(stage: S) -> None:
    plain, scaled = (train(5, scale=scale, stage=stage)[0] for scale in (None, 1024.0))
    first = train(0, scale=None, stage=stage)[0]
    for start, one, other in zip(
        first.blueprint_parameters(),
        plain.blueprint_parameters(),
        scaled.blueprint_parameters(),
        strict=True,
    ):
        assert not torch.equal(one, start)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_step_that_the_scaler_skips_moves_no_blueprint() -> None:
    start, _ = train(0, scale=2.0**127)
    layer, scales = train(1, scale=2.0**127, weight=1e3)
    assert scales == [2.0**126]  # it saw Inf and backed off
    for one, other in zip(layer.parameters(), start.parameters(), strict=True):
        assert torch.equal(one, other)
    assert layer.get_health_report()["reconstruction_loss"][0] > 0


def test_reconstruction_converges_while_the_host_stands_still() -> None:
    torch.manual_seed(0)
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer, x = layer_of(model), torch.randn(32, 8)
    layer.request_germination([1], "mlp")
    layer.advance([1], S.TRAINING)
    before = copy.deepcopy(layer.base.state_dict())
    optimizer = torch.optim.Adam(layer.blueprint_parameters(), lr=0.03)
    run, losses = compiled(model, "eager"), []
    for _ in range(150):
        run(x).sum().backward()  # the model's own loss is no help
        optimizer.step()
        optimizer.zero_grad()
        layer.kasmina.telemetry.forget_blueprints(torch.tensor([1]))
        run(x)
        losses.append(float(layer.get_health_report()["reconstruction_loss"][1]))
    assert losses[-1] < 0.05 * losses[0]
    torch.testing.assert_close(layer.base.state_dict(), before, atol=0, rtol=0)


# One bad blueprint in a thousand.

THOUSAND = 1000


class Thousand(nn.Module):
    """A thousand chunks of two features, and something behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 2 * THOUSAND), nn.Linear(2 * THOUSAND, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(nn.functional.gelu(self.fc(x)))
        return out


class Rootly(nn.Module):
    """Finite in forward; its derivative at 0 is not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner.abs().sqrt()


def spoil(layer: KasminaLayer, seed: int, value: float) -> None:
    held = layer.bank_of(seed)
    assert held is not None
    bank, slot = held
    with torch.no_grad():
        bank.tensors()[0][slot].view(-1)[0] = value


@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.STABILIZATION], ids=lambda s: s.name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_compiler
def test_one_bad_weight_of_a_thousand_seeds_does_not_reach_the_host(
    compiler: str, value: float, stage: S
) -> None:
    torch.manual_seed(0)
    model = wrapped(Thousand(), seeds=THOUSAND, telemetry=True, filter_fn=lambda m, n: n == "fc")
    layer, bad = layer_of(model), 617
    graft(layer, [s for s in range(THOUSAND) if s != bad], "mlp", alpha=0.5)
    layer.request_germination(bad, "mlp")
    run, x = compiled(model, compiler), torch.randn(6, 8)
    host = nn.ModuleList([layer.base, model.get_submodule("out")])
    twin = step(run, host, x)  # the seed holds a blueprint that does not run
    others = [p.grad.clone() for p in layer.blueprint_parameters() if p.grad is not None]
    for _ in range(1 + (stage > S.TRAINING) + (stage > S.GRAFTING)):
        layer.advance(bad, S(int(layer.state.stages[bad]) + 1))
    layer.set_alpha(bad, 0.5)
    spoil(layer, bad, value)
    for count in range(1, 5):
        got = step(run, host, x)
        assert all(bool(t.isfinite().all()) for t in got.values())
        assert bits(got) == bits(twin)
        assert layer.kasmina.telemetry.accumulated[REJECTED].nonzero().tolist() == [[bad]]
        assert layer.kasmina.telemetry.accumulated[REJECTED, bad] == count
    layer.step_epoch()
    assert layer.seeds[bad].stage is S.CULLED
    parameters = list(layer.blueprint_parameters())
    for parameter, other in zip(parameters, others, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 5 * other, atol=0, rtol=1e-6)


@each_compiler
def test_a_gradient_that_is_not_finite_stays_where_it_is(compiler: str) -> None:
    torch.manual_seed(0)
    model = wrapped(Thousand(), seeds=THOUSAND, telemetry=True, filter_fn=lambda m, n: n == "fc")
    layer, bad = layer_of(model), 3
    layer.register_blueprint(Rootly, name="rootly")
    graft(layer, range(10), "rootly", alpha=0.5)
    run, x = compiled(model, compiler), torch.randn(6, 8)
    host = nn.ModuleList([layer.base, model.get_submodule("out")])
    spoil(layer, bad, 0.0)
    got = step(run, host, x)
    assert all(bool(t.isfinite().all()) for t in got.values())
    held = layer.bank_of(bad)
    assert held is not None
    (stack,) = held[0].tensors()
    assert stack.grad is not None
    assert bool(stack.grad.isfinite().all())
    assert [bool(row.all()) for row in stack.grad[:10]] == [s != bad for s in range(10)]
    report = layer.get_health_report()
    assert report["faults"].nonzero().flatten().tolist() == [bad]
