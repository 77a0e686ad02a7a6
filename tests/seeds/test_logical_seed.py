"""One seed as a person sees it: what it says, what it hands on, and its part of the forward."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import (
    IllegalTransition,
    InvalidArgument,
    InvalidType,
    KasminaLayer,
    LogicalSeed,
    SeedIndexError,
    SeedLifecycle,
)
from kasmina_fx.config import SeedConfig
from kasmina_fx.grafting import GraftingConfig
from kasmina_fx.lifecycle import BLENDED, LEARNS_TASK
from kasmina_fx.testing import graft

S = SeedLifecycle
stages = pytest.mark.parametrize("stage", SeedLifecycle, ids=lambda stage: stage.name)


def _layer(base: nn.Module | None = None, **kwargs: Any) -> KasminaLayer:
    sizes = None if base else [3, 2, 2, 3]
    return KasminaLayer(base or nn.Linear(4, 10), 4, chunk_sizes=sizes, layer_id="fc", **kwargs)


def _put(layer: KasminaLayer, seeds: list[int], stage: SeedLifecycle, alpha: float = 0.75) -> None:
    """Seeds with a blueprint of their own in any stage; its numbers are random."""
    blueprints = ("mlp", "lora", "affine", "bottleneck")
    for seed, kind in zip(seeds, blueprints * 2, strict=False):
        assert layer.request_germination(seed, kind)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    layer.state.set_rows(seeds, lifecycle_state=stage)
    layer.set_alpha(seeds, alpha)


# What it says.


def test_a_dormant_seed() -> None:
    layer = _layer()
    seed = layer.seeds[2]
    assert (seed.id, seed.seed_id, seed.layer) == (2, 2, layer)
    assert seed.chunk == slice(5, 7)
    assert seed.stage is S.DORMANT
    assert (seed.blueprint_id, seed.epochs_in_state, seed.grafting_strategy) == (0, 0, 0)
    assert (seed.alpha, seed.is_blended, seed.error_count) == (0.0, False, 0)
    assert seed.health != seed.health  # nothing was seen
    assert repr(seed) == "LogicalSeed('fc', 2, DORMANT)"


def test_every_property_follows_the_layer() -> None:
    layer = _layer()
    seed = layer.seeds[1]
    with layer.transaction():
        layer.request_germination([0, 1], "affine", "DRIFT_CONTROLLED")
        layer.advance([0, 1], S.TRAINING)
    assert seed.stage is S.TRAINING
    assert isinstance(seed.stage, SeedLifecycle)
    assert not seed.is_blended
    layer.advance(1, S.GRAFTING)
    layer.set_alpha(1, 0.25)
    layer.state.increment_epochs()
    assert seed.blueprint_id == 2
    assert (seed.epochs_in_state, seed.grafting_strategy, seed.alpha) == (1, 2, 0.25)
    assert seed.is_blended
    assert repr(seed) == "LogicalSeed('fc', 1, GRAFTING)"
    layer.kasmina.telemetry.faults[1] = 3
    layer(torch.randn(50, 4))
    report = layer.get_health_report()
    assert seed.health == float(report["health"][1])
    assert seed.error_count == 3
    kinds = {
        "id": int,
        "chunk": slice,
        "blueprint_id": int,
        "epochs_in_state": int,
        "grafting_strategy": int,
        "alpha": float,
        "is_blended": bool,
        "health": float,
        "error_count": int,
    }
    for name, kind in kinds.items():
        assert type(getattr(seed, name)) is kind, name


@stages
def test_a_seed_is_blended_in_the_stages_that_blend(stage: SeedLifecycle) -> None:
    layer = _layer()
    _put(layer, [3], stage)
    assert layer.seeds[3].stage is stage
    assert layer.seeds[3].is_blended == (stage in BLENDED)


def test_a_seed_holds_no_state() -> None:
    layer = _layer()
    first, second = layer.seeds[0], LogicalSeed(layer, 0)
    assert set(vars(first)) == {"layer", "seed_id"}
    first.request_germination("affine")
    assert second.stage is S.GERMINATED
    layer.reset(0)
    assert [first.stage, second.stage] == [S.DORMANT, S.DORMANT]


def test_the_state_as_plain_values() -> None:
    layer = _layer()
    graft(layer, [1, 3], "affine", 0.25)
    layer.state.increment_epochs()
    layer.kasmina.telemetry.faults[1] = 2
    layer(torch.randn(50, 4))
    state = layer.seeds[1].get_state()
    values = state.to_dict()
    assert values == {
        "layer_id": "fc",
        "seed_id": 1,
        "chunk_start": 3,
        "chunk_size": 2,
        "stage": "GRAFTING",
        "blueprint_id": 1,
        "epochs_in_state": 1,
        "grafting_strategy": "FIXED_RAMP",
        "alpha": 0.25,
        "health": layer.seeds[1].health,
        "error_count": 2,
    }
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert state.stage is S.GRAFTING
    layer.advance(1, S.CULLED)
    assert state.stage is S.GRAFTING  # of the moment that it was taken
    with pytest.raises(FrozenInstanceError):
        state.alpha = 1.0  # type: ignore[misc]  # that is the point


def test_seeds_are_counted_from_zero_and_not_from_the_end() -> None:
    seeds = _layer().seeds
    assert len(seeds) == 4
    assert [seed.id for seed in seeds] == [0, 1, 2, 3]
    assert [seed.id for seed in seeds[1:3]] == [1, 2]
    assert [seed.id for seed in seeds[::-2]] == [3, 1]
    for wrong in (4, -1):
        with pytest.raises(SeedIndexError, match="fc"):
            seeds[wrong]
    with pytest.raises(InvalidType, match="fc"):
        seeds[1.0]  # type: ignore[call-overload]  # that is the point


# What it hands on.


def test_a_life_through_the_seed() -> None:
    layer = _layer()
    seed = layer.seeds[2]
    shared = layer.register_blueprint("affine")
    assert seed.request_germination(shared, "GRAD_NORM_GATED")
    assert not seed.request_germination()  # it is not dormant any more
    assert (seed.stage, seed.blueprint_id, seed.grafting_strategy) == (S.GERMINATED, shared, 3)
    seed.advance(S.TRAINING)
    seed.advance(3)
    with pytest.raises(IllegalTransition, match=r"fc: seed 2 .*GRAFTING to DORMANT"):
        seed.advance(S.DORMANT)
    seed.set_alpha(1.5)
    assert layer.state.alphas.tolist() == [0, 0, 1, 0]
    assert not seed.cancel()
    seed.reset()
    assert layer.state.rows.tolist() == [[0] * 4] * 4
    assert seed.request_germination()
    assert layer.bank_of(2) is not None
    assert seed.cancel()
    assert layer.state.stages.tolist() == [0, 0, S.CANCELLED, 0]


def test_a_snapshot_of_a_seed_is_of_it_alone() -> None:
    layer = _layer()
    graft(layer, [0, 1], "affine", 0.5)
    seed, scale = layer.seeds[1], layer.kasmina.banks["affine_run1"].get_parameter("scale")
    kept = seed.snapshot()
    with torch.no_grad():
        scale.fill_(7.0)
    seed.set_alpha(1.0)
    layer.seeds[0].set_alpha(1.0)
    seed.rollback(kept, mark=False)
    assert (seed.alpha, seed.stage) == (0.5, S.GRAFTING)
    assert layer.seeds[0].alpha == 1.0
    held = layer.bank_of(1)
    assert held is not None
    assert held[0].slot_tensors(held[1])["scale"].tolist() == [1.0, 1.0]
    seed.rollback(kept)
    assert seed.stage is S.ROLLED_BACK


# Its part of the forward.


BASES: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "linear": (lambda: nn.Linear(4, 10), (6, 4)),
    "tokens": (lambda: nn.Linear(4, 10), (2, 3, 4)),
    "features alone": (lambda: nn.Linear(4, 10), (4,)),
    "convolution": (lambda: nn.Conv2d(3, 10, 2), (2, 3, 4, 3)),
    "convolution, no batch": (lambda: nn.Conv1d(3, 10, 2), (3, 5)),
}


def _slices(layer: KasminaLayer, y: Tensor) -> list[Tensor]:
    """The chunks of an output, by the seeds' own word."""
    dim = layer.chunks.feature_dim
    return [y.narrow(dim, s.chunk.start, s.chunk.stop - s.chunk.start) for s in layer.seeds]


