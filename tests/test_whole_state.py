"""State dicts of whole models: refused as a whole, named as their user names them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
    LayoutMismatch,
    SeedConfig,
    SeedLifecycle,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.grafting import GraftingConfig
from kasmina_fx.testing import graft

S = SeedLifecycle


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))
    return kasminify(net, num_seeds=4, compile=False)


def grown() -> nn.Sequential:
    net = network()
    for layer in kasmina_layers(net).values():
        graft(layer, [1, 2])
    return net


def contents(net: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(dict(net.state_dict()))


def assert_unchanged(net: nn.Module, before: dict[str, Any]) -> None:
    now = net.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(value, now[name]) if isinstance(value, Tensor) else value == now[name]
        assert same, name


@pytest.mark.parametrize("prefix", ["", "inner."])
@pytest.mark.parametrize("name", ["2.weight", "3.bias", "0.bias"])
def test_a_shape_that_does_not_fit_is_refused_before_anything_changes(
    name: str, prefix: str
) -> None:
    saved = {prefix + key: value for key, value in contents(grown()).items()}
    saved[prefix + name] = torch.zeros(3, 3)
    net = network()
    root = nn.ModuleDict({"inner": net}) if prefix else net
    before = contents(root)
    with pytest.raises(LayoutMismatch, match=rf"size mismatch for {prefix}{name}.*\(3, 3\)"):
        root.load_state_dict(saved)
    assert_unchanged(root, before)


def test_seeds_of_some_layers_alone_are_refused() -> None:
    saved = {k: v for k, v in contents(grown()).items() if not k.startswith("2.kasmina.")}
    net = network()
    before = contents(net)
    with pytest.raises(LayoutMismatch, match=r"seeds of 1 layers and none of \['2'\]"):
        net.load_state_dict(saved, strict=False)
    assert_unchanged(net, before)


@pytest.mark.parametrize("prefix", ["", "inner."])
def test_names_are_those_of_the_plain_model(prefix: str) -> None:
    saved = {prefix + key: value for key, value in contents(grown()).items()}
    del saved[prefix + "0.weight"]
    saved[prefix + "2.other"] = torch.zeros(1)
    net = network()
    root = nn.ModuleDict({"inner": net}) if prefix else net
    found = root.load_state_dict(saved, strict=False)
    assert found.missing_keys == [prefix + "0.weight"]
    assert found.unexpected_keys == [prefix + "2.other"]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{prefix}0\.weight"'):
        root.load_state_dict(saved)


def test_names_of_a_model_that_is_itself_a_layer() -> None:
    layer = kasminify(nn.Linear(4, 8), num_seeds=4, compile=False)
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]


# Ramps go on where they were.


def ramping(strategy: str) -> KasminaLayer:
    torch.manual_seed(0)
    config = SeedConfig(GraftingConfig(fixed_steps=10, grad_norm_lower=1.0, grad_norm_upper=2.0))
    layer = KasminaLayer(nn.Linear(4, 8), 4, config=config)
    assert layer.request_germination(0, None, strategy)
    layer.advance(0, S.TRAINING)
    layer.advance(0, S.GRAFTING)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pause_for_drift_goes_through_a_state_dict(dtype: torch.dtype) -> None:
    layer, fresh = ramping("DRIFT_CONTROLLED").to(dtype), ramping("FIXED_RAMP").to(dtype)
    layer.step_epoch()
    with torch.no_grad():
        layer.weight.mul_(3)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    for each in (layer, fresh):
        each.step_epoch()  # it has drifted since
        assert each.seeds[0].alpha == pytest.approx(0.1)
        each.step_epoch()
        assert each.seeds[0].alpha == pytest.approx(0.2)


def test_a_gate_of_gradients_goes_through_a_state_dict() -> None:
    layer, fresh = ramping("GRAD_NORM_GATED"), ramping("GRAD_NORM_GATED")
    layer.kasmina.grad_norm.fill_(1.5)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    for each in (layer, fresh):
        each.step_epoch()
        assert each.seeds[0].alpha == pytest.approx(0.1)


def test_another_hosts_weights_are_no_drift() -> None:
    layer = ramping("DRIFT_CONTROLLED")
    layer.step_epoch()
    plain = nn.Linear(4, 8)
    layer.load_state_dict(plain.state_dict())
    layer.step_epoch()
    assert layer.seeds[0].alpha == pytest.approx(0.2)


def test_a_norm_of_an_earlier_ramp_opens_no_gate() -> None:
    layer = ramping("GRAD_NORM_GATED")
    layer.kasmina.grad_norm.fill_(1.5)
    layer.advance(0, S.CULLED)
    layer.step_epoch()
    assert layer.request_germination(1, None, "GRAD_NORM_GATED")
    layer.advance(1, S.TRAINING)
    layer.advance(1, S.GRAFTING)
    layer.step_epoch()
    assert layer.seeds[1].alpha == 0.0
