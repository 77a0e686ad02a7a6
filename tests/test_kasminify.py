"""Whole models: what is wrapped, what stays as it was, and state dicts in and out."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import (
    ChunkedKasminaLayer,
    InvalidArgument,
    InvalidType,
    KasminaError,
    KasminaLayer,
    LayoutMismatch,
    NoTargets,
    SeedLifecycle,
    StillGrowing,
    UnknownOption,
    host_state_dict,
    kasmina_layers,
    reference,
    unkasminify,
)
from kasmina_fx.blueprints import register
from kasmina_fx.testing import graft


def _net() -> Any:
    return nn.Sequential(nn.Linear(5, 14), nn.GELU(), nn.Linear(14, 6))


def _wrapped(model: nn.Module, num_seeds: int = 4, **kwargs: Any) -> Any:
    return kasmina_fx.kasminify(model, num_seeds=num_seeds, compile=False, **kwargs)


def _perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in kasmina_layers(model).values():
            for parameter in layer.blueprint_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def _grown(num_seeds: int = 4) -> Any:
    """Private, shared and user blueprints, at several alphas, and some telemetry."""
    model = _wrapped(_net(), num_seeds)
    first, last = kasmina_layers(model).values()
    graft(first, [0, 3], "mlp", 0.4)
    graft(first, 1, "lora", 0.9)
    graft(last, [0, 2], last.register_blueprint("affine"), 0.5)
    last.request_germination(1, register(lambda size: nn.Linear(size, size), name="user"))
    _perturb(model)
    model(torch.randn(7, 5))
    return model


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Every tensor that a model holds, by name: registered, published and on the host."""
    found = dict(model.state_dict(keep_vars=True))
    for name, layer in kasmina_layers(model).items():
        found |= {f"{name}.mirror": layer.state.rows, f"{name}.alphas": layer.state.alphas}
        found |= {f"{name}.{n}": t for n, t in layer.named_buffers()}
        for bank in layer.kasmina.bank_list():
            found[f"{name}.{bank.key}.held"] = bank.held
    return found


def _frozen(model: nn.Module) -> dict[str, tuple[int, Any]]:
    """Identities and values: equal before and after only if nothing changed at all."""
    saved: dict[str, tuple[int, Any]] = {}
    for name, value in _tensors(model).items():
        number = id(value) if isinstance(value, nn.Parameter) else 0
        saved[name] = (number, value.tolist() if isinstance(value, Tensor) else str(value))
    return saved


def _by_reference(model: nn.Module, *args: Any) -> Any:
    with reference.reference_mode(model):
        return model(*args)


# What is wrapped.


def test_targets_are_wrapped_in_place_around_the_same_parameters() -> None:
    model = _net()
    bases, parameters = [model[0], model[2]], dict(model.named_parameters())
    wrapped = _wrapped(model)
    assert wrapped is model
    layers = kasmina_layers(model)
    assert list(layers) == ["0", "2"]
    for layer, base in zip(layers.values(), bases, strict=True):
        assert type(layer) is ChunkedKasminaLayer
        assert layer.base is base
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters.values()]
    assert [layer.layer_id for layer in layers.values()] == ["0", "2"]


def test_a_fresh_model_gives_the_output_of_the_plain_one_bit_for_bit() -> None:
    model = _net()
    x = torch.randn(3, 5)
    expected = model(x)
    assert torch.equal(_wrapped(model)(x), expected)


def test_seeds_are_capped_at_a_layers_features() -> None:
    layers = kasmina_layers(_wrapped(_net(), 10))
    assert [layer.num_seeds for layer in layers.values()] == [10, 6]
    layers = kasmina_layers(kasmina_fx.kasminify(_net(), compile=False))
    assert [layer.num_seeds for layer in layers.values()] == [14, 6]


