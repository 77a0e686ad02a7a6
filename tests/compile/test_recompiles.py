"""A life compiles dormant, growing, growing with a dynamic batch; under torch's default config."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from graph_cases import OneLayer, layer_of, wrapped
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import (
    GraphMismatch,
    SeedConfig,
    SeedLifecycle,
    capture,
    kasmina_layers,
    kasminify,
    rewrite,
)
from kasmina_fx.passes import passes_for
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

# Coverage doubles the time that torch takes to compile; the files beside this one cover the lines.
pytestmark = pytest.mark.untraced


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 9)
    )


class Life:
    """Random legal commands on every layer of a model."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.layers = list(kasmina_layers(model).values())
        self.random, self.commands = random.Random(seed), 0

    def command(self, *, growing: bool) -> None:
        layer = self.random.choice(self.layers)
        seeds = self.random.sample(range(layer.num_seeds), self.random.randint(1, 3))
        stage = SeedLifecycle(int(layer.state.stages[seeds[0]]))
        same = [s for s in seeds if int(layer.state.stages[s]) == stage]
        self.commands += 1
        if stage is SeedLifecycle.DORMANT:
            if growing:
                assert layer.request_germination(same, "mlp")
        elif stage is SeedLifecycle.GERMINATED:
            if growing:
                layer.advance(same, SeedLifecycle.TRAINING)
            else:
                assert layer.cancel_germination(same)
        elif stage is SeedLifecycle.TRAINING:
            if growing or self.random.random() < 0.3:
                layer.advance(same, SeedLifecycle.GRAFTING)
            else:
                assert layer.cancel_germination(same)
        elif stage is SeedLifecycle.GRAFTING:
            if growing:
                layer.set_alpha(same, self.random.random())
            else:
                layer.advance(same, SeedLifecycle.CULLED)
        else:
            layer.advance(same, SeedLifecycle.DORMANT)

    def count(self, stage: SeedLifecycle) -> int:
        return sum(int((layer.state.stages == stage).sum()) for layer in self.layers)


