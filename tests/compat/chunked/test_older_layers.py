"""The older chunked and hybrid layers: calls, lives of seeds, reports, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from typing import Any

import pytest
import torch
from layer_cases import assert_same, training_step
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import FeatureFlagManager, KasminaError, reference
from kasmina_fx.compat.chunked import (
    ChunkedKasminaLayer,
    HybridKasminaLayer,
    LogicalSeed,
    SeedLifecycle,
)
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles

S = SeedLifecycle


def chunked(num_seeds: int = 4, **options: Any) -> ChunkedKasminaLayer:
    torch.manual_seed(0)
    return ChunkedKasminaLayer(nn.Linear(4, 10), num_seeds, "fc", **options)


def hybrid(mode: str | None = "legacy") -> HybridKasminaLayer:
    torch.manual_seed(0)
    return HybridKasminaLayer(nn.Linear(4, 10), "fc", 4, force_implementation=mode)


MAKERS = pytest.mark.parametrize("make", [chunked, hybrid])


@MAKERS
def test_a_life_of_before(make: Any) -> None:
    layer, x = make(), torch.randn(6, 4)
    base = layer.base_layer(x)
    assert torch.equal(layer(x), base)
    assert layer.request_germination(1, "mlp")
    assert not layer.request_germination(1, "mlp")  # not dormant
    assert layer.state_tensor.get_lifecycle_states().tolist() == [0, S.LOADING, 0, 0]
    assert torch.equal(layer(x), base)  # alpha is 0 yet
    for _ in range(15):
        layer.step_epoch()
    assert float(layer.state_tensor.alpha_blend[1]) == 0.5
    half = layer(x)
    torch.testing.assert_close(half, reference.forward(layer, x))
    assert not torch.allclose(half, base)
    assert torch.equal(half[:, :3], base[:, :3])
    for _ in range(15):
        layer.step_epoch()
    known = layer.state_tensor.get_seed_state(1)
    assert (known["lifecycle_state"], known["alpha_blend"]) == (S.ACTIVE, 1.0)
    assert known["epochs_in_state"] == 0
    assert layer.cancel_germination(1)
    assert not layer.cancel_germination(1)
    assert torch.equal(layer(x), base)
    assert layer.state_tensor.get_seed_state(1)["blueprint_id"] == 0


@pytest.mark.untraced
def test_compiled_it_equals_eager_and_is_lowered_and_its_life_is_data() -> None:
    layer, x = chunked().double(), torch.randn(6, 4, dtype=torch.float64)
    layer.request_germination([0, 2], "mlp")
    backend = RecordingBackend("eager")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert_same(training_step(layer, compiled, (x,)), training_step(layer, layer, (x,)), 1e-10)
    (before,), (after,) = backend.before, backend.after
    assert kasmina_fx.op_counts(before)["kasmina.blend.default"] == 1
    assert "kasmina.blend.default" not in kasmina_fx.op_counts(after)
    with assert_no_recompiles():
        for _ in range(3):
            layer.step_epoch()
            compiled(x.clone().requires_grad_())
        layer.state_tensor.set_lifecycle_state(0, S.ACTIVE)
        layer.request_germination(1, "mlp")
        layer.cancel_germination(2)
        got = compiled(x.clone().requires_grad_())
    torch.testing.assert_close(got, reference.forward(layer, x))
    assert layer.forward_count == 1  # the eager one


def test_blueprints_have_ids_from_one_and_their_values_of_now() -> None:
    layer, module = chunked(2), nn.Linear(5, 5)
    assert (layer.next_blueprint_id, len(layer.blueprints)) == (1, 0)
    shared = layer.register_blueprint(module)
    factory = layer.register_blueprint("affine")
    assert (shared, factory, layer.next_blueprint_id) == (1, 2, 3)
    assert list(layer.blueprints) == [1, 2]
    assert 3 not in layer.blueprints
    with pytest.raises(KeyError):
        layer.blueprints[3]
    assert isinstance(layer.blueprints[2], nn.Module)  # never used
    layer.request_germination(0, shared)
    layer.request_germination(1, "mlp")
    assert list(layer.blueprints) == [1, 2, 3]
    assert layer.get_layer_stats()["num_blueprints"] == 3
    layer.state_tensor.batch_set_lifecycle_state([0, 1], S.ACTIVE)
    layer.state_tensor.update_alpha_blend([0, 1], 1.0)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.mul_(2.0)
    x = torch.randn(3, 4)
    y = layer.base_layer(x)
    expected = torch.cat([layer.blueprints[1](y[:, :5]), layer.blueprints[3](y[:, 5:])], 1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.blueprints[1].weight, module.weight * 2.0)


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


def test_a_seed_may_be_made_active_first_and_get_its_blueprint_then() -> None:
    layer, x = chunked(2), torch.randn(6, 4)
    for seed, module in enumerate((nn.Identity(), _Twice())):
        number = layer.register_blueprint(module)
        layer.state_tensor.set_lifecycle_state(seed, S.ACTIVE)
        layer.state_tensor.set_blueprint(seed, number)
        layer.state_tensor.update_alpha_blend(torch.tensor([seed]), torch.tensor([1.0]))
        assert isinstance(layer.blueprints[number], type(module))
    base = layer.base_layer(x)
    torch.testing.assert_close(layer(x), torch.cat([base[:, :5], 2.0 * base[:, 5:]], 1))
    assert layer(torch.randn(0, 4)).shape == (0, 10)


def test_counts_and_times_are_of_calls_that_python_made() -> None:
    layer, x = chunked(), torch.randn(6, 4)
    assert layer.get_layer_stats()["avg_latency_ms"] == 0.0
    for _ in range(3):
        layer(x)
    stats = layer.get_layer_stats()
    assert (layer.forward_count, stats["forward_count"]) == (3, 3)
    assert 0.0 < layer.total_latency < 60.0
    assert stats["avg_latency_ms"] == pytest.approx(1e3 * layer.total_latency / 3)
    assert (stats["output_dim"], stats["chunks_per_seed"]) == (10, 2.5)
    assert stats["layer_id"] == "fc"


@MAKERS
def test_reports_are_plain_and_hold_what_the_state_says(make: Any) -> None:
    layer, x = make(), torch.randn(64, 4)
    layer.request_germination(2, "lora", 1)
    layer.step_epoch()
    out = layer(x).detach()
    report = layer.get_health_report()
    seeds = report["seeds"]
    assert [seed["lifecycle_state"] for seed in seeds] == ["DORMANT"] * 2 + ["LOADING", "DORMANT"]
    assert (seeds[2]["grafting_strategy"], seeds[2]["epochs_in_state"]) == (1, 1)
    assert seeds[2]["blueprint_id"] == 1
    assert [seed["chunk_idx"] for seed in seeds] == [0, 1, 2, 3]
    for part, told in zip(out.split([3, 3, 2, 2], 1), report["telemetry"], strict=True):
        assert told["mean"] == pytest.approx(float(part.mean()), abs=1e-5)
        assert told["variance"] == pytest.approx(float(part.var(correction=0)), rel=1e-4)
    kept = ("layer_id", "timestamp", "seeds", "telemetry", "performance")
    json.dumps({name: report[name] for name in kept})
    assert report["performance"]["forward_count"] == 1
    assert layer.get_health_report()["telemetry"] == report["telemetry"]  # reading forgets nothing
    layer.state_tensor.reset_telemetry()
    empty = layer.get_health_report()
    assert empty["telemetry"] == [{"mean": 0.0, "variance": 0.0}] * 4
    assert [seed["health_score"] for seed in empty["seeds"]] == [1.0] * 4


def test_telemetry_can_be_off() -> None:
    layer = chunked(enable_telemetry=False)
    layer(torch.randn(6, 4))
    assert not layer.enable_telemetry
    assert layer.state_tensor.telemetry_count.tolist() == [0] * 4


def test_dimensions_are_the_base_s() -> None:
    assert (chunked().input_dim, chunked().output_dim) == (4, 10)
    conv = ChunkedKasminaLayer(nn.Conv2d(3, 8, 3), 4)
    assert (conv.input_dim, conv.output_dim) == (3, 8)
    norm = ChunkedKasminaLayer(nn.LayerNorm(6), 3)
    assert (norm.input_dim, norm.output_dim) == (6, 6)
    assert chunked().chunk_manager.chunk_starts.tolist() == [0, 3, 6, 8]
    assert chunked(device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize("kind", [ChunkedKasminaLayer, HybridKasminaLayer])
def test_bad_constructors_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="Cannot determine dimensions from base layer"):
        kind(nn.ReLU())
    for bad in (0, -1, 2.5, None):
        with pytest.raises(KasminaError, match="num_seeds="):
            kind(nn.Linear(2, 2), num_seeds=bad)
    with pytest.raises(KasminaError, match="base_layer="):
        kind(3)


def test_ids_above_the_last_are_told_and_give_false(caplog: pytest.LogCaptureFixture) -> None:
    layer = chunked()
    with caplog.at_level(logging.ERROR):
        assert layer.request_germination(4, "mlp") is False
    assert "fc: there is no seed 4; it has seeds 0 to 3" in caplog.text
    for bad in (-1, 4):
        with pytest.raises(ValueError, match="does not exist"):
            layer.cancel_germination(bad)
    for wrong in ("1", 1.0, True):
        with pytest.raises(TypeError):
            layer.request_germination(wrong, "mlp")  # type: ignore[arg-type]  # the point


def test_a_cancel_of_seeds_that_can_t_all_be_changes_none() -> None:
    layer = chunked()
    layer.request_germination([0, 1], "mlp")
    assert not layer.cancel_germination([0, 1, 2])
    assert layer.state_tensor.get_lifecycle_states().tolist() == [1, 1, 0, 0]


def test_a_plain_checkpoint_loads_and_state_dicts_hold_seeds() -> None:
    layer, other, x = chunked(), chunked(), torch.randn(6, 4)
    layer.request_germination([0, 3], "mlp")
    for _ in range(40):
        layer.step_epoch()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert other.state_tensor.get_lifecycle_states().tolist() == [S.ACTIVE, 0, 0, S.ACTIVE]
    plain = nn.Linear(4, 10)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.base_layer.weight, plain.weight)  # type: ignore[arg-type]  # a Tensor
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(copied(x), other(x))
        assert copied.forward_count == 2
    assert other.forward_count == 3


# The hybrid layer.


def test_both_ways_give_the_same_for_any_mix_of_seeds() -> None:
    layer, x = hybrid(), torch.randn(6, 4)
    layer.request_germination([0, 1, 2], "mlp")
    layer.state_tensor.batch_set_lifecycle_state([1], S.ACTIVE)
    layer.state_tensor.batch_set_lifecycle_state([2], S.FOSSILIZED)
    layer.state_tensor.update_alpha_blend([0, 1, 2], torch.tensor([0.3, 0.8, 1.0]))
    steps = {}
    for name in ("legacy", "chunked"):
        layer.force_implementation = name
        steps[name] = training_step(layer, layer, (x,))
    assert_same(steps["chunked"], steps["legacy"], 1e-6)
    assert layer.get_implementation_stats()["calls"] == {"legacy": 1, "chunked": 1}
    assert layer.forward_count == 2
    assert layer.implementation_calls == {"legacy": 1, "chunked": 1}
    assert min(layer.implementation_latency.values()) > 0.0
    assert layer.legacy_available
    assert layer.chunked_available


def test_modes_and_settling_keep_state_and_calls() -> None:
    layer, x = hybrid(None), torch.randn(6, 4)
    layer.switch._flags = FeatureFlagManager("no_such_file.json")
    assert layer.get_layer_stats()["implementation"] == "legacy"
    layer.enable_chunked_mode()
    assert layer.request_germination(1, "mlp")
    assert layer.get_layer_stats()["implementation"] == "chunked"
    assert set(layer.get_layer_stats()["avg_latency_ms"]) == {"legacy", "chunked"}
    layer.enable_legacy_mode()
    layer.state_tensor.update_alpha_blend(1, 0.5)
    expected: Tensor = layer(x)
    layer.enable_auto_mode()
    layer.set_model_context("m")
    settled = layer.settle()
    assert type(settled) is ChunkedKasminaLayer
    torch.testing.assert_close(settled(x), expected)
    assert settled.forward_count == 2
    assert isinstance(settled.get_layer_stats()["avg_latency_ms"], float)
    assert LogicalSeed.of_layer(settled, 1).get_state().lifecycle_state is S.LOADING


@pytest.mark.untraced
def test_in_a_compiled_model_a_switch_back_and_forth_compiles_once() -> None:
    layer, x = hybrid("legacy"), torch.randn(6, 4)
    layer.request_germination([0, 2], "mlp")
    layer.state_tensor.update_alpha_blend([0, 2], 0.5)
    layer.compile(backend=RecordingBackend("eager"))  # no C++ compiler: it is not what is tested
    model = nn.Sequential(layer, nn.Tanh())
    compiled = torch.compile(model, backend=RecordingBackend("eager"))
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected)
    layer.enable_chunked_mode()
    torch.testing.assert_close(compiled(x), expected, atol=1e-6, rtol=1e-6)
    with assert_no_recompiles():
        for switch in (layer.enable_legacy_mode, layer.enable_chunked_mode):
            switch()
            torch.testing.assert_close(compiled(x), expected, atol=1e-6, rtol=1e-6)
