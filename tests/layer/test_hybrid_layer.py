"""A hybrid layer: two implementations of one state, and what it says about them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrid_cases import FEATURE, MODES, hybrid, inputs_of, ran, small
from layer_cases import (
    CASES,
    MIXES,
    assert_bitwise,
    assert_same,
    training_step,
)
from torch import Tensor

from kasmina_fx import (
    HybridKasminaLayer,
    KasminaLayer,
    SeedLifecycle,
    reference,
)
from kasmina_fx.testing import graft


def test_the_signature_is_the_one_that_existing_code_calls() -> None:
    def names(member: Any) -> list[str]:
        return [name for name in inspect.signature(member).parameters if name != "self"]

    assert names(HybridKasminaLayer)[:6] == [
        "base_layer",
        "layer_id",
        "num_seeds",
        "enable_telemetry",
        "device",
        "force_implementation",
    ]
    assert names(HybridKasminaLayer.set_model_context) == ["model_id"]
    assert names(HybridKasminaLayer.request_germination)[1:] == [
        "blueprint_id",
        "grafting_strategy",
    ]
    assert names(HybridKasminaLayer.compare_implementations) == ["x", "num_runs"]
    for name in ("chunked", "legacy", "auto"):
        assert names(getattr(HybridKasminaLayer, f"enable_{name}_mode")) == []


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_implementations_give_the_same_output_and_gradients(
    case: Any, mix: Callable[[KasminaLayer], None]
) -> None:
    layer, inputs = hybrid(case, mix), inputs_of(case)
    steps = {}
    for name in MODES:
        layer.force_implementation = name
        layer.load_state_dict(layer.state_dict())
        steps[name] = training_step(layer, layer, inputs)
    for name, value in steps["legacy"].items():
        if name.startswith("out"):
            torch.testing.assert_close(steps["chunked"][name], value, atol=1e-6, rtol=1e-6)
    assert_same(steps["chunked"], steps["legacy"], 1e-5)  # sums of up to 400 terms
    assert layer.get_implementation_stats()["calls"] == {"legacy": 1, "chunked": 1}


@pytest.mark.parametrize("stage", list(SeedLifecycle)[1:8], ids=lambda stage: stage.name)
def test_both_give_the_same_at_each_stage(stage: SeedLifecycle) -> None:
    layer, x = small(), torch.randn(5, 4)
    graft(layer, [0, 2], "mlp", stage=stage)
    steps = {}
    for name in MODES:
        layer.force_implementation = name
        steps[name] = training_step(layer, layer, (x,))
    assert_same(steps["chunked"], steps["legacy"], 1e-6)


def test_legacy_is_the_reference_and_dormant_seeds_leave_the_base_alone() -> None:
    layer, x = small(force_implementation="legacy"), torch.randn(5, 4)
    assert_bitwise(layer(x), layer.base_layer(x))
    graft(layer, 1, "mlp", 0.7)
    assert_bitwise(layer(x), reference.forward(layer, x))


# Choosing.


def test_a_flag_decides_by_model_and_layer_at_each_call() -> None:
    layer = small()
    flags: Any = layer.feature_flags
    assert ran(layer) == "legacy"
    flags.set_enabled(FEATURE, True)
    assert ran(layer) == "chunked"
    flags.add_to_blocklist(FEATURE, "fc")
    assert ran(layer) == "legacy"
    flags.remove_from_blocklist(FEATURE, "fc")
    flags.set_enabled(FEATURE, False)
    flags.add_to_allowlist(FEATURE, "m")
    assert ran(layer) == "legacy"
    layer.set_model_context("m")
    assert ran(layer) == "chunked"
    layer.set_model_context(None)
    assert ran(layer) == "legacy"


def test_what_is_forced_runs_whatever_the_flag_says() -> None:
    layer = small(force_implementation="chunked")
    assert ran(layer) == "chunked"
    layer.enable_legacy_mode()
    assert (ran(layer), layer.force_implementation) == ("legacy", "legacy")
    layer.enable_chunked_mode()
    assert (ran(layer), layer.force_implementation) == ("chunked", "chunked")
    layer.enable_auto_mode()
    assert (ran(layer), layer.force_implementation) == ("legacy", None)


def test_without_flags_of_its_own_it_asks_the_manager_that_all_share(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kasmina_fx.rollout import get_feature_manager, set_feature_manager

    monkeypatch.chdir(tmp_path)
    set_feature_manager(None)
    layer = small(feature_flags=None)
    assert layer.feature_flags is get_feature_manager()
    assert ran(layer) == "legacy"
    get_feature_manager().set_enabled(FEATURE, True)
    assert ran(layer) == "chunked"
    set_feature_manager(None)


def test_a_switch_keeps_state_weights_and_optimizer() -> None:
    layer, x = small(force_implementation="legacy"), torch.randn(8, 4)
    graft(layer, [0, 1], "mlp", 0.5)
    optimizer = torch.optim.Adam(layer.parameters())
    parameters = list(layer.parameters())
    alone = copy.deepcopy(layer)
    own = torch.optim.Adam(alone.parameters())
    for step in range(6):
        layer.force_implementation = MODES[step % 2]
        for model, optim in ((layer, optimizer), (alone, own)):
            optim.zero_grad()
            model(x).square().mean().backward()
            optim.step()
        if step == 2:
            layer.set_alpha(0, 0.8)
            alone.set_alpha(0, 0.8)
    assert all(p is q for p, q in zip(parameters, layer.parameters(), strict=True))
    for name, value in alone.state_dict().items():
        if "extra" not in name:
            torch.testing.assert_close(layer.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_germination_is_real_in_both_modes() -> None:
    for name in MODES:
        layer = small(force_implementation=name)
        assert layer.request_germination(1, "mlp")
        assert layer.state.get_state_distribution() == {"DORMANT": 2, "GERMINATED": 1}
        assert layer.cancel_germination(1)


def test_both_keep_the_same_statistics_of_the_output() -> None:
    x, found = torch.randn(32, 4), {}
    for name in MODES:
        torch.manual_seed(0)
        layer = small(force_implementation=name)
        graft(layer, 0, "mlp", 0.5)
        graft(layer, 1, "affine", stage=SeedLifecycle.TRAINING)
        layer(x)
        layer.eval()
        layer(x)  # keeps none
        report = layer.get_health_report()
        assert report["implementation"] == name
        found[name] = report
    for key, value in found["legacy"].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found["chunked"][key], value, equal_nan=True)
    assert found["legacy"]["count"].tolist() == [64.0] * 3
    assert found["legacy"]["runs"].tolist() == [1.0, 1.0, 0.0]


def test_a_blueprint_that_is_not_finite_is_kept_out_and_counted_by_both() -> None:
    for name in MODES:
        layer = small(force_implementation=name)
        graft(layer, 0, "mlp", 0.5)
        with torch.no_grad():
            next(layer.blueprint_parameters())[0].fill_(torch.nan)
        assert_bitwise(layer(torch.ones(2, 4)), layer.base_layer(torch.ones(2, 4)))
        assert layer.get_health_report()["rejected"].tolist() == [1.0, 0.0, 0.0], name
