"""The loop lowering against plain operators on stacks, and what it is for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_cases import OneLayer, layer_of, wrapped
from kernel_cases import Blend, plain
from site_cases import site
from torch import Tensor, nn

from kasmina_fx import KasminaLayer, capture, kasmina_layers, kasminify, op_counts, rewrite
from kasmina_fx.blueprints.registry import register
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.lowerings import Wanted, lowering_named
from kasmina_fx.passes import passes_for
from kasmina_fx.physical.graph_inputs import BlendArguments
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

LOOP = lowering_named("loop")
KINDS = ("mlp", "residual_mlp", "lora", "affine", "bottleneck")
STAGES = {1: S.GRAFTING, 2: S.TRAINING, 3: S.STABILIZATION}


def loop(asked: BlendArguments) -> tuple[Tensor, Tensor]:
    out, notes = LOOP.blend(asked, Wanted())
    return out, notes


def assert_loop_is_right(case: Blend) -> None:
    """Compare it with stacks: the same operators on the same numbers, and so nearly the same."""
    expected = case.run(plain(""), case.dtype)
    tolerances: Any = {"rtol": 1e-5, "atol": 1e-6} if case.dtype == torch.float32 else {}
    for found, want in zip(case.run(loop, case.dtype), expected, strict=True):
        torch.testing.assert_close(found, want, equal_nan=True, **tolerances)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_blueprint_in_every_mode(kind: str, dtype: torch.dtype) -> None:
    assert_loop_is_right(Blend([5] * 4, dict.fromkeys(STAGES, kind), stages=STAGES, dtype=dtype))


def test_chunks_of_several_sizes_and_blueprints_of_several_kinds() -> None:
    grown = {0: "mlp", 1: "affine", 3: "bottleneck", 4: "mlp"}
    assert_loop_is_right(Blend([3, 3, 2, 2, 2], grown, stages={}))
    assert_loop_is_right(Blend([3, 3, 2, 2, 2], {3: "lora"}, stages={}))  # one run has no bank
    assert_loop_is_right(Blend([7], {0: "mlp"}, stages={}))


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_what_is_not_finite_reaches_no_neighbour(value: float) -> None:
    def poison(layer: KasminaLayer, y: Tensor) -> None:
        (bank,) = layer.kasmina.bank_list()
        bank.tensors()[0].data[0].view(-1)[0] = value
        y[3, 16] = y[0, 2] = value

    for kind in KINDS:
        assert_loop_is_right(
            Blend([5] * 4, dict.fromkeys(STAGES, kind), stages=STAGES, poison=poison)
        )


def test_slots_in_any_order() -> None:
    class Shuffled(Blend):
        def arguments(self) -> tuple[Any, Tensor]:
            asked, grad = super().arguments()
            seeds, positions = torch.tensor([[3], [-1], [0], [2]]), torch.tensor([2, -1, 3, 0])
            modes = torch.tensor([[1], [0], [2], [1]])
            params = [torch.cat([p, p[:2].detach() * 2]) for p in asked.params]
            tables: Any = {"seeds": [seeds], "positions": [positions], "modes": [modes]}
            tables |= {"trainees": [torch.tensor([2, -1])], "params": params}
            return asked._replace(**tables), grad

    assert_loop_is_right(Shuffled([5] * 4, dict.fromkeys((0, 2, 3), "mlp"), stages={}))


def test_it_refuses_many_chunks_and_shared_parameters() -> None:
    why_not = LOOP.why_not(site("dim=-1 runs=9x4"))
    assert why_not == "a subgraph for each of 9 chunks: 4 are the most"
    few = site("dim=-1 runs=4x4")
    assert LOOP.why_not(few) is None
    shared = replace(few, banks=tuple(replace(bank, shared=True) for bank in few.banks))
    assert LOOP.why_not(shared) == "seeds that share parameters go through one product"


def test_nodes_follow_the_chunks_and_not_the_slots() -> None:
    def counts(seeds: list[int]) -> dict[str, int]:
        model = wrapped(OneLayer())  # 4 seeds
        graft(layer_of(model), seeds, "mlp")
        gm = capture(model, torch.randn(3, 8))
        return dict(op_counts(rewrite(gm, passes=passes_for("loop", strict=True)).graph_module))

    one, three = counts([1]), counts([0, 1, 3])
    assert one == three
    assert one["aten.bmm.default"] == 2 * 4
    assert one["aten.split.Tensor"] > 0


class Normed(nn.Sequential):
    """A module for which ``vmap`` insists on the number of rows."""

    def __init__(self, size: int) -> None:
        super().__init__(nn.LayerNorm(size), nn.Linear(size, size))


def graphs_of_a_life(lowering: str) -> int:
    torch._dynamo.reset()
    kind = register(Normed, name="normed")
    model: Any = kasminify(nn.Sequential(nn.Linear(8, 12)), num_seeds=3, compile=False)
    (layer,) = kasmina_layers(model).values()
    backend = RecordingBackend("eager", lowering=lowering)
    run: Any = torch.compile(model, backend=backend, dynamic=True)
    for seed, rows in enumerate((6, 5, 7)):
        graft(layer, seed, kind)
        run(torch.randn(rows, 8))
    return backend.compiles


def test_a_germination_is_data_and_a_users_module_asks_for_no_size() -> None:
    assert graphs_of_a_life("loop") == 1
    assert graphs_of_a_life("matmul") == 3


@pytest.mark.slow
def test_inductor_compiles_it_with_its_backward() -> None:
    torch._dynamo.reset()

    def model(**options: Any) -> Any:
        torch.manual_seed(0)
        made = kasminify(nn.Sequential(nn.Linear(8, 12), nn.GELU()), num_seeds=3, **options)
        graft(kasmina_layers(made)["0"], [0, 2], "mlp")
        return made

    looped, eager = model(options={"lowering": "loop"}), model(compile=False)

    def grads(net: Any, rows: int) -> list[Tensor]:
        torch.manual_seed(rows)
        net.zero_grad()
        net(torch.randn(rows, 8)).square().sum().backward()
        return [p.grad for p in net.parameters()]

    for step in ("two", "three"):
        for found, want in zip(grads(looped, 6), grads(eager, 6), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        if step == "two":
            for net in (looped, eager):
                graft(kasmina_layers(net)["0"], [1], "mlp")
            with assert_no_recompiles():
                grads(looped, 6)
