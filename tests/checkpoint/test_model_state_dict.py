"""State dicts of whole models: refused as a whole, named as their user names them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from kasmina_fx import (
    KasminaLayer,
    LayoutMismatch,
    SeedConfig,
    SeedLifecycle,
    checkpoint,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.errors import CheckpointError
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
        graft(layer, [1, 2], "mlp")
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


def test_seeds_of_some_layers_alone_are_missing_unless_that_is_meant(path: Path) -> None:
    source = grown()
    saved = {k: v for k, v in contents(source).items() if not k.startswith("2.kasmina.")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"2\.kasmina\.state'):
        network().load_state_dict(saved)
    net = network()
    found = net.load_state_dict(saved, strict=False)
    assert all(name.startswith("2.kasmina.") for name in found.missing_keys)
    layers = kasmina_layers(net)
    assert layers["0"].state.get_state_distribution() == {"DORMANT": 2, "GRAFTING": 2}
    assert layers["2"].state.get_state_distribution() == {"DORMANT": 4}
    plain = {k: v for k, v in saved.items() if "kasmina" not in k}
    assert not net.load_state_dict(plain).missing_keys  # what was missing once is so once
    two, one = grown(), kasminify(nn.Sequential(nn.Linear(4, 8)), num_seeds=4, compile=False)
    checkpoint.save(one, path)
    before = contents(two)
    with pytest.raises(CheckpointError, match=r"seeds of \['2'\], unlike of other layers"):
        checkpoint.load(two, path)
    assert_unchanged(two, before)
    checkpoint.load(two, path, strict=False)
    assert kasmina_layers(two)["2"].state.get_state_distribution() == {"DORMANT": 2, "GRAFTING": 2}


class Resized(nn.Module):
    """Takes a table of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[prefix + "table"] = state_dict[prefix + "table"][:4]
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_modules_that_load_in_a_way_of_their_own_are_left_to_it() -> None:
    net = kasminify(
        nn.Sequential(nn.Linear(4, 8), Resized(), nn.BatchNorm1d(8)), num_seeds=4, compile=False
    )
    saved = contents(net)
    saved["1.table"] = torch.ones(9)
    net.load_state_dict(saved)
    assert net.get_parameter("1.table").tolist() == [1.0] * 4


def test_behind_a_wrapper_of_torch_a_model_takes_its_own_state_dict(path: Path) -> None:
    def wrapped() -> nn.Sequential:
        net = network()
        net[0] = checkpoint_wrapper(net[0])
        return net

    source, target = wrapped(), wrapped()
    for layer in kasmina_layers(source).values():
        graft(layer, [1, 2], "mlp")
    target.load_state_dict(contents(source))
    fresh = wrapped()
    checkpoint.save(source, path)
    checkpoint.load(fresh, path)
    for net in (target, fresh):
        for layer in kasmina_layers(net).values():
            assert layer.state.get_state_distribution() == {"DORMANT": 2, "GRAFTING": 2}
    bad = contents(source)
    bad["0.kasmina.state.alpha"][0] = torch.nan
    before = contents(target)
    with pytest.raises(LayoutMismatch):
        target.load_state_dict(bad)
    assert_unchanged(target, before)


def test_a_model_that_is_itself_a_layer_goes_back_to_before_its_first_germination() -> None:
    layer = kasminify(nn.Linear(4, 8), num_seeds=4, compile=False)
    saved = contents(layer)
    graft(kasmina_layers(layer)[""], [1, 2], "mlp")
    layer.load_state_dict(saved)
    assert kasmina_layers(layer)[""].state.get_state_distribution() == {"DORMANT": 4}


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
