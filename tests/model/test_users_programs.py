"""Small programs that people wrote: each does what plain PyTorch does, or is refused in words."""

from __future__ import annotations

import collections
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

from kasmina_fx import (
    DEFAULT_PASSES,
    InvalidArgument,
    InvalidType,
    KasminaLayer,
    SeedLifecycle,
    StillGrowing,
    TelemetryPolicy,
    capture,
    explain,
    find_matches,
    graph_text,
    health_report,
    kasmina,
    kasmina_layers,
    kasminify,
    unkasminify,
)
from kasmina_fx.controllers import HealthController
from kasmina_fx.testing import assert_no_recompiles, graft

X = torch.linspace(-1, 1, 8).view(2, 4)


def net(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6))
    return kasminify(made, **({"num_seeds": 3, "compile": False} | settings))


def layer_of(model: nn.Module) -> KasminaLayer:
    return kasmina_layers(model)["0"]


# Hooks of the root.


@pytest.mark.parametrize("telemetry", [False, True])
def test_hooks_of_a_compiled_root_work_whenever_they_come_and_go(telemetry: bool) -> None:
    model = net(compile=True, telemetry=telemetry)
    before = model(X)
    handle = model.register_forward_hook(lambda m, args, out: out * 0)
    assert not model(X).any()
    handle.remove()
    assert torch.equal(model(X), before)
    model.register_forward_pre_hook(lambda m, args: (args[0] * 0,))
    bias: Any = model[0].bias
    torch.testing.assert_close(model(X), bias.expand(2, -1))


# Outputs.

Named = collections.namedtuple("Named", ["y", "more"])  # noqa: PYI024