def test_filter_fn_sees_modules_by_name_and_chooses() -> None:
    seen: list[tuple[str, str]] = []

    def choose(module: nn.Module, fqn: str) -> bool:
        seen.append((type(module).__name__, fqn))
        return fqn == "2"

    assert list(kasmina_layers(_wrapped(_net(), filter_fn=choose))) == ["2"]
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
    assert list(kasmina_layers(_wrapped(model, targets=targets))) == names


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
    layer = _wrapped(base, targets=[type(base)])
    assert isinstance(layer, ChunkedKasminaLayer)
    assert layer.base is base
    assert kasmina_layers(layer) == {"": layer}
    assert torch.equal(layer(x), expected)
    assert list(host_state_dict(layer)) == list(saved)
    layer.load_state_dict({key: value + 1 for key, value in saved.items()})
    assert all(torch.equal(t, saved[n] + 1) for n, t in base.state_dict().items())
    graft(layer, 0, "mlp")
    assert not torch.equal(layer(x), expected)
    layer.advance(0, SeedLifecycle.CULLED)
    assert unkasminify(layer) is base


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)), {}, ["Linear", "ReLU", "Conv2d"]),
        (nn.ReLU(), {}, ["ReLU"]),
        (_net(), {"filter_fn": lambda module, fqn: False}, ["filter_fn", "GELU"]),
        (_net(), {"targets": ()}, ["GELU"]),
        (nn.MultiheadAttention(4, 2), {}, ["out_proj", "never calls"]),
    ],
)
def test_a_model_with_no_target_is_refused_with_what_it_holds(
    model: nn.Module, kwargs: dict[str, Any], words: list[str]
) -> None:
    before = list(model.named_modules())
    with pytest.raises(NoTargets) as caught:
        _wrapped(model, **kwargs)
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
    model = _net()
    before = list(model.named_modules())
    with pytest.raises(error, match=message) as caught:
        _wrapped(model, **kwargs)
    assert isinstance(caught.value, KasminaError)
    assert list(model.named_modules()) == before
    assert not model._load_state_dict_pre_hooks


def test_a_second_call_changes_nothing() -> None:
    model = _grown()
    before, modules = _frozen(model), list(model.named_modules())
    hooks = len(model._load_state_dict_pre_hooks)
    for kwargs in ({}, {"num_seeds": 2}, {"targets": [nn.GELU]}):
        assert kasmina_fx.kasminify(model, compile=False, **kwargs) is model
    assert list(model.named_modules()) == modules
    assert _frozen(model) == before
    assert len(model._load_state_dict_pre_hooks) == hooks


# What stays as it was.


