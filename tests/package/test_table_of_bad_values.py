"""Every public call refuses every bad value with an error of ours, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import snapshot
from torch import nn

import kasmina_fx as k
from kasmina_fx import KasminaError, KasminaLayer, blueprints, checkpoint, controllers, optim
from kasmina_fx.testing import graft

#: No module, or graph module.
NO_MODULES = [None, 5, "s", [], nn.Linear, torch.ones(2), object()]
X = torch.ones(2, 4)


def _sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))])


def _loss(model: nn.Module, batch: Any) -> float:
    return 0.0


OF_MODELS: dict[str, Callable[[Any], Any]] = {
    "kasminify": k.kasminify,
    "unkasminify": k.unkasminify,
    "finalize": k.finalize,
    "step_epoch": k.step_epoch,
    "health_report": k.health_report,
    "host_parameters": k.host_parameters,
    "host_state_dict": k.host_state_dict,
    "kasmina_layers": k.kasmina_layers,
    "follow_scaler": lambda m: k.follow_scaler(m, None),
    "transaction": lambda m: k.transaction(m).__enter__(),
    "hold_seeds": lambda m: k.hold_seeds(m).__enter__(),
    "unobserved": lambda m: k.unobserved(m).__enter__(),
    "packs": k.packs,
    "seeds_off": lambda m: k.seeds_off(m).__enter__(),
    "counterfactual": lambda m: k.counterfactual(m, X, _loss),
    "groups_by_layer": k.groups_by_layer,
    "groups_by_seed": k.groups_by_seed,
    "explain": lambda m: k.explain(m, X),
    "capture": lambda m: k.capture(m, X),
    "rewrite": k.rewrite,
    "graph_text": k.graph_text,
    "inserted_text": k.inserted_text,
    "op_counts": k.op_counts,
    "find_matches": k.find_matches,
    "graph_diff": lambda m: k.graph_diff(m, m),
    "HealthController": lambda m: controllers.HealthController(m, budget=3),
    "checkpoint.save": lambda m: checkpoint.save(m, "never"),
    "checkpoint.load": lambda m: checkpoint.load(m, "never"),
    "optim.sync": lambda m: optim.sync(_sgd(), m),
    "optim.follow": lambda m: optim.follow(_sgd(), m),
    "KasminaLayer": lambda m: KasminaLayer(m, 3),
    "ChunkedKasminaLayer": lambda m: k.ChunkedKasminaLayer(m, 3),
}


@pytest.mark.parametrize("name", OF_MODELS)
def test_what_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    for value in NO_MODULES:
        with pytest.raises(KasminaError) as caught:
            OF_MODELS[name](value)
        assert str(caught.value), value
    assert not Path("never").exists()


#: By name, so that a call may list those that it takes.
VALUES: dict[str, Any] = {
    "None": None,
    "5": 5,
    "-1": -1,
    "2.5": 2.5,
    "True": True,
    "text": "x",
    "[]": [],
    "tensor": torch.ones(2),
    "meta": torch.empty(2, device="meta", dtype=torch.int64),
    "object": object(),
    "huge": 10**5000,  # more digits than Python prints
    "nan": float("nan"),
    "dict": {},
    "bytes": b"x",
}


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6))


def _taken(*names: str) -> set[str]:
    return set(names)


_NONE, _ON = _taken("None", "[]", "dict"), _taken("None", "True")
Call = Callable[[KasminaLayer, Any], Any]
#: What is called, and which of the values it takes.
CALLS: dict[str, tuple[Call, set[str]]] = {
    "bank_of": (lambda layer, v: layer.bank_of(v), set()),
    "reserve": (lambda layer, v: layer.reserve(v), _taken("5")),
    "reserve a blueprint": (lambda layer, v: layer.reserve(4, v), _taken("None")),
    "accepts": (lambda layer, v: layer.accepts(v), set()),
    "accepts a blueprint": (lambda layer, v: layer.accepts(0, v), _taken("None")),
    "lookup": (lambda layer, v: blueprints.lookup(v), set()),
    "register": (lambda layer, v: blueprints.register(v), set()),
    "register_blueprint": (lambda layer, v: layer.register_blueprint(v), set()),
    "germinate": (lambda layer, v: layer.request_germination(v), _taken("[]", "dict")),
    "germinate a blueprint": (lambda layer, v: layer.request_germination(2, v), _taken("None")),
    "germinate with a strategy": (lambda layer, v: layer.request_germination(2, None, v), set()),
    "advance": (lambda layer, v: layer.advance(v, 1), _taken("[]", "dict")),
    "advance to": (lambda layer, v: layer.advance(0, v), set()),
    "cancel": (lambda layer, v: layer.cancel_germination(v), _taken("[]", "dict")),
    "reset": (lambda layer, v: layer.reset(v), _taken("[]", "dict")),
    "set_alpha": (lambda layer, v: layer.set_alpha(0, v), _taken("5", "-1", "2.5")),
    "snapshot": (lambda layer, v: layer.snapshot(v), _NONE),
    "rollback": (lambda layer, v: layer.rollback(v), set()),
    "rollback seeds": (lambda layer, v: layer.rollback(layer.snapshot(), v), _NONE),
    "rollback, mark": (lambda layer, v: layer.rollback(layer.snapshot(), [], mark=v), _ON),
    "a seed": (lambda layer, v: layer.seeds[v], set()),
    "set_telemetry": (lambda layer, v: layer.set_telemetry(v), _taken("True")),
    "telemetry_enabled": (lambda layer, v: setattr(layer, "telemetry_enabled", v), _taken("True")),
    "finalize, growing": (lambda layer, v: k.finalize(layer, growing=v), set()),
    "finalize, inputs": (
        lambda layer, v: k.finalize(layer, growing="drop", example_inputs=v), _taken("None")
    ),
    "get_seed_state": (lambda layer, v: layer.state.get_seed_state(v), set()),
    "find_seeds_by_state": (lambda layer, v: layer.state.find_seeds_by_state(v), _taken("5")),
    "set a lifecycle state": (
        lambda layer, v: layer.state.batch_set_lifecycle_state([], v), _taken("5")
    ),
    "set_rows": (lambda layer, v: layer.state.set_rows([], blueprint_id=v), _taken("5")),
    "StateTensor": (lambda layer, v: k.StateTensor(v), _taken("5")),
    "ChunkManager": (lambda layer, v: k.ChunkManager(v, 1), _taken("5")),
    "ChunkManager, chunks": (lambda layer, v: k.ChunkManager(5, v), _taken("5")),
    "TelemetryPolicy every": (lambda layer, v: k.TelemetryPolicy(every=v), _taken("5")),
    "TelemetryPolicy fraction": (lambda layer, v: k.TelemetryPolicy(fraction=v), set()),
    "TelemetryPolicy gradients": (lambda layer, v: k.TelemetryPolicy(gradients=v), _taken("True")),
    "TelemetryPolicy in_eval": (lambda layer, v: k.TelemetryPolicy(in_eval=v), _taken("True")),
    "GraftingConfig": (lambda layer, v: k.GraftingConfig(fixed_steps=v), _taken("5")),
    "SeedConfig": (lambda layer, v: k.SeedConfig(embargo_epochs=v), _taken("5")),
    "num_seeds": (lambda layer, v: KasminaLayer(nn.Linear(4, 6), v), _taken("5")),
    "config": (lambda layer, v: KasminaLayer(nn.Linear(4, 6), 3, config=v), _taken("None")),
    "telemetry": (lambda layer, v: KasminaLayer(nn.Linear(4, 6), 3, telemetry=v), _taken("True")),
    "reserved": (lambda layer, v: KasminaLayer(nn.Linear(4, 6), 3, reserve=v), _taken("5")),
    "chunk_sizes": (lambda layer, v: KasminaLayer(nn.Linear(4, 6), 3, chunk_sizes=v), {"None"}),
    "feature_dim": (
        lambda layer, v: KasminaLayer(nn.Linear(4, 6), 3, feature_dim=v), _taken("None", "-1", "5")
    ),
    "layer_id": (
        lambda layer, v: KasminaLayer(nn.Linear(4, 6), 3, layer_id=v), _taken("None", "text")
    ),
    "kasminify, num_seeds": (
        lambda layer, v: k.kasminify(_net(), num_seeds=v, compile=False), _taken("None", "5")
    ),
    "kasminify, options": (
        lambda layer, v: k.kasminify(_net(), options=v, compile=False), _taken("None", "dict")
    ),
    "kasminify, mode": (lambda layer, v: k.kasminify(_net(), mode=v, compile=False), {"None"}),
    "kasminify, compile": (lambda layer, v: k.kasminify(_net(), compile=v), _taken("True")),
    "kasminify, targets": (lambda layer, v: k.kasminify(_net(), targets=v, compile=False), set()),
    "kasminify, filter_fn": (
        lambda layer, v: k.kasminify(_net(), filter_fn=v, compile=False), _taken("None")
    ),
    "HybridKasminaLayer, force_implementation": (
        lambda layer, v: k.HybridKasminaLayer(nn.Linear(4, 6), None, 3, force_implementation=v),
        _taken("None"),
    ),
    "HybridKasminaLayer, feature_flags": (
        lambda layer, v: k.HybridKasminaLayer(nn.Linear(4, 6), None, 3, feature_flags=v),
        _taken("None"),
    ),
    "FeatureFlagManager": (lambda layer, v: k.FeatureFlagManager(v), _taken("None", "text")),
    "FeatureFlagManager, watch": (
        lambda layer, v: k.FeatureFlagManager(watch=v), _taken("None", "5", "2.5")
    ),
    "MigrationRouter": (lambda layer, v: k.MigrationRouter(v), _taken("None")),
    "seeds_off, seeds": (lambda layer, v: k.seeds_off(layer, v).__enter__(), _NONE),
    "packs, capture": (lambda layer, v: k.packs(layer).capture(v), _taken("text")),
    "packs, activate": (lambda layer, v: k.packs(layer).activate(v), set()),  # seeds would be lost
    "packs, per_sample": (lambda layer, v: k.packs(layer).activate(per_sample=v), _taken("[]")),
    "packs, delete": (lambda layer, v: k.packs(layer).delete(v), set()),
    "counterfactual, batches": (
        lambda layer, v: k.counterfactual(layer, v, _loss),
        _taken("text", "tensor", "meta", "dict", "bytes"),
    ),
    "counterfactual, loss_fn": (lambda layer, v: k.counterfactual(layer, X, v), set()),
    "counterfactual, groups": (
        lambda layer, v: k.counterfactual(layer, X, _loss, v), _taken("None", "dict")
    ),
    "ab.compare": (lambda layer, v: k.ab.compare(_net(), v), set()),
    "ab.ShadowMode": (lambda layer, v: k.ab.ShadowMode(layer, v), set()),
}  # fmt: skip


@pytest.fixture
def grown() -> KasminaLayer:
    layer = KasminaLayer(nn.Linear(4, 6), 3, layer_id="fc")
    graft(layer, [0], "affine", 0.5)
    return layer


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_value_is_refused_and_changes_nothing(name: str, grown: KasminaLayer) -> None:
    call, taken = CALLS[name]
    registered = blueprints.names()
    for text, value in VALUES.items():
        if text in taken:
            call(copy.deepcopy(grown), value)  # and no error
            continue
        before = snapshot(grown)
        with pytest.raises(KasminaError) as caught:
            call(grown, value)
        assert str(caught.value), text
        assert snapshot(grown) == before, text
    assert blueprints.names() == registered


def test_no_public_call_is_forgotten() -> None:
    named = " ".join([*OF_MODELS, *CALLS])
    elsewhere = {
        *("KasminaTracer", "register_strategy", "compiles", "kasmina"),  # tests of their own
        *("SeedLifecycle", "GraftingStrategy", "DEFAULT_PASSES"),  # no calls
        *("Explanation", "GraphDiff", "HealthReport", "LogicalSeed", "SeedState", "Snapshot"),
        *("CounterfactualReport", "ModelPacks"),
    }
    for public in k.__all__:
        value = getattr(k, public)
        is_error = isinstance(value, type) and issubclass(value, Exception)
        if callable(value) and not is_error and public not in elsewhere:
            assert public in named, public
