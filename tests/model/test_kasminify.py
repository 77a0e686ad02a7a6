"""kasminify: which modules are wrapped, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from host_cases import frozen_copy, grown_network, network, wrapped_twin
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import (
    InvalidArgument,
    InvalidType,
    KasminaError,
    KasminaLayer,
    NoTargets,
    SeedLifecycle,
    UnknownOption,
    host_state_dict,
    kasmina_layers,
    unkasminify,
)
from kasmina_fx.testing import graft


def test_targets_are_wrapped_in_place_around_the_same_parameters() -> None:
    model = network()
    bases, parameters = [model[0], model[2]], dict(model.named_parameters())
    wrapped = wrapped_twin(model)
    assert wrapped is model
    layers = kasmina_layers(model)
    assert list(layers) == ["0", "2"]
    for layer, base in zip(layers.values(), bases, strict=True):
        assert layer is base
        assert type(layer).__name__ == "KasminaLinear"
        assert isinstance(layer, nn.Linear)
        assert isinstance(layer, KasminaLayer)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters.values()]
    assert [layer.layer_id for layer in layers.values()] == ["0", "2"]


def test_a_fresh_model_gives_the_output_of_the_plain_one_bit_for_bit() -> None:
    model = network()
    x = torch.randn(3, 5)
    expected = model(x)
    assert torch.equal(wrapped_twin(model)(x), expected)


def test_seeds_are_capped_at_a_layers_features() -> None:
    layers = kasmina_layers(wrapped_twin(network(), 10))
    assert [layer.num_seeds for layer in layers.values()] == [10, 6]
    layers = kasmina_layers(kasmina_fx.kasminify(network(), num_seeds=1000, compile=False))
    assert [layer.num_seeds for layer in layers.values()] == [14, 6]


def test_filter_fn_sees_modules_by_name_and_chooses() -> None:
    seen: list[tuple[str, str]] = []

    def choose(module: nn.Module, fqn: str) -> bool:
        seen.append((type(module).__name__, fqn))
        return fqn == "2"

    assert list(kasmina_layers(wrapped_twin(network(), filter_fn=choose))) == ["2"]
    assert seen == [("Linear", "0"), ("Linear", "2")]


class MyLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ((nn.Linear,), ["1", "3"]),  # a subclass too
        ((MyLinear,), ["3"]),
        ((nn.Conv2d, nn.LayerNorm), ["0", "2"]),
        (nn.Conv2d, ["0"]),
        ([nn.LayerNorm], ["2"]),
    ],
)
def test_targets_are_types_and_their_subclasses(targets: Any, names: list[str]) -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Linear(3, 4), nn.LayerNorm(4), MyLinear(4, 4), nn.ReLU()
    )
    assert list(kasmina_layers(wrapped_twin(model, targets=targets))) == names


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (nn.Linear(5, 12), torch.randn(3, 5)),
        (nn.Conv2d(2, 12, 1), torch.randn(3, 2, 4, 5)),
        (nn.LayerNorm(12), torch.randn(3, 12)),
        (nn.Embedding(9, 12), torch.randint(0, 9, (3, 4))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_root_may_be_a_target(base: nn.Module, x: Tensor) -> None:
    expected, saved = base(x), copy.deepcopy(base.state_dict())
    layer = wrapped_twin(base, targets=[type(base)])
    assert layer is base
    assert isinstance(layer, KasminaLayer)
    assert torch.equal(layer.base(x), expected)
    assert kasmina_layers(layer) == {"": layer}
    assert torch.equal(layer(x), expected)
    assert list(host_state_dict(layer)) == list(saved)
    layer.load_state_dict({key: value + 1 for key, value in saved.items()})
    assert all(torch.equal(t, saved[n] + 1) for n, t in layer.base.state_dict().items())
    graft(layer, 0, "mlp")
    assert not torch.equal(layer(x), expected)
    layer.advance(0, SeedLifecycle.CULLED)
    assert unkasminify(layer) is base


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)), {}, ["Linear", "ReLU", "Conv2d"]),
        (nn.ReLU(), {}, ["ReLU"]),
        (network(), {"filter_fn": lambda module, fqn: False}, ["filter_fn", "GELU"]),
        (network(), {"targets": ()}, ["GELU"]),
        (nn.MultiheadAttention(4, 2), {}, ["out_proj", "never calls"]),
    ],
)
def test_a_model_with_no_target_is_refused_with_what_it_holds(
    model: nn.Module, kwargs: dict[str, Any], words: list[str]
) -> None:
    before = list(model.named_modules())
    with pytest.raises(NoTargets) as caught:
        wrapped_twin(model, **kwargs)
    assert all(word in str(caught.value) for word in words)
    assert list(model.named_modules()) == before


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_seeds": 0}, InvalidArgument, "num_seeds=0"),
        ({"num_seeds": -2}, InvalidArgument, "num_seeds=-2"),
        ({"num_seeds": 2.0}, InvalidType, r"num_seeds=2\.0"),
        ({"num_seeds": True}, InvalidType, "num_seeds=True"),
        ({"targets": ["Linear"]}, InvalidType, "Linear.*nn.Module"),
        ({"targets": [int]}, InvalidType, "int"),
        ({"targets": nn.Linear(2, 2)}, InvalidType, "Linear"),
        ({"reserve": -1}, InvalidArgument, "reserve=-1"),
        ({"mode": "fastest"}, InvalidArgument, "fastest"),
        ({"options": {"lowerin": "auto"}}, UnknownOption, "lowering"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network()
    before = list(model.named_modules())
    with pytest.raises(error, match=message) as caught:
        wrapped_twin(model, **kwargs)
    assert isinstance(caught.value, KasminaError)
    assert list(model.named_modules()) == before
    assert not model._load_state_dict_pre_hooks


def test_a_second_call_changes_nothing() -> None:
    model = grown_network()
    before, modules = frozen_copy(model), list(model.named_modules())
    hooks = len(model._load_state_dict_pre_hooks)
    for kwargs in ({}, {"num_seeds": 2}, {"targets": [nn.GELU]}):
        assert kasmina_fx.kasminify(model, compile=False, **kwargs) is model
    assert list(model.named_modules()) == modules
    assert frozen_copy(model) == before
    assert len(model._load_state_dict_pre_hooks) == hooks


def test_a_bad_dynamic_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(InvalidType, match="dynamic='x'"):
        kasmina_fx.kasminify(net, num_seeds=2, dynamic="x")  # type: ignore[call-overload]
    assert type(net[0]) is nn.Linear


def test_everything_public_is_there_after_one_import() -> None:
    code = (
        "import kasmina_fx as k; k.checkpoint.save, k.controllers.HealthController, "
        "k.testing.assert_golden, k.reference.reference_mode, k.optim.sync, k.grafting"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "given",
    [
        {"filter_fn": 3},
        {"config": "x"},
        {"options": {1: 2}},
        {"options": ["x"]},
        {"options": {"disabled_passes": None}},
    ],
    ids=str,
)
def test_arguments_of_a_wrong_type_change_nothing(given: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(KasminaError, match=r"give|disabled_passes"):
        kasmina_fx.kasminify(net, num_seeds=2, **given)
    assert type(net[0]) is nn.Linear


def test_what_is_no_module_is_refused() -> None:
    nothing: Any = 3
    with pytest.raises(InvalidType, match=r"give an nn\.Module"):
        kasmina_fx.kasminify(nothing)
    with pytest.raises(InvalidType, match="give a SeedConfig"):
        kasmina_fx.KasminaLayer(nn.Linear(4, 6), 2, config=nothing)


def test_a_registered_blueprint_takes_no_other_name() -> None:
    layer = kasmina_fx.KasminaLayer(nn.Linear(4, 6), 2)
    with pytest.raises(InvalidArgument, match="keeps its name"):
        layer.register_blueprint("lora", name="zz")
    assert layer.register_blueprint("lora", name="lora") == 1
    name: Any = 3
    with pytest.raises(InvalidType, match="name=3"):
        layer.register_blueprint(nn.Identity, name=name)
