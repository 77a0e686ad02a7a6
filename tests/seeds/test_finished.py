"""A finished model runs folded: when, how right, and never with what was before."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from folded_cases import (
    CallsWithOthers,
    S,
    assert_as_reference,
    by_reference,
    evaluated,
    exact,
    finished,
    fossils,
    held,
    is_folded,
    magnitudes,
    three,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

from kasmina_fx import (
    KasminaLayer,
    TelemetryPolicy,
    host_state_dict,
    kasmina_layers,
    kasminify,
    transaction,
    unkasminify,
)
from kasmina_fx.optim import follow
from kasmina_fx.seeds.folded import ENOUGH
from kasmina_fx.testing import graft

X = torch.linspace(-2, 2, 30).view(5, 6)


# How right.


@given(data=st.data())
def test_the_error_of_a_folded_layer_is_within_its_bound(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    inputs, seeds = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    features = data.draw(st.integers(seeds, 30))
    kinds = data.draw(st.lists(st.sampled_from(["affine", "lora", ""]), min_size=seeds))[:seeds]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model: Any = nn.Sequential(nn.Linear(inputs, features, bias=data.draw(st.booleans())))
    model = kasminify(model.to(dtype), num_seeds=seeds, compile=False).eval()
    (layer,) = kasmina_layers(model).values()
    for seed, kind in enumerate(kinds):
        if kind:
            fossils(layer, seed, kind, data.draw(st.sampled_from([0.0, 0.3, 1.0])))
    x = torch.randn(7, inputs).to(dtype)
    assert is_folded(model, x) == any(kinds)
    error = (evaluated(model, x).double() - exact(model, x)).abs()
    roundings = (inputs + 3) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    part = roundings / (1 - roundings)
    if dtype is torch.bfloat16:  # the weight and the output are rounded
        part += 2.01 * 2.0**-8
    judge = (inputs + 40) * torch.finfo(torch.float64).eps / 2 * magnitudes(layer, x, blended=True)
    assert bool((error <= part * magnitudes(layer, x) + judge + torch.finfo(dtype).tiny).all())


def test_shared_blueprints_fold_with_an_alpha_for_each_seed() -> None:
    def shared(layer: KasminaLayer) -> None:
        fossils(layer, [0, 1, 3], layer.register_blueprint("lora"), 0.8)
        layer.set_alpha(1, 0.2)

    model = finished(grow=shared)
    assert is_folded(model, X)
    assert_as_reference(model, X)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "conv1d": (lambda: nn.Conv1d(3, 11, 3, padding=1), (2, 3, 9), "lora"),
    "conv2d": (lambda: nn.Conv2d(3, 11, 3, stride=2), (2, 3, 9, 8), "affine"),
    "conv2d, no batch dim": (lambda: nn.Conv2d(3, 11, 3), (3, 9, 8), "lora"),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 11, 3, padding=1, padding_mode="circular", bias=False),
        (2, 3, 9, 8),
        "affine",
    ),
    "conv3d": (lambda: nn.Conv3d(2, 11, 2), (2, 2, 4, 4, 5), "lora"),
    "grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3), (2, 6, 5, 5), "lora"),
    "depthwise": (lambda: nn.Conv2d(11, 11, 3, groups=11), (2, 11, 5, 5), "affine"),
}


@pytest.mark.parametrize(("make", "shape", "kind"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_fold(make: Callable[[], nn.Module], shape: Any, kind: str) -> None:
    targets = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    model = finished(
        nn.Sequential(make()), lambda layer: fossils(layer, [0, 2], kind), num_seeds=3,
        targets=targets,
    )  # fmt: skip
    x = torch.randn(shape)
    assert is_folded(model, x)
    assert_as_reference(model, x)


def test_a_copy_lies_in_memory_as_the_host_does() -> None:
    plain: Any = nn.Sequential(nn.Conv2d(4, 8, 3))
    plain.to(memory_format=torch.channels_last)
    model = finished(plain, lambda layer: fossils(layer, [0], "lora"), targets=(nn.Conv2d,))
    x = torch.randn(2, 4, 6, 6)
    assert_as_reference(model, x)
    copied = held(model)
    assert copied is not None
    assert copied.weight is not None
    assert copied.weight.stride() == model[0].weight.stride()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_without_seeds_in_use_is_its_host_to_the_bit(bias: bool) -> None:
    model, plain = finished(three(bias)), three(bias)
    plain.load_state_dict(host_state_dict(model))
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda module, args, out: seen.extend([*args, out]))
    assert is_folded(model, X, "2")
    assert torch.equal(seen[1], evaluated(plain[2], seen[0]))
    folded = held(model, "2")
    assert folded is not None
    assert folded.bias is not None
    assert bias or bool((folded.bias == 0).all() and folded.bias.signbit().all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", ["affine", "lora"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_blueprint_that_is_not_finite_does_not_run(
    kind: str, value: float, which: int, bias: bool
) -> None:
    model = finished(three(bias), lambda layer: fossils(layer, [1, 3], kind))
    with torch.no_grad():
        list(model[0].blueprint_parameters(False))[which][0].view(-1)[0] = value
    assert is_folded(model, X)
    folded = held(model)
    assert folded is not None
    assert folded.weight is not None
    assert torch.equal(folded.weight[3:6], model[0].weight[3:6])
    assert not torch.equal(folded.weight[9:12], model[0].weight[9:12])
    assert_as_reference(model, X)


def test_a_blueprint_that_would_overflow_the_weight_does_not_run() -> None:
    model = finished(grow=lambda layer: fossils(layer, [1], "affine", 1.0))
    with torch.no_grad():
        model[0].weight.fill_(1e5)
        for stack in model[0].blueprint_parameters(False):
            stack.fill_(1e38)
    evaluated(model, X)
    folded = held(model)
    assert folded is not None
    assert folded.weight is not None
    assert torch.equal(folded.weight, model[0].weight)
    assert bool(folded.bias is not None and torch.equal(folded.bias, model[0].bias))


# When.


def mixed(model: Any) -> None:
    graft(model[2], [1], "affine", 0.5)


def in_training(model: Any) -> None:
    model.train()


def observed(model: Any) -> None:
    model[0].set_telemetry(TelemetryPolicy(in_eval=True))


def with_a_hook_before(model: Any) -> None:
    model[0].register_forward_pre_hook(lambda module, args: None)


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[0], "weight", 0.3)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(model[0], "weight", Doubled())


def of_a_class_of_its_own(model: Any) -> None:
    model[0].weight = type("Own", (nn.Parameter,), {})(model[0].weight.detach())


def made_for_inference(model: Any) -> None:
    with torch.inference_mode():
        model[0].weight = nn.Parameter(model[0].weight.clone())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (made_for_inference, "has no numbers that count what is written to them"),
        (mixed, "seeds that are not FOSSILIZED run in 2"),
        (observed, "statistics are kept there"),
        (with_a_hook_before, "a hook comes before its base"),
        (pruned, "computed by a hook"),
        (parametrized, "computed by a parametrization"),
        (of_a_class_of_its_own, "weight is a Own, not a plain Parameter"),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "when it was folded before"])
def test_a_layer_is_not_folded(change: Callable[[Any], None], why: str, late: bool) -> None:
    model = finished()
    if late:
        assert is_folded(model, X)
        assert "folded into its weight" in model[0].get_layer_stats()["folding"]
    change(model)
    evaluated(model, X)
    assert "not folded" in model[0].get_layer_stats()["folding"]
    assert why in model[0].get_layer_stats()["folding"]
    assert_as_reference(model, X)
    if change is not observed:  # forwards see to that one
        assert not is_folded(model, X)


def test_statistics_that_are_kept_in_evaluation_see_blueprints() -> None:
    model = finished(telemetry=TelemetryPolicy(in_eval=True))
    evaluated(model, X)
    assert model[0].get_health_report()["runs"].tolist() == [1, 0, 1, 1]


def test_with_a_gradient_or_in_training_nothing_is_folded() -> None:
    model = finished()
    model(X).sum().backward()
    assert held(model) is None
    evaluated(model.train(), X)
    assert held(model) is None
    model.eval()
    model[0].train()  # one layer alone: the others are what they are
    assert_as_reference(model, X)


def test_float16_is_not_folded_nor_what_autocasts_to_it() -> None:
    model = finished(three().half())
    assert "float16 ends where" in model[0].get_layer_stats()["folding"]
    model = finished()
    with torch.autocast("cpu", torch.bfloat16):
        lower = evaluated(model, X)
    assert lower.dtype is torch.bfloat16
    assert is_folded(model, X)
    before = model[0].weight.detach().clone()
    copied = held(model)
    assert copied is not None
    assert copied.weight is not None
    copied.weight.data.fill_(torch.nan)  # whoever uses it is seen
    assert bool(evaluated(model, X).isnan().any())
    with torch.autocast("cpu", torch.float16):
        assert bool(evaluated(model, X).isfinite().all())
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("plain", "settings", "kind", "why"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(6)), {"targets": (nn.LayerNorm,)}, "affine",
         "a LayerNorm has no weight to fold into"),
        (lambda: nn.Sequential(nn.Linear(6, 8)), {}, "mlp", "only affine and lora"),
        (lambda: nn.Sequential(Doubling(6, 8)), {}, "lora", "has a forward of its own"),
    ],
)  # fmt: skip
def test_what_does_not_fold_is_blended(
    plain: Callable[[], nn.Module], settings: Any, kind: str, why: str
) -> None:
    model = finished(plain(), lambda layer: fossils(layer, [0], kind), **settings)
    assert not is_folded(model, X)
    assert why in model[0].get_layer_stats()["folding"]
    assert_as_reference(model, X)


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_layers_that_do_not_fold_keep_no_other_from_it() -> None:
    plain = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6))
    model = finished(
        plain, lambda layer: fossils(layer, [0], "lora"), targets=(nn.Linear, nn.LayerNorm)
    )
    fossils(model[1], [1], "affine")
    assert is_folded(model, X, "0")
    assert not is_folded(model, X, "1")
    assert is_folded(model, X, "2")  # of which no seed is in use
    idle = held(model, "3")
    assert idle is not None
    assert idle.weight is None  # its own forward, alone
    assert_as_reference(model, X)
    assert "a LayerNorm has no weight" in model[1].get_layer_stats()["folding"]
    assert model[2].get_layer_stats()["folding"] == ""


def test_layers_by_hand_are_blended() -> None:
    layer = KasminaLayer(nn.Linear(6, 8), 4, telemetry=False).eval()
    fossils(layer, [0], "affine")
    evaluated(layer, X)
    assert layer.kasmina.folded is None
    assert "made by hand" in layer.get_layer_stats()["folding"]


def test_a_layer_called_by_itself_is_blended() -> None:
    model = finished()
    assert is_folded(model, X)
    with torch.no_grad():
        model[0].weight.data.mul_(3)  # which a call of the model would not have seen
        alone = model[0](X)
    torch.testing.assert_close(alone, by_reference(model[0], X), atol=1e-5, rtol=1e-5)
    model[0].publish()  # as one says so
    assert held(model) is None
    assert_as_reference(model, X, 1e-5)


def test_a_seed_that_neither_runs_nor_is_a_fossil_hinders_nothing() -> None:
    model = finished()
    model[2].request_germination([0], "mlp")
    model[0].request_germination([1], "mlp")
    assert is_folded(model, X)
    assert_as_reference(model, X)


# Never with what was before.


def by_an_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD([model[0].weight], lr=0.5)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()


class Through(torch.optim.Optimizer):
    """Writes through ``.data``, as many do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.25)