class Tied(nn.Module):
    """A shared module, a tied weight, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.stack = nn.ModuleList([self.shared, nn.Linear(8, 8)])
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(self.embed(x))
        for block in self.stack:
            h = h + block(self.again(h))
        out: Tensor = self.head(h)
        return out


@pytest.mark.parametrize("targets", [(nn.Linear,), (nn.Linear, nn.Embedding)])
def test_tied_weights_and_shared_modules_stay_so(targets: tuple[type[nn.Module], ...]) -> None:
    model: Any = Tied()
    x = torch.randint(0, 9, (3, 4))
    keys, expected = list(model.state_dict()), model(x)
    count = len(list(model.parameters()))
    _wrapped(model, targets=targets)
    assert list(kasmina_layers(model))[-3:] == ["shared", "stack.1", "head"]
    assert model.shared is model.again is model.stack[0]
    assert model.head.weight is model.embed.weight
    assert list(host_state_dict(model)) == keys
    assert len(list(model.parameters())) == count
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model.head.weight.grad is not None
    with torch.no_grad():
        model.head.weight.add_(1)
    twin = copy.deepcopy(model)
    assert twin.shared is twin.again is twin.stack[0]
    assert twin.head.weight is twin.embed.weight
    assert torch.equal(twin(x), model(x))
    unkasminify(model)
    assert type(model.shared) is nn.Linear
    assert model.shared is model.again is model.stack[0]
    assert model.head.weight is model.embed.weight


def test_weights_tied_after_wrapping_are_tied() -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)})
    _wrapped(model)
    model["head"].weight = model["embed"].weight
    assert model["head"].base.weight is model["embed"].weight
    assert len(list(model.parameters())) == 1


def test_hooks_fire() -> None:
    calls: list[str] = []
    model = _net()
    first = model[0]
    first.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    first.register_forward_hook(lambda module, args, out: calls.append("forward"))
    first.register_full_backward_hook(lambda module, grad, out: calls.append("backward"))
    first.weight.register_hook(lambda grad: calls.append("grad"))
    model.register_forward_hook(lambda module, args, out: calls.append("root"))
    _wrapped(model)
    model(torch.randn(3, 5, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["backward", "forward", "grad", "pre", "root"]


def test_dtype_requires_grad_and_training_flags_are_kept() -> None:
    model = _net().bfloat16()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    _wrapped(model)
    first, last = kasmina_layers(model).values()
    assert (first.training, last.training) == (True, False)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16
    graft(first, 0)
    assert {p.dtype for p in first.blueprint_parameters()} == {torch.bfloat16}
    assert not model.eval()[0].base.training


def test_parametrized_targets_are_wrapped_as_they_are() -> None:
    model = _net().double()
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(3, 5, dtype=torch.float64)
    expected, saved = model(x), copy.deepcopy(model.state_dict())
    _wrapped(model)
    assert torch.equal(model(x), expected)
    assert list(host_state_dict(model)) == list(saved)
    torch.testing.assert_close(model[0].weight, model[0].base.weight)
    graft(kasmina_layers(model)["0"], 0)
    model.load_state_dict(saved)
    torch.testing.assert_close(model(x), _by_reference(model, x))


def test_reserve_and_telemetry_reach_every_layer() -> None:
    model = _wrapped(_net(), reserve=3, telemetry=False)
    x = torch.randn(2, 5)
    model(x)
    for layer in kasmina_layers(model).values():
        assert {bank.capacity for bank in layer.kasmina.bank_list()} == {3}
        assert not layer.kasmina.telemetry.accumulated.any()


def test_the_first_germination_allocates_in_every_layer_of_the_model_and_no_other() -> None:
    model, other = _wrapped(_net()), _wrapped(_net())
    first, last = kasmina_layers(model).values()
    last.request_germination(0, "affine")
    assert {bank.spec.kind for bank in first.kasmina.bank_list()} == {"affine"}
    assert {bank.capacity for bank in first.kasmina.bank_list()} == {2}
    assert not any(layer.kasmina.bank_list() for layer in kasmina_layers(other).values())


# State dicts.


def _through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("grown", [False, True], ids=["fresh", "grown"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_plain_checkpoint_loads_into_a_kasminified_model(grown: bool, assign: bool) -> None:
    plain = _net()
    model = _grown() if grown else _wrapped(_net())
    before = {k: v for k, v in _frozen(model).items() if "kasmina" in k or "mirror" in k}
    result = model.load_state_dict(_through_a_file(plain.state_dict()), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    for name, value in host_state_dict(model).items():
        assert torch.equal(value, plain.state_dict()[name])
    after = _frozen(model)
    assert {name: after[name][1] for name in before} == {n: v[1] for n, v in before.items()}
    x = torch.randn(3, 5)
    torch.testing.assert_close(model(x), _by_reference(model, x))


def test_a_plain_checkpoint_with_a_wrong_key_is_refused_when_strict() -> None:
    saved = _net().state_dict()
    model = _wrapped(_net())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.(base\.)?other"):
        model.load_state_dict({**saved, "0.other": torch.zeros(1)})
    del saved["0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\..*weight"):
        model.load_state_dict(saved)
    assert model.load_state_dict(saved, strict=False).missing_keys == ["0.base.weight"]


def test_host_state_dict_loads_into_the_plain_model() -> None:
    model = _grown()
    plain = _net()
    saved = host_state_dict(model)
    assert list(saved) == list(plain.state_dict())
    plain.load_state_dict(_through_a_file(saved))
    assert torch.equal(plain[0].weight, model[0].base.weight)
    with torch.no_grad():
        model[0].base.weight.add_(1)
    assert torch.equal(saved["0.weight"], model[0].weight)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("target", ["fresh", "grown", "reserved"])
def test_a_kasminified_state_dict_loads_into_another_kasminified_model(
    target: str, assign: bool
) -> None:
    source = _grown()
    other = _wrapped(_net(), reserve=4 if target == "reserved" else 0)
    if target == "grown":
        for layer in kasmina_layers(other).values():
            graft(layer, range(4), "bottleneck", 1.0)
            layer.register_blueprint("mlp")
    x = torch.randn(3, 5)
    saved = _through_a_file(source.state_dict())
    other.load_state_dict(saved, assign=assign)
    assert torch.equal(other(x), source(x))
    torch.testing.assert_close(other(x), _by_reference(other, x))
    for ours, theirs in zip(
        kasmina_layers(other).values(), kasmina_layers(source).values(), strict=True
    ):
        assert ours.kasmina.blueprints == theirs.kasmina.blueprints
        assert torch.equal(ours.state.state_tensor, theirs.state.state_tensor)
        for seed in range(4):
            assert (ours.bank_of(seed) is None) == (theirs.bank_of(seed) is None)
    # What was loaded goes on living.
    last = kasmina_layers(other)["2"]
    graft(last, 3, next(iter(last.kasmina.blueprints)), 1.0)
    last.advance(1, SeedLifecycle.TRAINING)
    last.advance(1, SeedLifecycle.GRAFTING)
    last.set_alpha(1, 0.5)
    torch.testing.assert_close(other(x), _by_reference(other, x))
    other(x).sum().backward()


def _with(saved: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    assert key in saved
    return {**saved, key: value}


def _edited(saved: dict[str, Any], key: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    value = copy.deepcopy(saved[key])
    changed = change(value)
    return _with(saved, key, value if changed is None else changed)


def _put(row: int, column: int, value: int) -> Callable[[Tensor], None]:
    def change(state: Tensor) -> None:
        state[row, column] = value

    return change


def _put_alpha(value: float) -> Callable[[Tensor], None]:
    def change(alpha: Tensor) -> None:
        alpha[1] = value

    return change


STATE, ALPHA = "2.kasmina.state.state_tensor", "2.kasmina.state.alpha"
EXTRA, TELEMETRY = "2.kasmina._extra_state", "2.kasmina.telemetry.accumulated"
#: All in the last layer: a check that comes while the model loads would find the first one changed.
SPOILT: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "stage too large": lambda d: _edited(d, STATE, _put(1, 0, 11)),
    "stage negative": lambda d: _edited(d, STATE, _put(1, 0, -1)),
    "blueprint negative": lambda d: _edited(d, STATE, _put(1, 1, -1)),
    "epochs too many": lambda d: _edited(d, STATE, _put(1, 2, 32_768)),
    "no such strategy": lambda d: _edited(d, STATE, _put(1, 3, 4)),
    "state of another shape": lambda d: _edited(d, STATE, lambda t: t[:3]),
    "state of another dtype": lambda d: _edited(d, STATE, lambda t: t.long()),
    "alpha above 1": lambda d: _edited(d, ALPHA, _put_alpha(1.5)),
    "alpha below 0": lambda d: _edited(d, ALPHA, _put_alpha(-0.5)),
    "alpha NaN": lambda d: _edited(d, ALPHA, _put_alpha(float("nan"))),
    "alpha of another shape": lambda d: _edited(d, ALPHA, lambda t: t[:3]),
    "alpha without a state": lambda d: {
        k: v for k, v in _edited(d, ALPHA, _put_alpha(7.0)).items() if k != STATE
    },
    "telemetry of another shape": lambda d: _edited(d, TELEMETRY, lambda t: t[:4]),
    "another version": lambda d: _edited(d, EXTRA, lambda e: {**e, "version": 99}),
    "no version": lambda d: _edited(d, EXTRA, lambda e: {}),
    "extra state of another kind": lambda d: _with(d, EXTRA, 7),
    "another layout": lambda d: _edited(d, EXTRA, lambda e: {**e, "layout": "dim=-1 runs=2x3"}),
    "no layout": lambda d: _edited(d, EXTRA, lambda e: {"version": e["version"]}),
    "unknown blueprint": lambda d: _edited(d, EXTRA, lambda e: {**e, "blueprints": {1: "nope"}}),
    "unknown bank": lambda d: _edited(
        d, EXTRA, lambda e: {**e, "banks": {"nope_run0": "nope@0*2"}}
    ),
    "malformed bank": lambda d: _edited(d, EXTRA, lambda e: {**e, "banks": {"mlp_run0": "mlp"}}),
    "bank in a run that is not": lambda d: _edited(
        d, EXTRA, lambda e: {**e, "banks": {"mlp_run7": "mlp@7*4"}}
    ),
    "a bank's stack of another shape": lambda d: _edited(
        d, "2.kasmina.banks.affine_shared_run0.scale", lambda t: t[:, :1]
    ),
    "a bank's slots and stacks disagree": lambda d: _edited(
        d, "2.kasmina.banks.affine_shared_run0.slots", lambda t: torch.cat([t, t])
    ),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("grown", [False, True], ids=["fresh", "grown"])
def test_a_spoilt_state_dict_is_refused_and_nothing_changes_in_any_layer(
    spoil: Callable[[dict[str, Any]], dict[str, Any]], grown: bool
) -> None:
    saved = _grown().state_dict()
    model = _wrapped(_net())
    if grown:
        graft(kasmina_layers(model)["0"], [0, 1], "lora")
    before = _frozen(model)
    with pytest.raises(LayoutMismatch):
        model.load_state_dict(spoil(dict(saved)))
    assert _frozen(model) == before


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_a_state_dict_of_another_number_of_seeds_is_refused_whole(num_seeds: int) -> None:
    saved = _grown().state_dict()
    model = _wrapped(_net(), num_seeds)
    before = _frozen(model)
    with pytest.raises(LayoutMismatch, match=r"0: .*2x4\+2x3.*num_seeds"):
        model.load_state_dict(saved)
    assert _frozen(model) == before


def test_the_reason_for_a_refusal_names_the_layer_and_what_it_takes() -> None:
    saved = _edited(dict(_grown().state_dict()), EXTRA, lambda e: {**e, "version": 99})
    with pytest.raises(LayoutMismatch, match=r"2: .*version 99.*version 2"):
        _wrapped(_net()).load_state_dict(saved)


def test_a_model_inside_another_one_loads_too() -> None:
    inner = _grown()
    outer = nn.Sequential(inner, nn.Linear(6, 2))
    fresh = nn.Sequential(_wrapped(_net()), nn.Linear(6, 2))
    fresh.load_state_dict(_through_a_file(outer.state_dict()))
    x = torch.randn(3, 5)
    assert torch.equal(fresh(x), outer(x))
    plain = nn.Sequential(_net(), nn.Linear(6, 2))
    plain.load_state_dict(host_state_dict(outer))
    outer.load_state_dict(plain.state_dict())


def test_the_callers_state_dict_is_not_changed_by_loading() -> None:
    saved = _grown().state_dict()
    keys = list(saved)
    _wrapped(_net()).load_state_dict(saved)
    assert list(saved) == keys


# Attention and torch's fused encoder.


def test_the_projection_of_attention_is_left_alone() -> None:
    model: Any = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    _wrapped(model)
    assert list(kasmina_layers(model)) == ["fc"]
    assert isinstance(model["attend"].out_proj, nn.Linear)


def test_attention_may_be_a_target_itself() -> None:
    model: Any = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2, batch_first=True)}).double()
    _wrapped(model, targets=[nn.MultiheadAttention, nn.Linear])
    layers = kasmina_layers(model)
    assert list(layers) == ["attend"]
    graft(layers["attend"], [0, 2])
    for mode in (True, False):
        model.train(mode)
        x = torch.randn(3, 4, 8, dtype=torch.float64)
        out, weights = model["attend"](x, x, x)
        expected, expected_weights = reference.forward(layers["attend"], x, x, x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(weights, expected_weights)


def _encoder_layer(**kwargs: Any) -> Any:
    return nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.1, batch_first=True, dtype=torch.float64, **kwargs
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize("grad", [False, True])
def test_seeds_of_an_encoder_layer_take_effect_in_eval(activation: Any, grad: bool) -> None:
    model = _encoder_layer(activation=activation).eval()
    setting = model.activation_relu_or_gelu
    assert setting in (1, 2)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    _wrapped(model)
    layers = kasmina_layers(model)
    assert list(layers) == ["linear1", "linear2"]
    with torch.set_grad_enabled(grad):
        dormant = model(x)
        graft(layers["linear1"], [0, 1, 2, 3], "mlp", 1.0)
        out = model(x)
        assert float((out - dormant).detach().abs().max()) > 1e-3
        torch.testing.assert_close(out, _by_reference(model, x))
    layers["linear1"].advance(range(4), SeedLifecycle.CULLED)
    unkasminify(model)
    assert model.activation_relu_or_gelu == setting
    torch.testing.assert_close(model(x), dormant)


def test_unkasminify_leaves_an_encoder_layer_that_was_never_wrapped_as_it_was() -> None:
    model: Any = nn.ModuleDict({"encode": _encoder_layer(), "fc": nn.Linear(8, 8)})
    model["encode"].activation_relu_or_gelu = 0  # the owner's own choice
    _wrapped(model, filter_fn=lambda module, fqn: fqn == "fc")
    unkasminify(model)
    assert model["encode"].activation_relu_or_gelu == 0


@pytest.mark.parametrize(
    "chosen",
    [["layers.0.linear1"], ["layers.1.linear1"], ["layers.0.linear2", "layers.1.linear1"]],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the plain model's
def test_an_encoder_of_which_some_layers_are_wrapped_runs_in_eval(
    chosen: list[str], padded: bool
) -> None:
    model: Any = nn.TransformerEncoder(_encoder_layer(), 2).eval()
    assert model.use_nested_tensor
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    if padded:
        mask[1, 3:] = mask[2, 2:] = True
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
        _wrapped(model, filter_fn=lambda module, fqn: fqn in chosen)
        layers = kasmina_layers(model)
        assert list(layers) == chosen
        # Padded places are zero or not by torch's choice of kernel: compare the others.
        torch.testing.assert_close(
            model(x, src_key_padding_mask=mask)[~mask], plain[~mask], atol=1e-10, rtol=1e-10
        )
        for layer in layers.values():
            graft(layer, [0, 1, 2, 3], "mlp", 1.0)
        out = model(x, src_key_padding_mask=mask)
        expected = _by_reference(model, x, None, mask)
        assert float((out - plain)[~mask].abs().max()) > 1e-3
        torch.testing.assert_close(out[~mask], expected[~mask])
    for layer in layers.values():
        layer.advance(range(4), SeedLifecycle.CULLED)
    unkasminify(model)
    assert model.use_nested_tensor
    assert [block.activation_relu_or_gelu for block in model.layers] == [1, 1]


def test_an_encoder_layer_whose_attention_is_wrapped_runs_in_eval() -> None:
    model = _encoder_layer().eval()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
        _wrapped(model, targets=[nn.MultiheadAttention])
        torch.testing.assert_close(model(x), plain)
        graft(kasmina_layers(model)["self_attn"], [0, 1], "mlp", 1.0)
        assert float((model(x) - plain).abs().max()) > 1e-3


def test_decoder_layers_may_be_wrapped() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64).eval()
    x, memory = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    plain = model(x, memory)
    _wrapped(model)
    torch.testing.assert_close(model(x, memory), plain)
    for layer in kasmina_layers(model).values():
        graft(layer, 0)
    torch.testing.assert_close(model(x, memory), _by_reference(model, x, memory))


# Back to a plain model.


def test_unkasminify_gives_the_plain_model_back_with_its_current_weights() -> None:
    model = _net()
    bases, keys = [model[0], model[2]], list(model.state_dict())
    _wrapped(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    x = torch.randn(3, 5)
    expected = model(x)
    assert unkasminify(model) is model
    assert [model[0], model[2]] == bases
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert kasmina_layers(model) == {}
    model.load_state_dict(_net().state_dict())
    assert list(kasmina_layers(_wrapped(model, 3))) == ["0", "2"]


def test_unkasminify_of_a_plain_model_changes_nothing() -> None:
    model = _net()
    before = list(model.named_modules())
    assert unkasminify(model) is model
    assert list(model.named_modules()) == before


def test_seeds_that_are_not_blended_do_not_hinder_unkasminify() -> None:
    model = _wrapped(_net())
    layer = kasmina_layers(model)["0"]
    layer.request_germination([0, 1])
    layer.advance(1, SeedLifecycle.TRAINING)
    unkasminify(model)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("mlp", SeedLifecycle.FOSSILIZED),
        ("affine", SeedLifecycle.GRAFTING),
        ("affine", SeedLifecycle.FINE_TUNING),
    ],
)
def test_unkasminify_refuses_to_lose_a_blended_seed(
    kind: str, stage: SeedLifecycle, fold: bool
) -> None:
    model = _wrapped(_net())
    first, last = kasmina_layers(model).values()
    graft(first, 0, "affine")  # could be folded: must not be, as the other one can't
    first.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    graft(last, [2], kind)
    last.state.set_rows(2, lifecycle_state=stage)
    before, modules = _frozen(model), list(model.named_modules())
    with pytest.raises(StillGrowing, match=r"2: seed 2 is blended" if fold else r"0: seed 0.*fold"):
        unkasminify(model, fold=fold)
    assert _frozen(model) == before
    assert list(model.named_modules()) == modules


def test_a_fossilized_affine_seed_needs_fold_to_be_asked_for() -> None:
    model = _wrapped(_net())
    layer = kasmina_layers(model)["2"]
    graft(layer, 1, "affine")
    layer.state.set_rows(1, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match="fold=True"):
        unkasminify(model)


FOLDABLE = {
    "linear": (lambda: nn.Linear(5, 11), (4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 11, bias=False), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 11, 3), (3, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 11, 3, padding=1), (3, 2, 6, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 11, 3, bias=False), (3, 2, 6, 5)),
    "grouped conv2d": (lambda: nn.Conv2d(11, 11, 3, groups=11), (3, 11, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 11, 1), (3, 2, 4, 3, 2)),
}


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize(("make", "shape"), FOLDABLE.values(), ids=FOLDABLE)
def test_unkasminify_folds_fossilized_affine_seeds(
    make: Callable[[], nn.Module], shape: tuple[int, ...], shared: bool
) -> None:
    model: Any = nn.Sequential(make(), nn.Tanh()).double()
    frozen = model[0].weight
    frozen.requires_grad_(False)
    _wrapped(model, 3, targets=[nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d])  # 4, 4, 3
    layer = kasmina_layers(model)["0"]
    graft(layer, [0, 2], layer.register_blueprint("affine") if shared else "affine", 1.0)
    layer.set_alpha(2, 0.3)
    _perturb(model)
    layer.state.set_rows([0, 2], lifecycle_state=SeedLifecycle.FOSSILIZED)
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    unkasminify(model, fold=True)
    assert not any(isinstance(module, KasminaLayer) for module in model.modules())
    assert model[0].weight is frozen
    assert not frozen.requires_grad
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    assert not list(model.named_buffers())


def test_a_base_without_a_foldable_weight_is_refused() -> None:
    model: Any = nn.Sequential(nn.ConvTranspose2d(2, 8, 1), nn.LayerNorm(8))
    _wrapped(model, 2, targets=[nn.ConvTranspose2d])
    layer = kasmina_layers(model)["0"]
    graft(layer, 0, "affine")
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match="ConvTranspose2d"):
        unkasminify(model, fold=True)


def test_folding_into_a_tied_weight_leaves_its_other_owner_as_it_was_or_is_refused() -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    _wrapped(model, 3)
    layer = kasmina_layers(model)["head"]
    graft(layer, 0, "affine", 1.0)
    _perturb(model)
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    x = torch.randn(2, 8)
    embedded, out = model["embed"](torch.arange(9)), model["head"](x)
    try:
        unkasminify(model, fold=True)
    except StillGrowing:
        assert model["head"] is layer
    torch.testing.assert_close(model["embed"](torch.arange(9)), embedded)
    torch.testing.assert_close(model["head"](x), out)


def test_folding_into_a_computed_weight_is_refused() -> None:
    model: Any = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh())
    _wrapped(model, 3)
    layer = kasmina_layers(model)["0"]
    graft(layer, 0, "affine")
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match="parametrization"):
        unkasminify(model, fold=True)


def test_folding_a_rejected_blueprint_is_refused() -> None:
    model = _wrapped(_net())
    layer = kasmina_layers(model)["0"]
    graft(layer, 0, "affine")
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with torch.no_grad():
        next(layer.blueprint_parameters())[0, 0] = float("inf")
    with pytest.raises(StillGrowing, match="NaN or Inf"):
        unkasminify(model, fold=True)


def test_folding_two_layers_that_share_a_base_is_refused() -> None:
    base = nn.Linear(6, 6)
    model: Any = nn.Sequential(KasminaLayer(base, 3), KasminaLayer(base, 2))
    layer = kasmina_layers(model)["0"]
    graft(layer, 0, "affine")
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match="tied"):
        unkasminify(model, fold=True)


def test_a_pickled_model_works_and_may_be_unwrapped() -> None:
    model = _wrapped(_net())
    first = kasmina_layers(model)["0"]
    graft(first, [0, 1])
    x = torch.randn(3, 5)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), expected)
    twin.load_state_dict(model.state_dict())
    kasmina_layers(twin)["0"].advance([0, 1], SeedLifecycle.CULLED)
    assert isinstance(unkasminify(twin)[0], nn.Linear)
    assert torch.equal(model(x), expected)


def test_copied_models_load_into_themselves_and_not_into_the_original() -> None:
    model = _wrapped(_net())
    twin = copy.deepcopy(model)
    other = _net()
    before = _frozen(model)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin[0].weight, other[0].weight)
    assert _frozen(model) == before
    spoilt = _edited(dict(_grown().state_dict()), STATE, _put(1, 0, 11))
    frozen = _frozen(twin)
    with pytest.raises(LayoutMismatch):
        twin.load_state_dict(spoilt)
    assert _frozen(twin) == frozen


def test_a_bad_dynamic_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(InvalidType, match="dynamic='x'"):
        kasmina_fx.kasminify(net, num_seeds=2, dynamic="x")  # type: ignore[arg-type]
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