def step(model: nn.Module, run: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    out = run(x)
    out.square().mean().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return out.detach(), grads


def test_a_whole_life_compiles_three_graphs_and_equals_the_reference() -> None:
    config = SeedConfig(embargo_epochs=0)
    model = kasminify(three_layers(), num_seeds=12, compile=False, config=config)
    backend = RecordingBackend("aot_eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    life = Life(model)
    total = sum(layer.num_seeds for layer in life.layers)
    assert step(model, run, torch.randn(4, 6))[0].shape == (4, 9)
    assert backend.compiles == 1
    phases: list[int] = []
    while life.commands < 1000 or not phases:
        growing = life.commands < 600
        life.command(growing=growing)
        if growing and life.count(SeedLifecycle.GRAFTING) == total and not phases:
            phases.append(life.commands)  # every seed of three layers active
        if life.commands % 20 == 0:
            x = torch.randn(life.random.choice([4, 5, 16, 33, 64, life.random.randint(2, 50)]), 6)
            out, grads = step(model, run, x)
            with reference_mode(model):
                expected, expected_grads = step(model, model, x)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(grads, expected_grads, atol=1e-5, rtol=1e-4)
        assert life.commands < 5000
    assert phases
    while life.count(SeedLifecycle.DORMANT) < total:
        life.command(growing=False)
        assert life.commands < 20_000
    x = torch.randn(7, 6)
    out = step(model, run, x)[0]
    with reference_mode(model):
        assert torch.equal(out, model(x))
    assert backend.compiles <= 3


def test_growing_batches_of_many_sizes_recompile_once() -> None:
    model = wrapped(OneLayer())
    graft(layer_of(model), [0, 2], "mlp")
    backend = RecordingBackend("eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (5, 16, 33, 64, 2, 100):
        assert run(torch.randn(batch, 8)).shape == (batch, 12)
    assert backend.compiles == 2


def test_layers_that_grow_first_take_part_alone_and_all_others_with_the_next() -> None:
    model = kasminify(three_layers(), num_seeds=4, compile=False)
    backend = RecordingBackend("eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    run(torch.randn(4, 6))
    first, *others = kasmina_layers(model).values()
    graft(first, [0], "mlp")
    assert all(layer.kasmina.banks for layer in others)  # for the optimizer
    run(torch.randn(4, 6)).sum().backward()
    assert not any(p.grad is not None for layer in others for p in layer.blueprint_parameters())
    assert all(p.grad is not None for p in first.blueprint_parameters())
    graphs = []
    for layer in (first, *others):
        graft(layer, [1, 2], "mlp")
        run(torch.randn(4, 6)).sum().backward()
        graphs.append(backend.compiles)
    assert graphs == [2, 3, 3]
    assert all(p.grad is not None for layer in others for p in layer.blueprint_parameters())


def test_layers_that_grow_before_a_graph_is_compiled_share_it() -> None:
    model = kasminify(three_layers(), num_seeds=4, compile=False)
    backend = RecordingBackend("eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    run(torch.randn(4, 6))
    first, second, third = kasmina_layers(model).values()
    for layer in (first, second):  # each a transaction of its own
        graft(layer, [0], "mlp")
        model(torch.randn(4, 6))  # eager: compiles nothing
    run(torch.randn(4, 6))
    assert backend.compiles == 2
    assert [len(layer.kasmina.shown.params) for layer in (first, second, third)] == [4, 4, 0]


def test_reserve_starts_in_the_growing_graph_and_keeps_parameters() -> None:
    model = kasminify(three_layers(), num_seeds=8, reserve=8, compile=False)
    backend = RecordingBackend("eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    run(torch.randn(4, 6))
    before = list(model.parameters())
    for layer in kasmina_layers(model).values():
        graft(layer, range(8))
    run(torch.randn(4, 6))
    assert backend.compiles == 1
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_compiles_once(dtype: torch.dtype) -> None:
    # Dynamo makes a float of a float64 scalar, and may compile all of it again without.
    model = wrapped(OneLayer(), seeds=3, telemetry=True).to(dtype)
    layer, recorder = layer_of(model), RecordingBackend()
    graft(layer, [1], "affine")
    store = layer.kasmina
    assert {store.loss_scale.dtype, store.grad_norm.dtype} == {torch.float32}
    torch.compile(model, backend=recorder)(torch.randn(4, 8, dtype=dtype)).sum().backward()
    assert recorder.compiles == 1


def test_blueprints_registered_before_growth_share_its_compile() -> None:
    model = wrapped(OneLayer())
    layer = layer_of(model)
    ids = [layer.register_blueprint(name) for name in ("affine", "lora")]
    backend = RecordingBackend("eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    run(torch.randn(4, 8))
    for seed, blueprint in enumerate(ids):
        graft(layer, seed, blueprint)
        run(torch.randn(4, 8))
    assert backend.compiles == 2


@pytest.mark.parametrize(("lowering", "fewest"), [("fused", 128), ("matmul", 16)])
def test_node_count_does_not_depend_on_the_number_of_seeds(lowering: str, fewest: int) -> None:
    def nodes(seeds: int) -> int:
        torch._dynamo.reset()  # it would call sizes dynamic that two models of a class differ in
        model = wrapped(OneLayer(8192), seeds, telemetry=True)
        graft(layer_of(model), range(0, seeds, 2), "mlp")
        captured = capture(model, torch.randn(2, 8))
        rewritten = rewrite(captured, passes=passes_for(lowering)).graph_module
        return len(rewritten.graph.nodes)

    assert nodes(fewest) == nodes(256) == nodes(4096)


@pytest.mark.slow
def test_first_call_takes_the_same_time_for_16_and_4096_seeds() -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    def spent() -> float:
        # Seconds of processor time, of the C++ compiler too, which is a child of this process where
        # one thread compiles: what else runs on the machine does not count.
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def first_call(seeds: int) -> float:
        torch._dynamo.reset()
        # Chunks of 4 in both: Inductor writes other loops for other chunk sizes.
        model = kasminify(OneLayer(4 * seeds), num_seeds=seeds)
        graft(layer_of(model), range(0, seeds, 2), "mlp")
        x = torch.randn(2, 8)
        with fresh_cache(), config.patch(compile_threads=1):
            start = spent()
            model(x)
            return spent() - start

    first_call(16)  # what a process pays once
    times: dict[int, list[float]] = {16: [], 4096: []}
    for _ in range(5):
        for seeds, taken in times.items():
            taken.append(first_call(seeds))
    few, many = (min(taken) for taken in times.values())
    assert abs(many - few) <= 0.2 * few, times


def test_assert_no_recompiles_gives_dynamos_reason() -> None:
    model = kasminify(OneLayer(), num_seeds=4, compile=False)
    run = torch.compile(model, backend="eager")
    with pytest.raises(GraphMismatch, match="first compile of its code"), assert_no_recompiles():
        run(torch.randn(3, 8))
    with assert_no_recompiles():
        run(torch.randn(3, 8))
    reason = r"(?s)1 compiles.*size mismatch.*3.*4"
    with pytest.raises(GraphMismatch, match=reason), assert_no_recompiles():
        run(torch.randn(4, 8))
    kasmina_fx.kasmina_layers(model)["fc"].request_germination(0, "mlp")
    with pytest.raises(GraphMismatch, match="1 compiles"), assert_no_recompiles():
        run(torch.randn(4, 8))