def by_one_that_writes_through_data(model: Any) -> None:
    Through(model.parameters()).step()


def by_a_file(model: Any) -> None:
    model.load_state_dict({k: v + 0.5 for k, v in host_state_dict(model).items()})


def by_other_parameters(model: Any) -> None:
    new = {k: v + 0.5 for k, v in host_state_dict(model).items()}
    model.load_state_dict(new, assign=True)


def by_other_memory(model: Any) -> None:
    model[0].weight.data = model[0].weight.data + 0.5


def by_another_bias(model: Any) -> None:
    model[0].bias = nn.Parameter(torch.ones(12))


def by_no_bias(model: Any) -> None:
    model[0].bias = None


def by_a_write_to_a_blueprint(model: Any) -> None:
    with torch.no_grad():
        for stack in model[0].blueprint_parameters(False):
            stack.add_(0.3)


def by_another_alpha(model: Any) -> None:
    model[0].set_alpha([0, 2], 0.1)


def by_a_move(model: Any) -> None:
    model.double().float()
    model[0].weight.data.add_(0.25)  # which alone would not be seen


def by_a_reset(model: Any) -> None:
    model[0].reset([0])


@pytest.mark.parametrize(
    "change",
    [
        by_an_optimizer,
        by_one_that_writes_through_data,
        by_a_file,
        by_other_parameters,
        by_other_memory,
        by_another_bias,
        by_no_bias,
        by_a_write_to_a_blueprint,
        by_another_alpha,
        by_a_move,
        by_a_reset,
    ],
)
def test_what_changes_is_folded_anew(change: Callable[[Any], None]) -> None:
    model = finished()
    assert is_folded(model, X)
    before = evaluated(model, X)
    change(model)
    assert not torch.allclose(evaluated(model, X), before, atol=1e-3)
    assert_as_reference(model, X)
    assert is_folded(model, X)
    first = held(model)
    evaluated(model, X)
    assert held(model) is first  # nothing is made twice


