"""A hybrid layer: two implementations of one state, and what it says about them."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrid_cases import FEATURE, hybrid, inputs_of, small
from layer_cases import (
    CASES,
    MIXES,
    all_builtins,
    assert_bitwise,
    assert_same,
    no_seed,
    training_step,
)
from torch import Tensor, nn

from kasmina_fx import (
    ChunkedKasminaLayer,
    HybridKasminaLayer,
    InvalidArgument,
    InvalidType,
    KasminaLayer,
    SeedLifecycle,
    kasmina_layers,
    reference,
)
from kasmina_fx.testing import graft

MODES = ("legacy", "chunked")


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


def ran(layer: HybridKasminaLayer) -> str:
    before = layer.get_implementation_stats()["calls"]
    layer(torch.ones(2, 4))
    after = layer.get_implementation_stats()["calls"]
    (name,) = (name for name in MODES if after[name] > before[name])
    return name


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


# What raises.


class Picky(nn.Linear):
    """Refuses calls, for a while."""

    refused = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.refused > 0:
            self.refused -= 1
            raise RuntimeError("no kernel for this")
        return super().forward(x)


def picky(**kwargs: Any) -> tuple[HybridKasminaLayer, Picky]:
    base = Picky(4, 6)
    return HybridKasminaLayer(base, "fc", 3, **kwargs), base


@pytest.mark.parametrize("name", MODES)
def test_what_raises_is_switched_off_and_the_other_one_answers(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (other,) = set(MODES) - {name}
    layer, base = picky(force_implementation=name)
    x = torch.ones(2, 4)
    expected = base(x)
    base.refused = 1
    assert_bitwise(layer(x), expected)
    assert [ran(layer), ran(layer)] == [other, other]
    stats = layer.get_implementation_stats()
    assert stats["current_implementation"] == other
    assert (stats[f"{name}_available"], stats[f"{other}_available"]) == (False, True)
    assert "no kernel for this" in stats["switched_off"][name]
    assert layer.get_health_report()["status"] == "degraded"
    assert len([r for r in caplog.records if "switched off" in r.getMessage()]) == 1
    layer.force_implementation = name  # another chance
    assert ran(layer) == name
    assert layer.get_health_report()["status"] == "healthy"


def test_a_call_that_both_refuse_raises_and_switches_nothing_off() -> None:
    layer = small(force_implementation="chunked")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        layer(torch.ones(2, 5))
    assert ran(layer) == "chunked"
    assert sum(layer.get_implementation_stats()["calls"].values()) == 1


def test_without_a_fallback_the_error_is_raised() -> None:
    layer, base = picky(force_implementation="chunked", fallback=False)
    base.refused = 1
    with pytest.raises(RuntimeError, match="no kernel"):
        layer(torch.ones(2, 4))
    assert ran(layer) == "chunked"


class Alone(nn.Module):
    """A blueprint that will not run together with others, once it is told not to."""

    refuses = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((size,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        if Alone.refuses and torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("not below vmap")
        return x * self.gain


def test_a_blueprint_that_only_runs_alone_runs_seed_by_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = small(force_implementation="chunked")
    layer.register_blueprint(Alone, name="alone")
    graft(layer, [0, 2], "alone", 0.5)
    x = torch.randn(8, 4)
    expected = layer(x)
    monkeypatch.setattr(Alone, "refuses", True)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
    assert "not below vmap" in layer.switch.off["chunked"]
    report = layer.get_health_report()
    assert report["count"].tolist() == [32.0] * 3  # of both calls
    assert report["runs"].tolist() == [1.0, 0.0, 1.0]


# Reports.


def test_reports_have_the_keys_that_existing_code_reads() -> None:
    layer = small(force_implementation="chunked")
    layer(torch.ones(2, 4))
    stats = layer.get_implementation_stats()
    assert {
        "current_implementation",
        "legacy_available",
        "chunked_available",
        "force_implementation",
        "calls",
        "avg_latency_ms",
    } <= stats.keys()
    assert stats["avg_latency_ms"]["chunked"] > 0.0 == stats["avg_latency_ms"]["legacy"]
    whole = layer.get_layer_stats()
    assert whole["layer_id"] == "fc"
    assert whole["implementation"] == "chunked"
    assert stats.keys() <= whole.keys()
    assert {"forward_count", "num_blueprints", "output_dim", "chunks_per_seed", "num_seeds"} <= (
        whole.keys()
    )
    assert (whole["forward_count"], whole["chunks_per_seed"]) == (1, 2.0)
    report = layer.get_health_report()
    assert {"layer_id", "timestamp", "implementation", "status", "performance"} <= report.keys()


def test_compare_implementations_measures_both_and_changes_nothing() -> None:
    layer = hybrid(CASES["batch norm"], all_builtins)
    (x,) = inputs_of(CASES["batch norm"])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    found = layer.compare_implementations(x, num_runs=3)
    assert (found["layer_id"], found["num_runs"]) == ("fc", 3)
    assert found["input_shape"] == list(x.shape)
    assert found["max_output_difference"] < 1e-6
    for name in MODES:
        one = found["implementations"][name]
        assert one["available"]
        assert 0.0 < one["min_latency_ms"] <= one["avg_latency_ms"] <= one["max_latency_ms"]
        assert one["output_shape"] == list(x.shape)
    assert found["implementations"]["chunked"]["num_seeds"] == 6
    assert layer.training
    assert layer.base.training
    assert layer.get_implementation_stats()["calls"] == {"legacy": 0, "chunked": 0}
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


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