class Returns(nn.Module):
    """A linear layer that returns more than a tensor."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.wrap, self.out_features = nn.Linear(4, 6), wrap, 6

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    "wrap",
    [lambda y: Named(y, 1), lambda y: (y, 1), lambda y: [y, 1]],
    ids=["namedtuple", "tuple", "list"],
)
def test_an_output_keeps_its_type(wrap: Callable[[Tensor], Any], backend: str | None) -> None:
    torch._dynamo.reset()
    model = kasminify(nn.Sequential(Returns(wrap)), targets=(Returns,), num_seeds=2, compile=False)
    graft(layer_of(model), [0], "affine")
    out = (torch.compile(model, backend=backend) if backend else model)(X)
    plain = wrap(X)
    assert type(out) is type(plain)
    assert len(out) == 2
    assert out[1] == 1


@pytest.mark.parametrize("wrap", [lambda y: {"y": y}, lambda y: None, lambda y: (None, y)])
def test_an_output_without_a_tensor_in_front_is_refused(wrap: Callable[[Tensor], Any]) -> None:
    model = kasminify(nn.Sequential(Returns(wrap)), targets=(Returns,), num_seeds=2, compile=False)
    with pytest.raises(InvalidType, match=r"the base returned a .*: seeds watch a tensor"):
        model(X)


# Folding.


def fossils(model: nn.Module, kind: str) -> None:
    graft(layer_of(model), [0, 1], kind, 0.7, SeedLifecycle.FOSSILIZED)
    with torch.no_grad():
        for parameter in layer_of(model).blueprint_parameters(False):
            parameter.normal_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["affine", "lora"])
@pytest.mark.parametrize(
    "base", [nn.Linear, lambda i, o, bias: nn.Conv1d(i, o, 3, padding=1, bias=bias)]
)
def test_linear_blueprints_fold(base: Callable[..., nn.Module], kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(base(4, 6, bias=bias)).double()
    model = kasminify(
        made, num_seeds=3, targets=(nn.Linear, nn.Conv1d), compile=False, telemetry=False
    )
    fossils(model, kind)
    x = (
        torch.randn(2, 4, dtype=torch.float64)
        if base is nn.Linear
        else torch.randn(2, 4, 5).double()
    )
    before = model(x)
    folded = unkasminify(model, fold=True)
    torch.testing.assert_close(folded(x), before)
    assert type(folded[0]) in (nn.Linear, nn.Conv1d)
    assert (folded[0].bias is None) == (not bias and kind == "lora")


@pytest.mark.parametrize(
    "change",
    [lambda m: prune.l1_unstructured(m, "weight", 0.5), spectral_norm, weight_norm],
    ids=["prune", "spectral_norm", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_computes_is_not_folded_into(
    change: Callable[[nn.Module], Any],
) -> None:
    model = net()
    fossils(model, "affine")
    change(model[0])
    before = model.eval()(X)
    with pytest.raises(StillGrowing, match="computed by a hook"):
        unkasminify(model, fold=True)
    torch.testing.assert_close(model(X), before)


def test_hooks_of_a_module_by_hand_come_before_its_seeds_and_do_not_fold() -> None:
    layer = KasminaLayer(nn.Linear(4, 6), 3)
    graft(layer, [0], "affine", 0.7, SeedLifecycle.FOSSILIZED)
    layer.base.register_forward_hook(lambda m, args, out: out.relu())
    with pytest.raises(StillGrowing, match="hooks of its base"):
        unkasminify(nn.Sequential(layer), fold=True)


# Random numbers.


def test_a_germination_draws_nothing_from_the_users_generator() -> None:
    model = net()
    before = torch.get_rng_state()
    layer_of(model).request_germination([0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_values_follow_from_seed_layer_and_blueprint_id() -> None:
    def values(start: int = 7, seed: int = 0, name: str = "fc") -> Tensor:
        layer = KasminaLayer(nn.Linear(4, 6), 3, layer_id=name)
        torch.manual_seed(start)
        torch.rand(seed + 1)  # how many numbers the user drew does not matter
        graft(layer, [seed])
        held = layer.bank_of(seed)
        assert held is not None
        return held[0].slot_tensors(held[1])["up.weight"]

    assert torch.equal(values(), values())
    assert torch.equal(values(), values(seed=1))  # the first blueprint of its layer, too
    assert not torch.equal(values(), values(start=8))
    assert not torch.equal(values(), values(name="out"))


# Statistics.


@pytest.mark.parametrize("backend", [None, "eager"])
def test_evaluation_counts_nothing_unless_it_is_asked_to(backend: str | None) -> None:
    torch._dynamo.reset()
    for policy, expected in ((True, 4), (TelemetryPolicy(in_eval=True), 8)):
        model = net(telemetry=policy)
        run: Any = torch.compile(model, backend=backend) if backend else model
        run(X)
        model.eval()
        run(X)
        assert layer_of(model).get_health_report()["count"].tolist() == [expected] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_and_exported_programs_keep_no_statistics_and_run() -> None:
    model = net()
    graft(layer_of(model), [0])
    expected = model(X)
    counted = layer_of(model).get_health_report()["count"].tolist()
    traced = torch.jit.trace(model, X, check_trace=False)  # which runs the model as well
    torch.testing.assert_close(traced(X), expected)
    exported = capture(model, X, frontend="export")
    assert [match.is_blend for match in find_matches(exported)] == [True]
    assert layer_of(model).get_health_report()["count"].tolist() == counted


# What can't have seeds.


def test_sparse_gradients_have_a_norm() -> None:
    model = kasminify(
        nn.Sequential(nn.Embedding(5, 6, sparse=True)), targets=(nn.Embedding,), num_seeds=2,
        compile=False,
    )  # fmt: skip
    layer = layer_of(model)
    layer.request_germination([0], None, "GRAD_NORM_GATED")
    layer.advance([0], "TRAINING")
    layer.advance([0], "GRAFTING")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([1, 2])).sum().backward()
    weight: Any = model[0].weight
    norm = weight.grad.to_dense().norm()
    optimizer.step()
    torch.testing.assert_close(layer.kasmina.grad_norm, norm)


def test_complex_layers_are_refused_before_anything_changes() -> None:
    made = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6, dtype=torch.complex64))
    with pytest.raises(InvalidArgument, match=r"1: its parameters are torch\.complex64"):
        kasminify(made, num_seeds=2, compile=False)
    assert type(made[0]) is nn.Linear


def test_a_stack_is_not_parametrized() -> None:
    model = net()
    graft(layer_of(model), [0])
    (bank,) = layer_of(model).kasmina.bank_list()
    parametrize.register_parametrization(bank, "up/weight", nn.Identity())
    with pytest.raises(InvalidArgument, match=r"mlp_run0 lacks its parameters \['up/weight'\]"):
        model(X)


def test_a_layer_around_a_layer_is_refused() -> None:
    inner = KasminaLayer(nn.Linear(4, 6), 3)
    for base in (inner, nn.Sequential(inner)):
        with pytest.raises(InvalidArgument, match="has seeds already"):
            KasminaLayer(base, 3, chunk_sizes=[2, 2, 2], feature_dim=-1)


class ChannelsFirst(nn.LayerNorm):
    """As ConvNeXt has it."""

    def forward(self, input: Tensor) -> Tensor:
        moved = input.permute(0, 2, 3, 1)
        return super().forward(moved).permute(0, 3, 1, 2)


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super().forward(input)] * 2, -1)


class Gated(nn.LayerNorm):
    def forward(self, input: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) * gate


@pytest.mark.parametrize(("kind", "why"), [(ChannelsFirst, "permute"), (Doubled, r"\(2, 3, 12\)")])
def test_a_norm_unlike_its_class_is_found_out_before_anything_changes(
    kind: Callable[[int], nn.Module], why: str
) -> None:
    made = nn.Sequential(nn.LayerNorm(6), kind(6))
    with pytest.raises(InvalidArgument, match=f"1: a {kind.__name__} .*{why}"):
        kasminify(made, targets=(nn.LayerNorm,), num_seeds=2, compile=False)
    assert type(made[0]) is nn.LayerNorm


def test_a_norm_that_takes_more_is_believed() -> None:
    made = nn.Sequential(Gated(6))
    kasminify(made, targets=(nn.LayerNorm,), num_seeds=2, compile=False)
    assert made[0](torch.randn(2, 6), torch.ones(6)).shape == (2, 6)


# What is taken.


def test_a_dry_run_changes_nothing_and_names_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    report = kasminify(made, num_seeds=3, filter_fn=lambda m, name: name != "2", dry_run=True)
    assert report.taken == {"0": 3}
    assert report.left == {"1": "a LayerNorm is none of the targets", "2": "filter_fn says no"}
    assert type(made[0]) is nn.Linear
    with caplog.at_level(logging.INFO, logger="kasmina_fx"):
        kasminify(made, num_seeds=3, compile=False)
    assert "1: left: a LayerNorm is none of the targets" in caplog.text


@pytest.mark.parametrize("name", ["compile", "dry_run"])
def test_switches_are_true_or_false(name: str) -> None:
    with pytest.raises(InvalidType, match=f"{name}='no'"):
        net(**{name: "no"})


# What is called.


class PassesBy(nn.Module):
    """An owner that reads the weight of one child, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = nn.functional.linear(self.called(args[0]), self.read.weight)
        return out


