"""A hybrid layer in state dicts, copies and models; what it holds and refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrid_cases import MODES, hybrid, small
from layer_cases import (
    CASES,
    all_builtins,
    assert_bitwise,
    no_seed,
)
from torch import Tensor, nn

from kasmina_fx import (
    ChunkedKasminaLayer,
    HybridKasminaLayer,
    InvalidArgument,
    InvalidType,
    kasmina_layers,
)
from kasmina_fx.testing import graft

# Copies, state dicts, memory.


def test_the_state_dict_is_the_chunked_layers() -> None:
    layer = hybrid(CASES["linear, 2-D"], all_builtins)
    chunked = ChunkedKasminaLayer(nn.Linear(7, 12), 6)
    chunked.load_state_dict(layer.state_dict())
    assert all(isinstance(value, Tensor) for value in layer.state_dict().values())
    assert chunked.state_dict().keys() == layer.state_dict().keys()
    layer.load_state_dict(chunked.state_dict())
    x = torch.randn(5, 7)
    assert_bitwise(layer(x), layer.forward(x))
    plain = nn.Linear(7, 12)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.base_layer.state_dict()["weight"], plain.weight)


def old_state_dict(prefix: str = "") -> tuple[dict[str, Any], nn.Linear]:
    """As older code saved it: two layers, flat and nested, and counters."""
    chunked, legacy = nn.Linear(4, 6), nn.Linear(4, 6)
    saved: dict[str, Any] = {}
    for name, value in chunked.state_dict().items():
        saved[f"{prefix}chunked_layer.base_layer.{name}"] = value
    for name, value in legacy.state_dict().items():
        saved[f"{prefix}legacy_layer.default_transform.{name}"] = value
    nested = {f"base_layer.{name}": value for name, value in chunked.state_dict().items()}
    saved |= {"chunked_layer": nested, "legacy_layer": legacy.state_dict()}
    saved |= {"_implementation_calls": {"legacy": 3}, "_implementation_latency": {"legacy": 0.1}}
    return saved, chunked


def test_old_nested_layouts_load_strictly_and_are_left_as_they_were() -> None:
    saved, trained = old_state_dict()
    keys = list(saved)
    layer = small()
    layer.load_state_dict(saved, strict=True)
    assert torch.equal(layer.base_layer.state_dict()["weight"], trained.weight)
    assert list(saved) == keys
    nested_alone = {key: value for key, value in saved.items() if "." not in key}
    other = small()
    other.load_state_dict(nested_alone, strict=True)
    assert torch.equal(other.base_layer.state_dict()["weight"], trained.weight)


class OldNames(nn.Module):
    """A base whose own entry is named as older code named its nested dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.legacy_layer = nn.Parameter(torch.ones(6))
        self.out_features = 6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.legacy_layer


def test_entries_of_a_base_with_such_a_name_are_its_own() -> None:
    layer = HybridKasminaLayer(OldNames(), "fc", 3, chunk_sizes=[2, 2, 2], feature_dim=-1)
    layer.load_state_dict({"legacy_layer": torch.full((6,), 3.0)})
    assert layer.state_dict()["legacy_layer"].tolist() == [3.0] * 6


def test_old_layouts_load_inside_a_model() -> None:
    model = nn.Sequential(small(), nn.ReLU())
    saved, trained = old_state_dict("0.")
    for key in [key for key in saved if "." not in key]:
        del saved[key]  # torch lets no layer speak for entries beside its own
    model.load_state_dict(saved, strict=True)
    assert torch.equal(model.state_dict()["0.weight"], trained.weight)
    saved["0.bogus"] = torch.ones(1)
    with pytest.raises(RuntimeError, match="bogus"):
        model.load_state_dict(saved, strict=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_run_what_the_layer_runs(copied: Callable[[Any], Any]) -> None:
    layer = hybrid(CASES["linear, 2-D"], all_builtins, force_implementation="legacy")
    layer.compile()
    x = torch.randn(5, 7)
    twin = copied(layer)
    assert_bitwise(twin(x), layer(x))
    twin.enable_chunked_mode()
    assert layer.force_implementation == "legacy"
    assert twin.kasmina is not layer.kasmina


def test_it_holds_what_the_chunked_layer_holds() -> None:
    layer, chunked = small(), ChunkedKasminaLayer(nn.Linear(4, 6), 3)

    def held(module: nn.Module) -> int:
        tensors = [*module.parameters(), *module.buffers()]
        return sum(t.nbytes for t in {t.untyped_storage().data_ptr(): t for t in tensors}.values())

    for seeds in (layer, chunked):
        graft(seeds, [0, 1], "mlp")
        seeds(torch.ones(2, 4))
    assert held(layer) == held(chunked)


def test_settling_makes_it_a_chunked_layer() -> None:
    layer = hybrid(CASES["linear, 2-D"], all_builtins)
    x = torch.randn(5, 7)
    expected, state = layer(x), layer.state_dict()
    settled = layer.settle()
    assert type(settled) is ChunkedKasminaLayer
    assert settled is layer
    torch.testing.assert_close(settled(x), expected, atol=1e-6, rtol=1e-6)
    assert settled.state_dict().keys() == state.keys()
    assert not {"switch", "shadow"} & settled.__dict__.keys()
    assert copy.deepcopy(settled).num_seeds == 6


def test_it_is_a_layer_of_its_model() -> None:
    model = nn.Sequential(small(), nn.Linear(6, 2))
    assert list(kasmina_layers(model)) == ["0"]
    traced = torch.fx.symbolic_trace(model)
    x = torch.ones(2, 4)
    torch.testing.assert_close(traced(x), model(x))
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_functional_call_and_vmap_reach_its_weights() -> None:
    layer, x = small(force_implementation="chunked"), torch.randn(3, 4)
    graft(layer, 1, "mlp", 0.5)
    doubled = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, x), twin(x))
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_written_state_is_taken_over_before_either_runs() -> None:
    for name in MODES:
        layer, grown = small(force_implementation=name), small(force_implementation=name)
        graft(grown, 1, "mlp", 0.5)
        graft(layer, 1, "mlp", 0.0)
        with torch.no_grad():
            for own, theirs in zip(layer.buffers(), grown.buffers(), strict=True):
                own.copy_(theirs)
            for p, q in zip(layer.parameters(), grown.parameters(), strict=True):
                p.copy_(q)
        x = torch.randn(3, 4)
        torch.testing.assert_close(layer(x), grown(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"force_implementation": "new"}, InvalidArgument, "'new'.*legacy.*chunked"),
        ({"fallback": 1}, InvalidType, "bool"),
        ({"feature_flags": "flags.json"}, InvalidType, "is_enabled"),
        ({"num_seeds": 7}, InvalidArgument, "7"),
    ],
)
def test_bad_arguments_are_refused(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HybridKasminaLayer(nn.Linear(4, 6), **kwargs)


def test_bad_calls_are_refused_and_change_nothing() -> None:
    layer = hybrid(CASES["linear, 2-D"], no_seed, force_implementation="legacy")
    with pytest.raises(InvalidArgument, match="num_runs=0"):
        layer.compare_implementations(torch.ones(1, 7), 0)
    wrong: Any = [1.0]
    with pytest.raises(InvalidType, match="Tensor"):
        layer.compare_implementations(wrong)
    with pytest.raises(InvalidType, match="model_id"):
        layer.set_model_context(wrong)
    with pytest.raises(InvalidArgument, match="force_implementation"):
        layer.force_implementation = "both"
    with pytest.raises(ValueError, match="seed -1"):
        layer.request_germination(-1, "mlp")
    assert layer.force_implementation == "legacy"