def test_a_write_to_a_host_without_fossils_is_seen_as_it_is() -> None:
    model = finished()
    assert is_folded(model, X, "2")
    with torch.no_grad():
        model[2].weight.mul_(2)
    model[2].bias.data.add_(1)
    assert_as_reference(model, X)
    model[2].weight.data = model[2].weight.data * 2
    assert_as_reference(model, X)


def test_other_parameters_for_one_call() -> None:
    model = finished()
    assert is_folded(model, X)
    other = {"0.weight": nn.Parameter(torch.ones(12, 6)), "0.bias": torch.zeros(12)}
    with torch.no_grad():
        out = functional_call(model, other, (X,))
        model[0].weight.copy_(torch.ones(12, 6))
        model[0].bias.zero_()
    torch.testing.assert_close(out, evaluated(model, X))


def test_a_model_that_puts_other_parameters_into_its_layer() -> None:
    model = finished(CallsWithOthers(), lambda layer: fossils(layer, [0], "lora"))
    assert is_folded(model, X, "fc")
    assert_as_reference(model, X)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_transforms_traces_and_fakes_are_not_folded() -> None:
    model = finished()
    with torch.no_grad():
        mapped = torch.vmap(model)(X)
        assert held(model) is None
        torch.jit.trace(model, X, check_trace=False)
        torch.export.export(model, (X,))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(X))
    assert held(model) is None
    torch.testing.assert_close(mapped, evaluated(model, X), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        torch.export.export(model, (X,)).module()(X), evaluated(model, X), atol=1e-6, rtol=1e-5
    )