def _check_chunks(layer: KasminaLayer, x: Tensor, stage: SeedLifecycle) -> None:
    """Every seed's own result equals its part of the layer's."""
    y, out = layer.base(x), layer(x)
    for seed, chunk, expected in zip(
        layer.seeds, _slices(layer, y), _slices(layer, out), strict=True
    ):
        found = seed.process_chunk(chunk)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        assert torch.equal(found, chunk) == (stage not in BLENDED)


@stages
@pytest.mark.parametrize("base", ["linear", "convolution"])
def test_processing_a_chunk_equals_the_layers_slice_in_every_stage(
    base: str, stage: SeedLifecycle
) -> None:
    make, shape = BASES[base]
    layer = _layer(make().double())
    _put(layer, [0, 1, 2, 3], stage)
    _check_chunks(layer, torch.randn(*shape, dtype=torch.float64), stage)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("base", BASES)
def test_processing_a_chunk_equals_the_layers_slice_of_any_base(base: str, training: bool) -> None:
    make, shape = BASES[base]
    layer = _layer(make().double()).train(training)
    _put(layer, [0, 1, 2, 3], S.GRAFTING)
    _check_chunks(layer, torch.randn(*shape, dtype=torch.float64), S.GRAFTING)


def test_processing_a_chunk_leaves_the_users_random_numbers() -> None:
    layer = _layer()
    _put(layer, [0], S.GRAFTING)
    before = torch.get_rng_state()
    layer.seeds[0].process_chunk(torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), before)


