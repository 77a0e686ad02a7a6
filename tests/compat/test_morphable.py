"""``wrap``, ``MorphableModel``, ``unwrap``: what older code calls, and the traps that are gone."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import assert_same, training_step
from torch import Tensor, nn

from kasmina_fx import KasminaError, SeedLifecycle, kasmina_layers
from kasmina_fx.compat import (
    KasminaAttentionLayer,
    KasminaBatchNorm1dLayer,
    KasminaBatchNorm2dLayer,
    KasminaConv2dLayer,
    KasminaLayer,
    KasminaLayerNormLayer,
    LocalStore,
    MorphableModel,
    SeedLifecycleState,
    unwrap,
    wrap,
)
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

AFFINE = {"scale": torch.tensor([1.0, 2.0]), "shift": torch.tensor([0.5, -0.5])}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8, bias=False))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out


def names(parameters: Any) -> list[str]:
    return [name for name in parameters if name != "self"]


def test_signatures_of_before() -> None:
    assert {name: p.default for name, p in inspect.signature(wrap).parameters.items()} == {
        "model": inspect.Parameter.empty,
        "target_layers": None,
        "seeds_per_layer": 4,
        "cache_size_mb": 128,
        "telemetry_enabled": True,
        "preserve_original": True,
    }
    expected = {
        "__init__": ["wrapped_model", "kasmina_layers", "original_model"],
        "load_kernel": ["layer_name", "seed_idx", "artifact_id"],
        "unload_kernel": ["layer_name", "seed_idx"],
        "get_layer_names": [],
        "get_layer_stats": ["layer_name"],
        "get_model_stats": [],
        "set_seed_alpha": ["layer_name", "seed_idx", "alpha"],
        "enable_telemetry": ["enabled"],
        "compare_with_original": ["x"],
    }
    for method, parameters in expected.items():
        found = inspect.signature(getattr(MorphableModel, method)).parameters
        assert names(found) == parameters, method
    assert names(inspect.signature(unwrap).parameters) == ["morphable_model"]


def test_all_six_types_are_taken_and_the_output_is_the_same_to_the_bit() -> None:
    model, x = Convolutions().eval(), torch.randn(4, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    morphable = wrap(model)
    assert {name: type(layer) for name, layer in morphable.kasmina_layers.items()} == {
        "features_0": KasminaConv2dLayer,
        "features_1": KasminaBatchNorm2dLayer,
        "head_0": KasminaLayer,
        "head_1": KasminaBatchNorm1dLayer,
    }
    assert morphable.get_layer_names() == ["features_0", "features_1", "head_0", "head_1"]
    assert torch.equal(morphable(x), model(x))
    assert not kasmina_layers(model)  # it was copied
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [type(m) for m in wrap(mlp()).kasmina_layers.values()] == [
        KasminaLayer,
        KasminaLayerNormLayer,
        KasminaLayer,
    ]
    assert set(kasmina_layers(morphable)) == {
        f"wrapped_model.{name}" for name in ("features.0", "features.1", "head.0", "head.1")
    }


def test_dtype_mode_hooks_and_bias_are_the_original_layer_s() -> None:
    model = mlp().double().eval()
    model[0].weight.requires_grad_(False)
    morphable = wrap(model)
    first, last = morphable.kasmina_layers["0"], morphable.kasmina_layers["3"]
    assert last.bias is None  # it got a random one
    assert (first.weight.dtype, first.training, first.weight.requires_grad) == (
        torch.float64,
        False,
        False,
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(morphable(x), model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x)))
        return out


def test_shared_modules_and_tied_weights_stay_one() -> None:
    morphable = wrap(Tied())
    assert morphable.get_layer_names() == ["a", "c"]
    inner: Any = morphable.wrapped_model
    assert inner.a is inner.b
    assert inner.c.weight is inner.a.weight
    plain: Any = unwrap(morphable)
    assert plain.a is plain.b
    assert plain.c.weight is plain.a.weight


def test_a_root_that_is_a_target_is_taken() -> None:
    linear, x = nn.Linear(4, 8), torch.randn(3, 4)
    morphable = wrap(linear)
    assert morphable.get_layer_names() == ["model"]
    assert torch.equal(morphable(x), linear(x))
    assert type(unwrap(morphable)) is nn.Linear


def test_types_are_exact_and_what_is_not_supported_is_skipped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm((4, 4)))
    with caplog.at_level(logging.WARNING):
        morphable = wrap(model, target_layers=[nn.Linear, nn.Conv1d, nn.LayerNorm])
    assert morphable.get_layer_names() == ["1", "3"]
    assert "2: a Conv1d is skipped; supported are Linear, Conv2d" in caplog.text


def test_names_that_join_to_one_stay_two_and_seeds_are_not_wrapped_twice() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "a_b": nn.Linear(4, 4)})
    assert wrap(model).get_layer_names() == ["a_b", "a_b_"]
    once = wrap(nn.Sequential(nn.Linear(4, 4))).wrapped_model
    assert wrap(once).get_layer_names() == []


def test_bad_arguments() -> None:
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: wrap(3), "model=3"),  # type: ignore[arg-type]  # the point
        (lambda: wrap(mlp(), seeds_per_layer=0), "seeds_per_layer=0"),
        (lambda: wrap(mlp(), target_layers=["Linear"]), "target_layers holds 'Linear'"),  # type: ignore[list-item]  # the point
        (lambda: unwrap(mlp()), "give a MorphableModel"),  # type: ignore[arg-type]  # the point
    ]
    for call, message in calls:
        with pytest.raises(KasminaError, match=message):
            call()


def test_a_transformer_s_fast_path_does_not_pass_seeds_by() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(3, 4, 8)
    morphable = wrap(block)
    assert isinstance(morphable.kasmina_layers["self_attn"], KasminaAttentionLayer)
    with torch.no_grad():
        torch.testing.assert_close(morphable(x), block(x))
        for name in ("self_attn", "linear1", "norm2"):
            before = morphable(x)
            graft(morphable.kasmina_layers[name], 0, "mlp", 1.0)
            assert float((morphable(x) - before).abs().max()) > 1e-4, name
        with reference_mode(morphable):
            expected = morphable(x)
        torch.testing.assert_close(morphable(x), expected)


def test_kernels_alphas_and_stats(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.save("bend", "affine", 2, AFFINE)
    morphable, x = wrap(mlp()), torch.randn(5, 6)
    for layer in morphable.kasmina_layers.values():
        layer.kernel_cache.store = store
    assert not asyncio.run(morphable.load_kernel("0", 1, "gone"))
    assert not morphable.morphogenetic_active
    assert asyncio.run(morphable.load_kernel("0", 1, "bend"))
    assert morphable.morphogenetic_active
    assert not asyncio.run(morphable.load_kernel("0", 2, "gone"))
    morphable.set_seed_alpha("0", 1, 0.75)
    morphable(x)
    stats = morphable.get_model_stats()
    assert list(stats) == [
        "total_forward_calls",
        "morphogenetic_active",
        "total_kasmina_layers",
        "total_seeds",
        "active_seeds",
        "total_kernel_executions",
        "layer_stats",
    ]
    assert [stats[key] for key in list(stats)[:-1]] == [1, True, 3, 12, 1, 1]
    assert stats["layer_stats"] == morphable.get_layer_stats()
    assert morphable.get_layer_stats("0")["state_stats"]["active_seeds"] == 1
    compared = morphable.compare_with_original(x)
    assert compared["output_shape"] == (5, 8)
    assert compared["morphogenetic_active"]
    assert 0 < compared["mse"] <= compared["max_absolute_difference"] ** 2
    assert asyncio.run(morphable.unload_kernel("0", 1))
    assert not morphable.morphogenetic_active
    compared = morphable.compare_with_original(x)
    assert (compared["mse"], compared["max_absolute_difference"]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="Invalid seed index"):
        asyncio.run(morphable.load_kernel("0", 4, "bend"))


def test_telemetry_of_all_layers() -> None:
    morphable = wrap(mlp(), telemetry_enabled=False)
    assert not any(layer.telemetry_enabled for layer in morphable.kasmina_layers.values())
    morphable.enable_telemetry()
    assert all(layer.telemetry_enabled for layer in morphable.kasmina_layers.values())
    morphable.enable_telemetry(False)
    assert not any(layer.telemetry_enabled for layer in morphable.kasmina_layers.values())


def test_an_unknown_layer_is_named() -> None:
    morphable = wrap(mlp())
    for call in (
        lambda: asyncio.run(morphable.load_kernel("no", 0, "k")),
        lambda: asyncio.run(morphable.unload_kernel("no", 0)),
        lambda: morphable.set_seed_alpha("no", 0, 0.5),
        lambda: morphable.get_layer_stats("no"),
    ):
        with pytest.raises(ValueError, match="Layer 'no' not found in morphable model; it has 0"):
            call()


def test_without_the_original_nothing_is_compared() -> None:
    morphable = wrap(mlp(), preserve_original=False).train().to(torch.float64)
    assert morphable.original_model is None
    with pytest.raises(ValueError, match="Original model not available for comparison"):
        morphable.compare_with_original(torch.randn(5, 6))


def test_parameters_and_state_dict_hold_each_tensor_once_and_not_the_original() -> None:
    morphable, plain = wrap(mlp()), mlp()
    keys = [key.removeprefix("wrapped_model.") for key in morphable.state_dict()]
    assert [key for key in keys if ".kasmina." not in key] == list(plain.state_dict())
    assert len(list(morphable.parameters())) == len(list(plain.parameters()))
    original = morphable.original_model
    assert original is not None
    morphable.double().eval()
    assert (original[0].weight.dtype, original.training) == (torch.float64, False)  # type: ignore[index]  # a Sequential


def test_a_state_dict_of_before_loads() -> None:
    plain, morphable = mlp(), wrap(mlp())
    nn.init.normal_(next(plain.parameters()))
    old: dict[str, Tensor] = {}
    for name, tensor in plain.state_dict().items():
        layer, _, what = name.partition(".")
        norm = layer == "1"
        key = f"{layer}.{what}" if norm else f"{layer}.default_transform.{what}"
        old |= {f"wrapped_model.{key}": tensor, f"kasmina_layers.{key}": tensor}
        old |= {f"original_model.{name}": tensor}
    old["wrapped_model.1.default_transform.weight"] = torch.zeros(16, 8)  # nothing used it
    old["wrapped_model.3.default_transform.bias"] = torch.zeros(8)  # there was none before
    morphable.load_state_dict(old)
    x = torch.randn(5, 6)
    assert torch.equal(morphable(x), plain(x))


def test_unwrap_keeps_what_was_trained() -> None:
    torch.manual_seed(0)
    morphable, x = wrap(mlp()), torch.randn(5, 6)
    optimizer = torch.optim.SGD(morphable.parameters(), lr=0.1)
    for _ in range(3):
        morphable(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = unwrap(morphable)
    assert type(plain) is nn.Sequential
    assert [type(m) for m in plain] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
    assert torch.equal(plain(x), morphable(x))
    assert morphable.compare_with_original(x)["mse"] > 0
    assert len(kasmina_layers(morphable)) == 3  # it goes on


def test_unwrap_folds_what_a_weight_holds_and_loses_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    morphable, x = wrap(mlp()), torch.randn(5, 6)
    layer = morphable.kasmina_layers["0"]
    graft(layer, 0, "affine", 0.5, SeedLifecycle.FOSSILIZED)
    for parameter in layer.blueprint_parameters(False):
        nn.init.normal_(parameter)
    plain = unwrap(morphable)
    assert not kasmina_layers(plain)
    torch.testing.assert_close(plain(x), morphable(x))
    graft(layer, 1, "mlp", 0.5)
    with caplog.at_level(logging.WARNING):
        kept = unwrap(morphable)
    assert kept is morphable.wrapped_model
    assert "not unwrapped" in caplog.text
    assert torch.equal(kept(x), morphable(x))


def test_more_inputs_than_one_and_copies() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
            out: Tensor = self.fc(x + y) * scale
            return out

    morphable, (x, y) = wrap(Two()), torch.randn(2, 3, 4)
    other = copy.deepcopy(morphable)
    other.kasmina_layers["fc"].state_layout.transition_seed_state(0, SeedLifecycleState.ACTIVE)
    assert torch.equal(other(x, y, scale=2.0), morphable(x, y, scale=2.0))
    assert other.get_model_stats()["active_seeds"] == 1
    assert morphable.get_model_stats()["active_seeds"] == 0


@pytest.mark.untraced
def test_compiled_it_equals_the_reference_and_nothing_recompiles() -> None:
    morphable, x = wrap(mlp().double()), torch.randn(5, 6, dtype=torch.float64)
    for name in morphable.get_layer_names():
        graft(morphable.kasmina_layers[name], [0, 1], "mlp", 0.6)
    backend = RecordingBackend("aot_eager")
    run = torch.compile(morphable, backend=backend, fullgraph=True)
    with reference_mode(morphable):
        expected = training_step(morphable, morphable, (x,))  # type: ignore[arg-type]  # a module
    assert_same(training_step(morphable, run, (x,)), expected, 1e-9)  # type: ignore[arg-type]  # a module
    assert backend.compiles == 1
    with assert_no_recompiles():
        morphable.set_seed_alpha("0", 0, 0.2)
        for layer in morphable.kasmina_layers.values():
            graft(layer, [2], "mlp", 0.3)
        run(x.clone().requires_grad_())
