"""A layer, an MLP, a CNN and an attention block of older code, trained in both implementations.

Each is built twice with the same weights and seeds, and trained for 50 steps while its seeds live:
one runs seed by seed ("legacy"), the other over all chunks at once ("chunked").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from hybrid_cases import flags_in_memory
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_fx import HybridKasminaLayer, SeedLifecycle, ab, kasmina_layers, step_epoch
from kasmina_fx.compat import (
    KasminaAttentionLayer,
    KasminaLayer,
    SeedLifecycleState,
    wrap,
)
from kasmina_fx.layer import KasminaLayer as Layer
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import graft

STEPS, SEEDS = 50, 6
#: Largest difference of a loss, which is about 1 at first; both implementations run in float32.
SAME = 1e-5
LEGACY, CHUNKED = "legacy", "chunked"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads wait for each other at each of thousands of small operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Attention(nn.Module):
    """A block as older code writes it: attention by the older class, around it plain modules."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList([nn.LayerNorm(12), nn.LayerNorm(12)])
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.attention(x, x, x)[0])
        out: Tensor = self.norms[1](x + self.mlp(x))
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 12))


def cnn() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 12))


def block() -> nn.Module:
    return Attention(nn.MultiheadAttention(12, 2, batch_first=True))


class Scenario(NamedTuple):
    older: Callable[[], nn.Module]  # by the older calls
    plain: Callable[[], nn.Module]  # its modules, for hybrid layers
    shape: tuple[int, ...]


SCENARIOS = {
    "a single layer": Scenario(
        lambda: KasminaLayer(8, 12, num_seeds=SEEDS), lambda: nn.Linear(8, 12), (16, 8)
    ),
    "a wrapped MLP": Scenario(lambda: wrap(mlp(), seeds_per_layer=SEEDS), mlp, (16, 8)),
    "a wrapped CNN": Scenario(lambda: wrap(cnn(), seeds_per_layer=SEEDS), cnn, (8, 3, 6, 6)),
    "an attention block": Scenario(
        lambda: wrap(
            Attention(KasminaAttentionLayer(12, 2, batch_first=True, num_seeds=SEEDS)),
            seeds_per_layer=SEEDS,
        ),
        block,
        (4, 5, 12),
    ),
}


def with_hybrids(model: nn.Module, mode: str, path: str = "model") -> nn.Module:
    """Put hybrid layers around all that ``wrap`` would take; blueprints' values go by their ids."""
    taken = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.MultiheadAttention)

    def hybrid(module: nn.Module) -> nn.Module:
        layer = HybridKasminaLayer(
            module, path, SEEDS, feature_flags=flags_in_memory(), fallback=False
        )
        layer.force_implementation = mode
        return layer

    if isinstance(model, taken):
        return hybrid(model)
    for name, child in model.named_children():
        model.add_module(name, with_hybrids(child, mode, f"{path}.{name}"))
    return model


def sow(layers: list[Layer]) -> None:
    """One seed at each of these stages; the sixth sleeps."""
    stages = (
        SeedLifecycle.TRAINING,
        SeedLifecycle.GRAFTING,
        SeedLifecycle.EVALUATING,
        SeedLifecycle.FINE_TUNING,
        SeedLifecycle.FOSSILIZED,
    )
    kinds = ("lora", "mlp", "affine", "mlp", "affine")
    for layer in layers:
        for seed, (stage, kind) in enumerate(zip(stages, kinds, strict=True)):
            graft(layer, seed, kind, 0.2 + 0.1 * seed, stage)
        for parameter in layer.blueprint_parameters(False):
            nn.init.normal_(parameter, std=0.3)