@stages
def test_the_gradients_of_processing_chunks_are_the_layers(stage: SeedLifecycle) -> None:
    layer = _layer(nn.Linear(4, 10).double())
    layer.kasmina.loss_scale.fill_(8.0)
    _put(layer, [0, 1, 2, 3], stage)
    x, weights = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    tensors = [*layer.base.parameters(), *layer.blueprint_parameters()]

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        total = (out * weights).sum()
        return torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)

    chunks = _slices(layer, layer.base(x))
    parts = [seed.process_chunk(chunk) for seed, chunk in zip(layer.seeds, chunks, strict=True)]
    alone, whole = gradients(torch.cat(parts, -1)), gradients(layer(x))
    for a, b in zip(alone, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)
    learns = stage in LEARNS_TASK or stage is S.TRAINING
    assert any(bool(g.any()) for g in whole[2:]) == learns


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.FOSSILIZED], ids=lambda s: s.name)
def test_a_blueprint_that_is_not_finite_leaves_the_chunk(
    stage: SeedLifecycle, value: float
) -> None:
    layer = _layer()
    _put(layer, [1], stage)
    held = layer.bank_of(1)
    assert held is not None
    with torch.no_grad():
        for tensor in held[0].slot_tensors(held[1]).values():
            tensor.fill_(value)
    x = torch.randn(3, 4)
    y = layer.base(x)
    assert torch.equal(layer.seeds[1].process_chunk(y[:, 3:5]), y[:, 3:5])
    assert torch.equal(layer(x), y)


def test_seeds_that_share_a_blueprint_process_their_own_chunks() -> None:
    layer = _layer(nn.Linear(4, 8))
    graft(layer, [0, 3], layer.register_blueprint("mlp"), 0.5)
    x = torch.randn(5, 4)
    for seed, chunk, expected in zip(
        layer.seeds, _slices(layer, layer.base(x)), _slices(layer, layer(x)), strict=True
    ):
        torch.testing.assert_close(seed.process_chunk(chunk), expected)
        assert torch.equal(expected, chunk) == (seed.id in (1, 2))


def test_half_precision_stays_half_precision() -> None:
    layer = _layer(nn.Linear(4, 10).bfloat16())
    _put(layer, [0, 2], S.GRAFTING)
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    for seed, chunk, expected in zip(
        layer.seeds, _slices(layer, layer.base(x)), _slices(layer, layer(x)), strict=True
    ):
        found = seed.process_chunk(chunk)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_alpha_after_a_ramp_is_what_is_processed_with() -> None:
    layer = _layer(config=SeedConfig(grafting=GraftingConfig(fixed_steps=4)))
    _put(layer, [0], S.GRAFTING, 0.0)
    x = torch.randn(5, 4)
    for alpha in (0.25, 0.5):
        layer.step_epoch()
        assert layer.seeds[0].alpha == alpha
        found = layer.seeds[0].process_chunk(layer.base(x)[:, :3])
        torch.testing.assert_close(found, layer(x)[:, :3])


def test_a_snapshot_beside_a_busy_controller_is_of_one_moment() -> None:
    layer = KasminaLayer(nn.Linear(8, 12), 4, reserve=4)
    done = threading.Event()

    def control() -> None:
        while not done.is_set():
            with layer.transaction():
                layer.reset(0)
                layer.request_germination(0, "mlp")
                layer.advance(0, S.TRAINING)
                layer.advance(0, S.GRAFTING)
                layer.set_alpha(0, 0.5)
            layer.reset(0)

    controller = threading.Thread(target=control)
    controller.start()
    try:
        for _ in range(200):
            seen, row = layer.seeds[0].get_state(), layer.state.get_seed_state(0)
            assert (seen.stage is S.GRAFTING) == (seen.alpha == 0.5) == (seen.blueprint_id > 0)
            assert (row["lifecycle_state"] == S.GRAFTING) == (row["alpha"] == 0.5)
    finally:
        done.set()
        controller.join()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_half_precision_chunks_equal_their_slices_to_the_bit(
    dtype: torch.dtype, autocast: bool
) -> None:
    torch.manual_seed(0)
    layer = KasminaLayer(nn.Linear(4, 64).to(torch.float32 if autocast else dtype), 8)
    graft(layer, range(8), "affine", 0.3)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(5, 4, dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out, host = layer(x), layer.base(x)
        for seed in layer.seeds:
            assert torch.equal(seed.process_chunk(host[:, seed.chunk]), out[:, seed.chunk])


def test_a_chunk_of_another_size_is_refused() -> None:
    layer = KasminaLayer(nn.Linear(4, 8), 4)
    graft(layer, 0, "affine")
    with pytest.raises(InvalidArgument, match="2 features"):
        layer.seeds[0].process_chunk(torch.randn(3, 1))  # which would broadcast
    with pytest.raises(InvalidArgument, match="2 features"):
        layer.seeds[1].process_chunk(torch.randn(3, 8))


def test_a_state_is_plain_json_before_the_first_step() -> None:
    found = KasminaLayer(nn.Linear(4, 8), 4).seeds[1].get_state().to_dict()
    assert found["health"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