@pytest.mark.parametrize("compile", [False, True])
def test_a_first_forward_names_what_it_never_calls(
    compile: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="kasmina_fx"):
        model = kasminify(PassesBy(), num_seeds=2, compile=compile)
        for _ in range(2):
            model(X)
    (record,) = [r for r in caplog.records if r.name.endswith("model_call")]
    assert record.getMessage().startswith("read: the model's first forward called none of these")


def test_explain_finds_layers_of_a_forward_that_takes_whatever_comes() -> None:
    model = kasminify(PassesBy(), num_seeds=2, compile=False)
    graft(kasmina_layers(model)["called"], [0])
    called, read = explain(model, X).layers
    assert (called.layer, called.matched, called.blended) == ("called", True, 1)
    assert (read.layer, read.matched) == ("read", False)
    names = [node.target for node in capture(model, X).graph.find_nodes(op="placeholder")]
    assert names  # and roles were found by the same paths
    assert "param  called.weight" in graph_text(capture(model, X))


# Reports and controllers.


def test_a_report_prints_what_a_person_asks_for() -> None:
    model = net()
    graft(layer_of(model), [0])
    assert str(health_report(model)) == "0: health unknown, 0 errors; 2 DORMANT, 1 GRAFTING"
    model(X)
    assert "0: health 0." in repr(health_report(model))


