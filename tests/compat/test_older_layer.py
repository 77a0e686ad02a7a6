"""The older layer: every public member, what it does and what it refuses."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import pickle

import pytest
import torch
from layer_cases import assert_same, training_step
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import KasminaError
from kasmina_fx.compat import KasminaLayer, KasminaStateLayout, SeedLifecycleState
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft


def test_the_constructor_has_the_names_order_and_defaults_of_before() -> None:
    signature = inspect.signature(KasminaLayer.__init__)
    assert {name: p.default for name, p in signature.parameters.items() if name != "self"} == {
        "input_size": inspect.Parameter.empty,
        "output_size": inspect.Parameter.empty,
        "num_seeds": 4,
        "cache_size_mb": 128,
        "telemetry_enabled": True,
        "layer_name": "kasmina_layer",
        "oona_client": None,
    }


SIGNATURES = {
    "load_kernel": ["self", "seed_idx", "artifact_id"],
    "unload_kernel": ["self", "seed_idx"],
    "set_seed_alpha": ["self", "seed_idx", "alpha"],
    "get_layer_stats": ["self"],
    "find_compatible_kernels": ["self", "max_memory_mb"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_have_the_signatures_of_before(name: str) -> None:
    method = getattr(KasminaLayer, name)
    assert list(inspect.signature(method).parameters) == SIGNATURES[name]
    assert inspect.iscoroutinefunction(method) == name.endswith("load_kernel")


def test_public_attributes() -> None:
    bus = object()
    layer = KasminaLayer(8, 10, 3, 64, False, "first", bus)
    assert (layer.input_size, layer.output_size, layer.num_seeds) == (8, 10, 3)
    assert (layer.layer_name, layer.telemetry_enabled, layer.oona_client) == ("first", False, bus)
    assert (layer.total_forward_calls, layer.total_kernel_executions) == (0, 0)
    assert isinstance(layer.default_transform, nn.Linear)
    assert layer.default_transform.bias is not None
    assert isinstance(layer.state_layout, KasminaStateLayout)
    assert (layer.kernel_cache.max_entries, layer.kernel_cache.max_cache_size_mb) == (12, 64)
    assert layer.kernel_executor.max_kernel_cache_size == 6
    assert KasminaLayer(4, 200, 100).kernel_cache.max_entries == 64
    assert KasminaLayer(4, 200, 100).kernel_executor.max_kernel_cache_size == 32
    assert layer.error_recovery.get_recovery_stats()["total_errors"] == 0
    assert isinstance(layer, kasmina_fx.KasminaLayer)


def test_dormant_it_is_its_linear_to_the_bit() -> None:
    layer, x = KasminaLayer(8, 10), torch.randn(3, 5, 8)
    assert torch.equal(layer(x), layer.default_transform(x))


def grown(dtype: torch.dtype = torch.float64) -> KasminaLayer:
    torch.manual_seed(0)
    layer = KasminaLayer(8, 10, num_seeds=4).to(dtype)
    graft(layer, [0, 2], "mlp", 0.7)
    for seed in (1, 3):
        layer.state_layout.transition_seed_state(seed, SeedLifecycleState.ACTIVE)
        layer.set_seed_alpha(seed, 0.3)
    for parameter in layer.blueprint_parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def test_alpha_is_applied_once_and_seeds_leave_each_other_alone() -> None:
    layer, x = grown(), torch.randn(5, 8, dtype=torch.float64)
    y = layer.default_transform(x)
    expected = []
    for seed, (part, alpha) in enumerate(
        zip(layer.chunks.split_tensor(y), (0.7, 0.3, 0.7, 0.3), strict=True)
    ):
        held = layer.bank_of(seed)
        assert held is not None
        own = {name: t.detach() for name, t in held[0].slot_tensors(held[1]).items()}
        blueprint: nn.Module = held[0].blueprint.module(held[0].run.size).double()
        made: Tensor = torch.func.functional_call(blueprint, own, part)
        expected.append((1 - alpha) * part + alpha * made)  # not alpha squared, nor their sum
    torch.testing.assert_close(layer(x), torch.cat(expected, -1))


def test_seeds_work_inside_an_event_loop_too() -> None:
    layer, x = grown(), torch.randn(5, 8, dtype=torch.float64)

    async def inside() -> Tensor:
        out: Tensor = layer(x)
        return out

    assert torch.equal(asyncio.run(inside()), layer(x))
    assert not torch.allclose(layer(x), layer.default_transform(x))


@pytest.mark.untraced
def test_compiled_it_equals_eager_and_is_lowered_and_state_is_data() -> None:
    layer, x = grown(), torch.randn(5, 8, dtype=torch.float64)
    with reference_mode(layer):
        expected = training_step(layer, layer, (x,))
    assert_same(training_step(layer, layer, (x,)), expected, 1e-10)
    backend = RecordingBackend("aot_eager")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert_same(training_step(layer, compiled, (x,)), expected, 1e-10)
    (before,), (after,) = backend.before, backend.after
    assert kasmina_fx.op_counts(before)["kasmina.blend.default"] == 1
    assert "kasmina.blend.default" not in kasmina_fx.op_counts(after)
    with assert_no_recompiles():
        layer.set_seed_alpha(0, 0.1)
        layer.state_layout.alpha_blend[2] = 0.9
        layer.state_layout.transition_seed_state(3, SeedLifecycleState.DORMANT)
        for _ in range(3):  # counters of calls cost no compile
            got = compiled(x.clone().requires_grad_())
    with reference_mode(layer):
        torch.testing.assert_close(got, layer(x))


def test_blueprints_are_parameters_and_learn() -> None:
    layer, x = grown(), torch.randn(5, 8, dtype=torch.float64)
    names = dict(layer.named_parameters())
    stacks = [name for name in names if "banks" in name]
    assert stacks
    assert set(stacks) <= set(layer.state_dict())
    layer(x).square().sum().backward()
    assert all(names[name].grad is not None for name in stacks)


def test_a_fossilized_seed_stays_in_effect() -> None:
    layer, x = grown(), torch.randn(5, 8, dtype=torch.float64)
    before = layer(x)
    layer.state_layout.transition_seed_state(0, SeedLifecycleState.FOSSILIZED)
    assert torch.equal(layer(x), before)


def test_set_seed_alpha_clamps() -> None:
    layer = KasminaLayer(8, 10)
    for given, kept in ((0.0, 0.0), (0.5, 0.5), (1.5, 1.0), (-0.5, 0.0)):
        layer.set_seed_alpha(1, given)
        assert float(layer.state_layout.alpha_blend[1]) == kept
    with pytest.raises(KasminaError, match="NaN"):
        layer.set_seed_alpha(1, float("nan"))


@pytest.mark.parametrize("bad", [-1, 4, None, True])
def test_a_bad_index_raises_and_changes_nothing(bad: int) -> None:
    layer = grown()
    before = layer.state.rows.clone(), layer.state.alphas.clone()
    for call in (
        lambda: asyncio.run(layer.load_kernel(bad, "any")),
        lambda: asyncio.run(layer.unload_kernel(bad)),
        lambda: layer.set_seed_alpha(bad, 0.5),
        lambda: layer.save_kernel(bad, "any"),
    ):
        with pytest.raises(ValueError, match="Invalid seed index: "):
            call()
    assert torch.equal(layer.state.rows, before[0])
    assert torch.equal(layer.state.alphas, before[1])


def test_calls_are_counted_and_the_stats_have_the_keys_of_before() -> None:
    layer, x = KasminaLayer(64, 32, telemetry_enabled=False, layer_name="seen"), torch.randn(8, 64)
    for _ in range(3):
        layer(x)
    layer.state_layout.transition_seed_state(0, SeedLifecycleState.ACTIVE, kernel_id=1)
    layer.state_layout.alpha_blend[0] = 0.5
    for _ in range(2):
        layer(x)
    stats = layer.get_layer_stats()
    assert stats["layer_name"] == "seen"
    assert stats["total_forward_calls"] == 5
    assert stats["total_kernel_executions"] == 2
    assert stats["kernel_execution_ratio"] == pytest.approx(0.4)
    assert stats["telemetry_enabled"] is False
    assert stats["state_stats"] == layer.state_layout.get_stats()
    assert stats["cache_stats"] == layer.kernel_cache.get_cache_stats()
    assert stats["error_recovery_stats"] == layer.error_recovery.get_recovery_stats()
    layer.total_forward_calls = 10  # as tests of older code do
    assert layer.get_layer_stats()["kernel_execution_ratio"] == pytest.approx(0.2)


def test_to_returns_the_layer_with_all_of_its_state() -> None:
    layer = grown(torch.float32)
    assert layer.to(torch.device("cpu")) is layer
    assert layer.to(torch.float64, non_blocking=True) is layer
    assert layer.weight.dtype == torch.float64
    assert layer.state_layout.get_active_count() == 4


def test_more_seeds_than_features_are_not_made_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        layer = KasminaLayer(10, 2, layer_name="head")
    assert layer.num_seeds == 2
    assert "head: 2 features have 2 seeds, not 4" in caplog.text
    for bad in (0, -1, "4", None):
        with pytest.raises(KasminaError, match="num_seeds="):
            KasminaLayer(10, 2, num_seeds=bad)  # type: ignore[arg-type]  # the point
    with pytest.raises(KasminaError, match="cache_size_mb="):
        KasminaLayer(10, 2, cache_size_mb=-1)


def test_around_takes_a_module_as_it_is() -> None:
    linear = nn.Linear(8, 10, bias=False, dtype=torch.float64).eval()
    layer = KasminaLayer.around(linear, num_seeds=2, layer_name="taken")
    assert layer.default_transform is linear
    assert layer.bias is None
    assert not layer.training
    assert (layer.input_size, layer.output_size, layer.layer_name) == (8, 10, "taken")
    assert KasminaLayer.around(nn.Embedding(3, 6)).input_size == 6
    with pytest.raises(KasminaError, match="base=3: give a Module"):
        KasminaLayer.around(3)  # type: ignore[arg-type]  # the point


def test_default_transform_can_t_be_replaced_under_its_seeds() -> None:
    layer = KasminaLayer(8, 10)
    with pytest.raises(KasminaError, match=r"KasminaLayer\.around"):
        layer.default_transform = nn.Linear(8, 10)  # type: ignore[misc]  # the point


def test_a_state_dict_of_before_loads() -> None:
    linear, layer = nn.Linear(8, 10), KasminaLayer(8, 10)
    old = {f"default_transform.{name}": t for name, t in linear.state_dict().items()}
    kept = dict(old)
    layer.load_state_dict(old)
    assert old.keys() == kept.keys()
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)
    layer.load_state_dict(linear.state_dict())  # a plain one as well
    without = KasminaLayer.around(nn.Linear(8, 10, bias=False))
    without.load_state_dict(old)  # the bias that it should never have had is left
    assert torch.equal(without.weight, linear.weight)


def test_copies_and_pickles_work_and_are_their_own() -> None:
    layer, x = grown(), torch.randn(5, 8, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        other.state_layout.alpha_blend[0] = 0.0
        assert float(layer.state_layout.alpha_blend[0]) == pytest.approx(0.7, abs=1e-3)
        assert other.state_layout.get_active_count() == 4
        assert not torch.equal(other(x), layer(x))


def test_health_score_of_before() -> None:
    assert KasminaLayer._compute_health_score(torch.tensor([3.0, 4.0])) == pytest.approx(1 / 6)
