"""State dicts of kasminified models beside those of plain ones."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_cases import by_reference, frozen_copy, grown_network, network, wrapped_twin
from torch import Tensor, nn

from kasmina_fx import (
    LayoutMismatch,
    SeedLifecycle,
    host_state_dict,
    kasmina_layers,
)
from kasmina_fx.seeds.extra_state import unpacked
from kasmina_fx.testing import graft


def _through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("grown", [False, True], ids=["fresh", "grown"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_plain_checkpoint_loads_into_a_kasminified_model(grown: bool, assign: bool) -> None:
    plain = network()
    model = grown_network() if grown else wrapped_twin(network())
    before = {k: v for k, v in frozen_copy(model).items() if "kasmina" in k or "mirror" in k}
    result = model.load_state_dict(_through_a_file(plain.state_dict()), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    for name, value in host_state_dict(model).items():
        assert torch.equal(value, plain.state_dict()[name])
    after = frozen_copy(model)
    assert {name: after[name][1] for name in before} == {n: v[1] for n, v in before.items()}
    x = torch.randn(3, 5)
    torch.testing.assert_close(model(x), by_reference(model, x))


def test_a_plain_checkpoint_with_a_wrong_key_is_refused_when_strict() -> None:
    saved = network().state_dict()
    model = wrapped_twin(network())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\"0\.other"):
        model.load_state_dict({**saved, "0.other": torch.zeros(1)})
    del saved["0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*\"0\.weight"):
        model.load_state_dict(saved)
    assert model.load_state_dict(saved, strict=False).missing_keys == ["0.weight"]


def test_host_state_dict_loads_into_the_plain_model() -> None:
    model = grown_network()
    plain = network()
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
    source = grown_network()
    other = wrapped_twin(network(), reserve=4 if target == "reserved" else 0)
    if target == "grown":
        for layer in kasmina_layers(other).values():
            graft(layer, range(4), "bottleneck", 1.0)
            layer.register_blueprint("mlp")
    x = torch.randn(3, 5)
    saved = _through_a_file(source.state_dict())
    other.load_state_dict(saved, assign=assign)
    assert torch.equal(other(x), source(x))
    torch.testing.assert_close(other(x), by_reference(other, x))
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
    torch.testing.assert_close(other(x), by_reference(other, x))
    other(x).sum().backward()


def _with(saved: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    assert key in saved
    return {**saved, key: value}


def _edited(saved: dict[str, Any], key: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    value = unpacked(saved[key]) if key == EXTRA else copy.deepcopy(saved[key])
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
    saved = grown_network().state_dict()
    model = wrapped_twin(network())
    if grown:
        graft(kasmina_layers(model)["0"], [0, 1], "lora")
    before = frozen_copy(model)
    with pytest.raises(LayoutMismatch):
        model.load_state_dict(spoil(dict(saved)))
    assert frozen_copy(model) == before


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_a_state_dict_of_another_number_of_seeds_is_refused_whole(num_seeds: int) -> None:
    saved = grown_network().state_dict()
    model = wrapped_twin(network(), num_seeds)
    before = frozen_copy(model)
    with pytest.raises(LayoutMismatch, match=r"0: .*2x4\+2x3.*num_seeds"):
        model.load_state_dict(saved)
    assert frozen_copy(model) == before


def test_the_reason_for_a_refusal_names_the_layer_and_what_it_takes() -> None:
    saved = _edited(dict(grown_network().state_dict()), EXTRA, lambda e: {**e, "version": 99})
    with pytest.raises(LayoutMismatch, match=r"2: .*version 99.*version 3"):
        wrapped_twin(network()).load_state_dict(saved)


def test_a_model_inside_another_one_loads_too() -> None:
    inner = grown_network()
    outer = nn.Sequential(inner, nn.Linear(6, 2))
    fresh = nn.Sequential(wrapped_twin(network()), nn.Linear(6, 2))
    fresh.load_state_dict(_through_a_file(outer.state_dict()))
    x = torch.randn(3, 5)
    assert torch.equal(fresh(x), outer(x))
    plain = nn.Sequential(network(), nn.Linear(6, 2))
    plain.load_state_dict(host_state_dict(outer))
    outer.load_state_dict(plain.state_dict())


def test_the_callers_state_dict_is_not_changed_by_loading() -> None:
    saved = grown_network().state_dict()
    keys = list(saved)
    wrapped_twin(network()).load_state_dict(saved)
    assert list(saved) == keys


def test_copied_models_load_into_themselves_and_not_into_the_original() -> None:
    model = wrapped_twin(network())
    twin = copy.deepcopy(model)
    other = network()
    before = frozen_copy(model)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin[0].weight, other[0].weight)
    assert frozen_copy(model) == before
    spoilt = _edited(dict(grown_network().state_dict()), STATE, _put(1, 0, 11))
    frozen = frozen_copy(twin)
    with pytest.raises(LayoutMismatch):
        twin.load_state_dict(spoilt)
    assert frozen_copy(twin) == frozen