def test_a_controller_leaves_epochs_to_the_loop_and_remembers() -> None:
    model = net()
    graft(layer_of(model), [0], stage=SeedLifecycle.STABILIZATION)
    controller = HealthController(model, budget=1, settle_epochs=1, evaluate_epochs=1)
    controller.step({"loss": 1.0}, advance_epoch=False)
    assert layer_of(model).seeds[0].epochs_in_state == 0
    controller.step({"loss": 1.0})
    assert layer_of(model).seeds[0].stage is SeedLifecycle.EVALUATING
    fresh = HealthController(model, budget=1, evaluate_epochs=1)
    fresh.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    fresh.step({"loss": 2.0})
    assert layer_of(model).seeds[0].stage is SeedLifecycle.CULLED
    with pytest.raises(InvalidArgument, match="no state of a controller"):
        fresh.load_state_dict({"losses": [1]})
    with pytest.raises(InvalidType, match="advance_epoch"):
        fresh.step({"loss": 1.0}, advance_epoch=1)  # type: ignore[arg-type]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        out: Tensor = self.norm(self.second(x))
        return out


def test_explain_goes_on_behind_a_graph_break_and_says_what_was_left() -> None:
    torch._dynamo.reset()
    model = kasminify(Broken(), num_seeds=2, compile=False)
    graft(kasmina_layers(model)["second"], [0])
    counted = kasmina_layers(model)["first"].get_health_report()["count"].tolist()
    said = explain(model, X)
    assert [(r.layer, r.matched, r.graph) for r in said.layers] == [
        ("first", True, 0),
        ("second", True, 1),
    ]
    assert len(said.breaks) == 1
    assert said.left == {"norm": "a LayerNorm is none of the targets"}
    assert f"graph break: {said.breaks[0]}" in str(said)
    assert "norm: left: a LayerNorm is none of the targets" in str(said)
    assert all(report.bytes > 0 for report in said.layers)
    assert kasmina_layers(model)["first"].get_health_report()["count"].tolist() == counted
    assert not explain(unkasminify(kasminify(Broken(), num_seeds=2)), X).left


def test_a_pipeline_of_ones_own_is_an_option_of_the_backend() -> None:
    torch._dynamo.reset()
    model = net()
    given: Any = {"passes": list(DEFAULT_PASSES)}
    run: Any = torch.compile(model, backend=kasmina, options=given)
    torch.testing.assert_close(run(X), model(X))
    options: dict[str, Any]
    for options in ({"passes": 5}, {"passes": [5]}, {"passes": DEFAULT_PASSES, "strict": True}):
        with pytest.raises(InvalidArgument, match="passes"):
            net(options=options)


def test_a_reset_inside_a_watched_block_is_no_error() -> None:
    with assert_no_recompiles():
        torch._dynamo.reset()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.lstm(x)[0])
        return out


@pytest.mark.parametrize("grown", [False, True])
def test_explain_names_a_layer_behind_an_lstm(grown: bool) -> None:
    torch._dynamo.reset()
    model = kasminify(Recurrent(), num_seeds=2, compile=False)
    if grown:
        graft(kasmina_layers(model)["out"], [0])
    (layer,) = explain(model, torch.randn(2, 3, 4)).layers
    assert (layer.layer, layer.matched) == ("out", True)