def live(layers: list[Layer], step: int) -> None:
    """What happens to the seeds while the model learns, in both runs at the same steps."""
    for layer in layers:
        if step == 10:
            graft(layer, 5, "mlp", 0.4, SeedLifecycle.GRAFTING)  # the last one wakes
        elif step == 20:
            layer.advance(0, SeedLifecycle.GRAFTING)
        elif step == 30:
            layer.state.batch_set_lifecycle_state([1], SeedLifecycle.FOSSILIZED)
        elif step == 40:
            layer.advance(3, SeedLifecycle.CULLED)


def losses_of(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    mode: str,
    run_of: Callable[[nn.Module], Any] = lambda model: model,
    grow: bool = True,
    steps: int = STEPS,
) -> list[float]:
    """Train with SGD and momentum: cross-entropy of twelve classes."""
    torch.manual_seed(0)
    model = build()
    layers: list[Layer] = list(kasmina_layers(model).values())
    if grow:
        sow(layers)
    run = run_of(model)
    torch.manual_seed(1)
    x, found = torch.randn(shape), []
    labels = torch.randint(0, 12, (x.shape[0],) if x.dim() != 3 else x.shape[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        if grow:
            live(layers, step)
        with reference_mode(model) if mode == LEGACY else nullcontext():
            loss = F.cross_entropy(run(x).flatten(0, -2), labels.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            step_epoch(model)  # ramps go on
        found.append(float(loss.detach()))
    return found


def largest(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def assert_the_same_and_learning(legacy: list[float], chunked: list[float]) -> None:
    assert len(legacy) == len(chunked) == STEPS
    assert largest(legacy, chunked) <= SAME
    assert chunked[-1] < 0.9 * chunked[0]


LONGEST = "an attention block"
LONGEST_IS_SLOW = [pytest.param(n, marks=[pytest.mark.slow] * (n == LONGEST)) for n in SCENARIOS]


@pytest.mark.parametrize("name", SCENARIOS)
def test_older_calls_train_to_the_same_loss_in_both(name: str) -> None:
    build, _, shape = SCENARIOS[name]
    legacy, chunked = (losses_of(build, shape, mode) for mode in (LEGACY, CHUNKED))
    assert_the_same_and_learning(legacy, chunked)
    # Were seeds not run at all, both would agree as well.
    without = losses_of(build, shape, CHUNKED, grow=False, steps=5)
    assert largest(without, chunked[:5]) > 100 * SAME


@pytest.mark.parametrize("name", LONGEST_IS_SLOW)
def test_hybrid_layers_train_to_the_same_loss_in_both(name: str) -> None:
    _, plain, shape = SCENARIOS[name]

    def trained(mode: str) -> list[float]:
        # The layers choose: none of them is in the reference's mode.
        return losses_of(lambda: with_hybrids(plain(), mode), shape, CHUNKED)

    assert_the_same_and_learning(trained(LEGACY), trained(CHUNKED))


@pytest.mark.slow
@pytest.mark.untraced
@pytest.mark.parametrize("name", SCENARIOS)
def test_compiled_models_train_to_the_loss_of_legacy(name: str) -> None:
    build, _, shape = SCENARIOS[name]
    compiled = losses_of(build, shape, CHUNKED, lambda m: torch.compile(m, backend="kasmina"))
    assert_the_same_and_learning(losses_of(build, shape, LEGACY), compiled)


def test_the_comparison_of_both_says_parity() -> None:
    _, plain, shape = SCENARIOS["an attention block"]
    model = with_hybrids(plain(), CHUNKED)
    sow(list(kasmina_layers(model).values()))
    report = ab.compare(model, torch.randn(shape), steps=5, bounds=ab.Bounds(loss=SAME))
    assert report.parity, report.reasons


def test_older_states_are_among_those_that_are_trained() -> None:
    layer = KasminaLayer(8, 12, num_seeds=SEEDS)
    sow([layer])
    found = {SeedLifecycleState(state) for state in layer.state_layout.lifecycle_states.tolist()}
    live([layer], 40)
    found |= {SeedLifecycleState(state) for state in layer.state_layout.lifecycle_states.tolist()}
    assert found == set(SeedLifecycleState)