# Memory and copies.


def test_copies_are_made_late_and_freed_early() -> None:
    model = finished()
    assert held(model) is None
    evaluated(model, X)
    first, other = held(model), held(model, "2")
    assert first is not None
    assert other is not None
    assert first.nbytes == 4 * (12 * 6 + 12)
    assert other.nbytes == 0
    assert other.weight is not None
    assert other.weight.data_ptr() == model[2].weight.data_ptr()
    gone = weakref.ref(first.weight)
    del first
    model(X)
    assert gone() is None
    evaluated(model, X)
    gone = weakref.ref(model[0].kasmina.folded.weight)
    graft(model[2], [0], "lora", 0.4)
    evaluated(model, X)
    assert gone() is None
    assert held(model, "2") is None


def test_models_are_freed_and_copied_with_what_they_hold() -> None:
    model = finished()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    expected = evaluated(model, X)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert held(twin) is None
        torch.testing.assert_close(evaluated(twin, X), expected)
        assert is_folded(twin, X)
    gone = weakref.ref(model[0])
    unkasminify(copy.deepcopy(model), fold=True)
    del model
    assert gone() is None


def test_a_model_unkasminified_with_fold_gives_what_it_gave_folded() -> None:
    model = finished()
    expected = evaluated(model, X)
    assert torch.equal(evaluated(unkasminify(model, fold=True), X), expected)


# Several threads, and how many ways there are.


class Waits(nn.Module):
    """Stops between two layers for as long as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.entered, self.goes_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            assert self.goes_on.wait(20)
        out: Tensor = self.last(x)
        return out


def test_a_call_that_trains_does_not_free_what_another_thread_runs() -> None:
    model = finished(Waits(), lambda layer: fossils(layer, [0], "lora"))
    fossils(model.last, [1], "affine")
    expected = evaluated(model, X)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(evaluated(model, X)), daemon=True)
    thread.start()
    assert model.entered.wait(20)
    model(X).sum().backward()
    assert held(model, "last") is not None
    torch.testing.assert_close(evaluated(model, X), expected)
    model.goes_on.set()
    thread.join(20)
    assert torch.equal(found[0], expected)
    model(X)
    assert held(model, "last") is None
    assert not model.first.siblings.folding.active


def test_a_call_that_raises_ends_as_well() -> None:
    model = finished()
    with pytest.raises(RuntimeError):
        evaluated(model, torch.randn(2, 5))
    assert not model[0].siblings.folding.active
    assert_as_reference(model, X)


def evaluate_for_long(model: nn.Module) -> None:
    for _ in range(ENOUGH + 1):
        evaluated(model, X)


def test_only_so_many_ways_are_run() -> None:
    model = finished(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))))
    for seedless in (model[1], model[2]):
        evaluate_for_long(model)
        assert is_folded(model, X)
        fossils(seedless, [0], "mlp")
    evaluated(model, X)
    assert "has run in 2 other ways" in model[0].get_layer_stats()["folding"]
    folding = model[0].siblings.folding
    assert not folding.runs
    assert held(model) is None
    assert_as_reference(model, X)
    with transaction(model):
        model[2].reset([0])
    assert_as_reference(model, X)
    assert folding.runs
    assert is_folded(model, X)


def a_step(model: Any) -> None:
    model.train()
    model(X).square().sum().backward()
    by_an_optimizer(model)
    model.eval()


def test_a_loop_that_trains_between_calls_waits_before_copies_are_made() -> None:
    model = finished()
    for folds in (True, True, False, False):
        a_step(model)
        assert is_folded(model, X) == folds
        assert_as_reference(model, X)
    a_step(model)
    for _ in range(ENOUGH):
        assert not is_folded(model, X)
    assert is_folded(model, X)  # nothing has changed for long
    evaluate_for_long(model)
    a_step(model)
    assert is_folded(model, X)  # which has been worth it


def test_where_the_same_bits_are_wanted_twice_nothing_waits() -> None:
    model = finished()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(4):
            a_step(model)
            first = evaluated(model, X)
            assert torch.equal(evaluated(model, X), first)
            assert is_folded(model, X)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_changes_while_it_waits_is_waited_for_again() -> None:
    model = finished()
    for _ in range(3):
        a_step(model)
        evaluated(model, X)
    for change in (by_an_optimizer, by_other_memory, by_a_write_to_a_blueprint):
        for _ in range(ENOUGH - 1):
            assert not is_folded(model, X)
        change(model)
        assert_as_reference(model, X)
    model[0].register_forward_pre_hook(lambda module, args: None)
    pruned(model)
    evaluate_for_long(model)
    assert_as_reference(model, X)


def test_an_optimizer_that_follows_the_model_makes_it_fold_anew() -> None:
    model = finished()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    follow(optimizer, model)
    model.train()
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert is_folded(model, X)
    assert_as_reference(model, X)
    assert model[0].state.stages[0] == S.FOSSILIZED
