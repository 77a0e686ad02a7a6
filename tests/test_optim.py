"""Optimizers of growing models: frozen slots, growth, slots used again, ramps by the step."""

from __future__ import annotations

import copy
import gc
import io
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graph_cases import OneLayer, TwoLayers, layer_of, wrapped
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Optimizer, RMSprop, Rprop

from kasmina_fx import (
    InvalidType,
    KasminaError,
    KasminaLayer,
    NoTargets,
    SeedConfig,
    SeedLifecycle,
    kasmina_layers,
    optim,
)
from kasmina_fx.bank import Bank, StackedParameter
from kasmina_fx.optim import growth, hooks, state
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

S = SeedLifecycle
PATHS = {
    S.GERMINATED: (),
    S.TRAINING: (S.TRAINING,),
    S.GRAFTING: (S.TRAINING, S.GRAFTING),
    S.STABILIZATION: (S.TRAINING, S.GRAFTING, S.STABILIZATION),
    S.EVALUATING: (S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING),
    S.FINE_TUNING: (S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING),
    S.FOSSILIZED: (
        *(S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING),
        S.FOSSILIZED,
    ),
    S.ROLLED_BACK: (S.TRAINING, S.ROLLED_BACK),
}
LEARN = (S.TRAINING, S.GRAFTING, S.FINE_TUNING)
FROZEN = tuple(stage for stage in PATHS if stage not in LEARN)


def bring(layer: KasminaLayer, seed: int, stage: SeedLifecycle, kind: str = "mlp") -> None:
    assert layer.request_germination(seed, kind)
    for step in PATHS[stage]:
        layer.advance(seed, step)
    layer.set_alpha(seed, 0.5)


def growing(reserve: int = 0, seeds: int = 6) -> nn.Module:
    """Two seeds in GRAFTING: a bank of two slots, both in use, unless more are reserved."""
    torch.manual_seed(0)
    model = wrapped(OneLayer(), seeds=seeds, reserve=reserve)
    graft(layer_of(model), [0, 1])
    return model


def bank_of(model: nn.Module, name: str = "fc") -> Bank:
    return layer_of(model, name).kasmina.bank_list()[0]


def stacks(model: nn.Module, name: str = "fc") -> list[Tensor]:
    return bank_of(model, name).tensors()


def rows(model: nn.Module, slot: int) -> list[Tensor]:
    return [stack.detach()[slot].clone() for stack in stacks(model)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loss_of(run: Any, number: int) -> Tensor:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(number))
    loss: Tensor = (run(x) - 1).square().mean()
    return loss


def train(
    run: Any, optimizer: Optimizer, steps: int, scaler: torch.amp.GradScaler | None = None
) -> list[float]:
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        loss = loss_of(run, number)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return losses


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW foreach": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adagrad": lambda p: Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "Rprop": lambda p: Rprop(p, lr=0.01),
}

# Frozen slots.


@pytest.mark.parametrize("stage", FROZEN, ids=lambda stage: stage.name)
def test_frozen_slots_stay_to_the_bit_and_learning_ones_move(stage: SeedLifecycle) -> None:
    model = wrapped(OneLayer(), seeds=6)
    layer = layer_of(model)
    bring(layer, 0, stage)
    for seed, learns in enumerate(LEARN, start=1):
        bring(layer, seed, learns)
    for stack in stacks(model):
        nn.init.normal_(stack)
    slots = [int(bank_of(model).slot_of(layer.state.blueprint_ids[i : i + 1])) for i in range(4)]
    before = [rows(model, slot) for slot in slots]
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, optimizer, 50)
    now = [rows(model, slot) for slot in slots]
    assert same(now[0], before[0])
    for mine, earlier in zip(now[1:], before[1:], strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(mine, earlier, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_does_not_move_what_has_been_frozen(name: str) -> None:
    model = growing()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 5)
    momentum = [t for t in optimizer.state[stacks(model)[0]].values() if state.has_rows("", t, t)]
    assert any(bool((t[0] != 0).any()) for t in momentum)
    layer_of(model).advance(0, S.STABILIZATION)
    frozen, free = rows(model, 0), rows(model, 1)
    train(model, optimizer, 10)
    assert same(rows(model, 0), frozen)
    assert not same(rows(model, 1), free)


def test_without_the_hooks_weight_decay_would_move_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = growing()
    layer_of(model).advance(0, S.STABILIZATION)
    frozen = rows(model, 0)
    monkeypatch.setattr(hooks, "_keep", lambda stack: None)
    train(model, AdamW(model.parameters(), weight_decay=0.1), 1)
    assert not same(rows(model, 0), frozen)


def test_frozen_slots_of_a_subclass_that_calls_its_base_twice() -> None:
    class Twice(AdamW):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(0.1)
            super().step(closure)
            return super().step(closure)

    model = growing()
    AdamW(model.parameters())  # puts the hooks around the base's step() too
    layer_of(model).advance(0, S.STABILIZATION)
    frozen, free = rows(model, 0), rows(model, 1)
    train(model, Twice(model.parameters()), 3)
    assert same(rows(model, 0), frozen)
    assert not same(rows(model, 1), free)


def test_a_step_that_raises_spoils_no_later_one() -> None:
    model = growing()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    layer_of(model).advance(0, S.STABILIZATION)

    def fail() -> float:
        raise ValueError("no data")

    for _ in range(6):
        with pytest.raises(ValueError, match="no data"):
            optimizer.step(fail)
    assert len(hooks._STEPS[optimizer]) == hooks._DEEPEST
    frozen = rows(model, 0)
    train(model, optimizer, 3)
    assert same(rows(model, 0), frozen)


def test_a_slot_that_changes_hands_inside_a_step_keeps_its_new_values() -> None:
    model = growing()
    layer = layer_of(model)
    for seed in (0, 1):
        layer.advance(seed, S.STABILIZATION)
    optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    frozen, seen = rows(model, 0), []

    def closure() -> float:
        layer.advance(1, S.ROLLED_BACK)
        layer.reset(1)
        layer.request_germination(3)
        with torch.no_grad():
            for stack in stacks(model):
                stack[0] += 1.0
        seen.extend(rows(model, 1))
        return 0.0

    optimizer.step(closure)
    assert same(rows(model, 1), seen)
    assert same(rows(model, 0), frozen)


def test_a_closure_may_grow_the_bank_or_put_the_first_stack_in() -> None:
    model, plain = growing(), wrapped(OneLayer(), seeds=4)
    layer_of(model).advance(0, S.STABILIZATION)
    frozen = rows(model, 0)
    optimizer, host = AdamW(model.parameters()), AdamW(plain.parameters())

    def closure() -> float:
        optimizer.zero_grad()
        if bank_of(model).capacity == 2:
            graft(layer_of(model), [2])
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    def first() -> float:
        graft(layer_of(plain), [0])
        optim.sync(host, plain)
        return 0.0

    before = rows(model, 1)
    optimizer.step(closure)
    assert bank_of(model).capacity == 4
    assert same(rows(model, 0), frozen)
    assert not same(rows(model, 1), before)
    host.step(first)
    assert bool(growth.stacks_of(host))


# Growth.


def two_runs(
    build: Callable[[Any], Optimizer],
    *,
    explicit: bool,
    compile: bool = False,
    scaled: bool = False,
) -> tuple[list[float], list[float], nn.Module, nn.Module]:
    """Losses of a model that grows while it trains, and of one that had reserved."""
    losses, models = [], []
    for reserve in (0, 8):
        model = growing(reserve)
        run: Any = model
        if compile:
            run = torch.compile(model, backend=RecordingBackend("aot_eager"))
        optimizer = build(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
        mine = train(run, optimizer, 4, scaler)
        for seeds in ([2], [3, 4, 5]):
            torch.manual_seed(1)
            graft(layer_of(model), seeds)
            if explicit:
                assert bool(optim.sync(optimizer, run).carried) == (not reserve)
            mine += train(run, optimizer, 4, scaler)
        assert bank_of(model).capacity == 8
        losses.append(mine)
        models.append(model)
    return losses[0], losses[1], models[0], models[1]


def assert_same_training(build: Callable[[Any], Optimizer], **options: bool) -> None:
    grown, reserved, a, b = two_runs(build, **options)
    assert grown == pytest.approx(reserved, rel=1e-6, abs=0)
    for name, value in a.state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("explicit", [True, False], ids=["sync", "by itself"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growth_trains_like_a_reserve(name: str, explicit: bool) -> None:
    assert_same_training(OPTIMIZERS[name], explicit=explicit)


def test_growth_of_a_compiled_model_trains_like_a_reserve() -> None:
    assert_same_training(OPTIMIZERS["AdamW"], explicit=False, compile=True)


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused"])
def test_growth_under_a_grad_scaler_trains_like_a_reserve(name: str) -> None:
    assert_same_training(OPTIMIZERS[name], explicit=False, scaled=True)


def test_a_grad_scaler_finds_the_gradients_of_an_optimizer_of_stacks_alone() -> None:
    model = growing()
    optimizer = AdamW(layer_of(model).blueprint_parameters())
    scaler = torch.amp.GradScaler("cpu")
    train(model, optimizer, 2, scaler)
    graft(layer_of(model), [2])
    before = rows(model, 2)
    train(model, optimizer, 2, scaler)
    assert not same(rows(model, 2), before)


def test_hooks_and_growth_recompile_nothing() -> None:
    model = growing()
    run = torch.compile(model, backend=RecordingBackend("aot_eager"))
    optimizer = AdamW(model.parameters())
    loss_of(run, 0).backward()
    with assert_no_recompiles():
        train(run, optimizer, 2)
        graft(layer_of(model), [2, 3])
        train(run, optimizer, 2)


@pytest.mark.parametrize("stepped", [True, False])
def test_gradients_from_before_the_growth_arrive(stepped: bool) -> None:
    def gradients(reserve: int) -> list[Tensor]:
        model = growing(reserve)
        optimizer = SGD(model.parameters(), lr=0.0)
        if stepped:
            train(model, optimizer, 1)
        optimizer.zero_grad()
        loss_of(model, 0).backward()  # in the old stack
        late = loss_of(model, 1)  # its backward is still to run
        graft(layer_of(model), [2])
        late.backward()
        loss_of(model, 2).backward()
        graft(layer_of(model), [3, 4])
        optimizer.step()
        return [stack.grad.clone() for stack in stacks(model) if stack.grad is not None]

    torch.testing.assert_close(gradients(0), gradients(8))


def test_no_gradient_is_passed_on_between_stacks_that_have_none() -> None:
    model = growing()
    for stack in stacks(model):
        stack.requires_grad_(False)
    graft(layer_of(model), [2])
    assert all(stack.grad is None for stack in stacks(model))


def test_adafactor_survives_growth() -> None:
    model = growing()
    optimizer = Adafactor(model.parameters(), lr=0.05)
    train(model, optimizer, 3)
    kept = [copy.deepcopy(optimizer.state[stack]) for stack in stacks(model)]
    graft(layer_of(model), [2, 3, 4])
    for stack, before in zip(stacks(model), kept, strict=True):
        now = optimizer.state[stack]
        for name, value in before.items():
            per_slot = value.dim() and not (stack.dim() == 2 and name == "col_var")
            assert torch.equal(now[name][:2] if per_slot else now[name], value)
            assert now[name].shape[:1] == ((8,) if per_slot else value.shape[:1])
    losses = train(model, optimizer, 40)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "shape", "stack", "expected"),
    [
        ("exp_avg", (3, 4), (3, 4), True),
        ("momentum_buffer", (3,), (3,), True),
        ("row_var", (3, 1), (3, 4), True),
        ("col_var", (1, 4), (3, 4), False),
        ("col_var", (1, 4), (1, 4), False),  # one slot: the shape does not tell
        ("exp_avg_sq_col", (4,), (4, 4), False),
        ("exp_avg_sq_row", (4,), (4, 4), True),
        ("col_var", (3, 1, 4), (3, 2, 4), True),
        ("step", (1,), (1, 4), False),
        ("step", (), (3, 4), False),
        ("mu_product", (), (3, 4), False),
        ("other", (2, 4), (3, 4), False),
    ],
)
def test_which_state_has_a_row_a_slot(
    name: str, shape: tuple[int, ...], stack: tuple[int, ...], expected: bool
) -> None:
    assert state.has_rows(name, torch.zeros(shape), torch.zeros(stack)) is expected


def test_state_that_is_no_tensor_has_no_rows() -> None:
    assert not state.has_rows("momentum_buffer", None, torch.zeros(3, 4))


def test_sgd_without_momentum_and_an_optimizer_that_never_stepped() -> None:
    model = growing()
    optimizers = [SGD(model.parameters(), lr=0.1), AdamW(model.parameters())]
    train(model, optimizers[0], 1)
    graft(layer_of(model), [2])
    for optimizer in optimizers:
        optim.sync(optimizer, model)
        held = optimizer.param_groups[0]["params"]
        assert all(p is q for p, q in zip(held, model.parameters(), strict=True))
        assert not optimizer.state.get(stacks(model)[0])
        optimizer.state_dict()


def test_growth_in_another_threads_step_waits_for_its_end() -> None:
    model = growing()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    old = stacks(model)

    def closure() -> float:
        grower = threading.Thread(target=graft, args=(layer_of(model), [2]))
        grower.start()
        grower.join()
        held = growth.stacks_of(optimizer)
        assert all(a is b for a, b in zip(held, old, strict=True))
        return 0.0

    optimizer.step(closure)
    assert all(a is b for a, b in zip(growth.stacks_of(optimizer), stacks(model), strict=True))


def test_a_state_dict_with_more_slots_keeps_the_optimizer_on_the_model() -> None:
    source, model = growing(reserve=8), growing()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    train(model, optimizer, 2)
    model.load_state_dict(source.state_dict())
    assert bank_of(model).capacity == 8
    assert all(a is b for a, b in zip(growth.stacks_of(optimizer), stacks(model), strict=True))
    before = rows(model, 0)
    train(model, optimizer, 2)
    assert not same(rows(model, 0), before)


def test_a_stack_that_its_owner_has_put_in_is_not_there_twice() -> None:
    model = growing()
    named = list(layer_of(model).named_parameters())
    optimizer = AdamW(named)
    loss_of(model, 0).backward()
    for stack in growth.stacks_of(optimizer):
        optimizer.state[stack]["exp_avg"] = torch.ones_like(stack)
    graft(layer_of(model), [2])  # it has not stepped: nothing is replaced yet
    more = [(n, p) for n, p in layer_of(model).named_parameters() if "banks" in n]
    optimizer.add_param_group({"params": more, "lr": 0.5})
    optim.sync(optimizer, model)
    first, second = optimizer.param_groups
    assert not any(isinstance(p, StackedParameter) for p in first["params"])
    assert len(first["params"]) == len(first["param_names"]) == 2
    assert all(a is b for a, b in zip(second["params"], stacks(model), strict=True))
    assert optimizer.state[stacks(model)[0]]["exp_avg"].flatten(1)[:, 0].tolist() == [1, 1, 0, 0]


@pytest.fixture
def one_scaler() -> Iterator[torch.amp.GradScaler]:
    gc.collect()
    scaler = torch.amp.GradScaler("cpu")
    yield scaler
    del scaler


def test_scaled_gradients_that_no_scaler_saw_are_dropped(
    one_scaler: torch.amp.GradScaler, caplog: pytest.LogCaptureFixture
) -> None:
    model = growing()
    optimizer = SGD(model.parameters(), lr=0.1)
    graft(layer_of(model), [2])
    before, weight = rows(model, 0), layer_of(model).weight.detach().clone()
    with caplog.at_level(logging.WARNING, logger=hooks.__name__):
        train(model, optimizer, 1, one_scaler)
    assert "sync(optimizer, model)" in caplog.text
    assert same(rows(model, 0), before)
    assert not torch.equal(layer_of(model).weight, weight)
    train(model, optimizer, 1, one_scaler)
    assert not same(rows(model, 0), before)


# Slots used again.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_slot_used_again_starts_with_empty_state(name: str) -> None:
    model = growing()
    layer = layer_of(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    blank = OPTIMIZERS[name](growing().parameters())
    blank.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 3)
    kept = [copy.deepcopy(optimizer.state[stack]) for stack in stacks(model)]
    layer.advance(1, S.CULLED)
    graft(layer, [4])
    assert bank_of(model).capacity == 2
    (group,) = optimizer.param_groups
    starts = {"sum": group.get("initial_accumulator_value"), "step_size": group["lr"]}
    for stack, before in zip(stacks(model), kept, strict=True):
        for key, value in optimizer.state[stack].items():
            if key == "step":
                assert torch.equal(value, before[key])
            else:
                assert torch.equal(value[0], before[key][0])
                assert torch.equal(value[1], torch.full_like(value[1], starts.get(key, 0.0)))


def test_a_slot_used_again_after_the_optimizers_state_was_loaded() -> None:
    model = growing()
    first, loaded, late = (AdamW(model.parameters()) for _ in range(3))
    train(model, first, 2)
    loaded.load_state_dict(copy.deepcopy(first.state_dict()))
    late.load_state_dict(copy.deepcopy(first.state_dict()))
    layer_of(model).advance(1, S.CULLED)
    layer_of(model).request_germination(4)
    stack = stacks(model)[0]
    # A loaded optimizer is unknown until it steps: then it forgets what it knew of the slot.
    assert bool(loaded.state[stack]["exp_avg"][1].any())
    optim.sync(loaded, model)
    assert not bool(loaded.state[stack]["exp_avg"][1].any())
    assert bool(loaded.state[stack]["exp_avg"][0].any())
    # Once a slot was trained, state that is loaded is of that training.
    layer_of(model).advance(4, S.TRAINING)
    train(model, loaded, 1)
    late.load_state_dict(loaded.state_dict())
    optim.sync(late, model)
    assert torch.equal(late.state[stack]["exp_avg"], loaded.state[stack]["exp_avg"])


def test_a_bank_forgets_optimizers_that_are_gone() -> None:
    model = growing()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    known = growth.stacks_of(optimizer)[0].optimizers
    assert known is not None
    assert len(known) == 1
    del optimizer
    gc.collect()
    assert not known
    graft(layer_of(model), [2])


# sync.


def test_sync_reports_and_is_idempotent() -> None:
    model = growing()
    run: Any = torch.compile(model, backend="eager")
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    graft(layer_of(model), [2])
    graft(layer_of(model), [3, 4])
    graft(layer_of(model), [5], "affine")
    report = optim.sync(optimizer, run)
    names = [name for name, _ in model.named_parameters() if "banks" in name]
    assert [c.name for c in report.carried] + [c.name for c in report.added] == names
    assert {(c.group, c.before, c.now) for c in report.carried} == {(0, 2, 8)}
    assert {(c.group, c.now) for c in report.added} == {(0, 2)}
    assert f"carried in group 0: {names[0]} (2 to 8 slots)" in str(report)
    assert f"added to group 0: {names[-1]} (2 slots)" in str(report)
    before = copy.deepcopy(optimizer.state_dict())
    again = optim.sync(optimizer, model)
    assert again == optim.SyncReport((), ())
    assert str(again) == "nothing to carry or add"
    torch.testing.assert_close(optimizer.state_dict(), before)
    train(run, optimizer, 2)
    with pytest.raises(AttributeError):
        report.carried = ()  # type: ignore[misc]  # frozen


def test_stacks_are_added_beside_those_they_belong_to() -> None:
    model = wrapped(TwoLayers(), seeds=3)
    up, down = layer_of(model, "up"), layer_of(model, "down")
    groups: list[dict[str, Any]] = [
        {"params": list(down.base.parameters()), "lr": 0.1},
        {"params": list(up.base.parameters()), "lr": 0.2},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3},
    ]
    optimizer = Adagrad(groups)
    graft(up, [0])
    assert {change.group for change in optim.sync(optimizer, model).added} == {0, 1}
    for number, layer in enumerate((down, up)):
        held = optimizer.param_groups[number]["params"]
        expected = [*layer.base.parameters(), *layer.blueprint_parameters()]
        assert all(p is q for p, q in zip(held, expected, strict=True))
    # With the layer's other stacks, wherever these are.
    moved = optimizer.param_groups[1]["params"][2:]
    del optimizer.param_groups[1]["params"][2:]
    optimizer.param_groups[2]["params"] += moved
    graft(up, [1], "affine")
    report = optim.sync(optimizer, model)
    assert {c.group for c in report.added if c.name.startswith("up.")} == {2}
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2, 0.3]
    for number in range(3):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
    # Nothing of the layer is there: the last group.
    alone = SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=0.1)
    assert {change.group for change in optim.sync(alone, model).added} == {1}


def test_options_names_and_schedulers_go_on() -> None:
    model = growing()
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if "banks" not in n], "weight_decay": 0.0},
        {"params": [(n, p) for n, p in named if "banks" in n], "lr": 0.02},
    ]
    optimizer = AdamW(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(2):
        train(model, optimizer, 1)
        scheduler.step()
    places = [len(group["params"]) for group in optimizer.param_groups]
    graft(layer_of(model), [2, 3])
    graft(layer_of(model), [4], "affine")
    optim.sync(optimizer, model)
    train(model, optimizer, 1)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.0125, 0.0025])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.01]
    assert [len(g["params"]) for g in optimizer.param_groups] == [places[0], places[1] + 2]
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_an_optimizer_of_two_models() -> None:
    one, other = growing(), growing()
    optimizer = AdamW([*one.parameters(), *other.parameters()])
    for model in (one, other):
        loss_of(model, 0).backward()
    optimizer.step()
    graft(layer_of(other), [2])
    carried = optim.sync(optimizer, one).carried
    assert {change.name for change in carried} == {"mlp_run0"}
    graft(layer_of(other), [3, 4])
    held = stacks(other)
    del other, model
    gc.collect()
    assert {change.name for change in optim.sync(optimizer, one).carried} == {"another model's"}
    assert held[0].shape[0] == 8
    optimizer.step()


@pytest.mark.parametrize("kind", [nn.Linear, nn.Sequential])
def test_errors_of_sync(kind: Any) -> None:
    model = growing()
    optimizer = AdamW(model.parameters())
    plain = nn.Linear(2, 2) if kind is nn.Linear else nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(NoTargets, match="call kasminify"):
        optim.sync(optimizer, plain)
    for wrong in (model, None, [optimizer]):
        with pytest.raises(InvalidType, match=r"no torch\.optim\.Optimizer"):
            optim.sync(wrong, model)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(KasminaError, match=r"no nn\.Module"):
        optim.sync(optimizer, optimizer)  # type: ignore[arg-type]  # what is tested


def test_sync_of_dormant_layers_and_under_inference_mode() -> None:
    model = wrapped(OneLayer(), seeds=4)
    optimizer = AdamW(model.parameters())
    assert optim.sync(optimizer, model) == optim.SyncReport((), ())
    with torch.inference_mode():
        graft(layer_of(model), [0, 1])
        optim.sync(optimizer, model)
    train(model, optimizer, 1)
    with torch.inference_mode():
        graft(layer_of(model), [2])
        optim.sync(optimizer, model)
    train(model, optimizer, 1)
    assert not any(t.is_inference() for t in optimizer.state[stacks(model)[0]].values())


# Ramps.


def ramping(strategy: str = "FIXED_RAMP", every: str = "step") -> nn.Module:
    torch.manual_seed(0)
    model = OneLayer()
    layer = KasminaLayer(model.fc, 4, layer_id="fc", config=SeedConfig(ramp_every=every))
    model.fc = layer  # type: ignore[assignment]  # it stands for the Linear
    for kind, seed in (("mlp", 0), ("affine", 1)):
        layer.request_germination(seed, kind, strategy)
        layer.advance(seed, S.TRAINING)
        layer.advance(seed, S.GRAFTING)
    return model


def ramp_steps(model: nn.Module) -> float:
    layer = layer_of(model)
    return float(layer.state.alpha[0]) * layer.config.grafting.fixed_steps


def test_a_ramp_makes_one_step_with_each_step() -> None:
    model, by_epoch = ramping(), ramping(every="epoch")
    for each in (model, by_epoch):
        train(each, AdamW(each.parameters()), 3)
    assert ramp_steps(model) == pytest.approx(3)
    assert ramp_steps(by_epoch) == 0


def test_of_several_optimizers_the_one_with_the_first_stack_ramps() -> None:
    model = ramping()
    first, *others = layer_of(model).blueprint_parameters()
    optimizers = [AdamW([first]), AdamW(others), AdamW(layer_of(model).base.parameters())]
    loss_of(model, 0).backward()
    for optimizer in reversed(optimizers):
        optimizer.step()
    assert ramp_steps(model) == pytest.approx(1)


def test_an_optimizer_around_another_ramps_once() -> None:
    class Around(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    model = ramping()
    optimizer = Around(AdamW(model.parameters()))
    train(model, optimizer, 2)
    assert ramp_steps(model) == pytest.approx(2)


def test_the_hosts_gradient_norm_is_recorded_for_those_who_ask() -> None:
    model, plain = ramping("GRAD_NORM_GATED", every="epoch"), ramping(every="epoch")
    unknown = layer_of(plain).kasmina.grad_norm.clone()
    for each in (model, plain):
        train(each, AdamW(each.parameters()), 1)
    weight = layer_of(model).weight
    assert weight.grad is not None
    torch.testing.assert_close(layer_of(model).kasmina.grad_norm, weight.grad.norm())
    torch.testing.assert_close(layer_of(plain).kasmina.grad_norm, unknown, equal_nan=True)


def test_the_norm_is_the_unscaled_one_under_a_fused_optimizer() -> None:
    norms = []
    for scaled in (False, True):
        model = ramping("GRAD_NORM_GATED", every="epoch")
        optimizer = AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        train(model, optimizer, 1, scaler)
        norms.append(layer_of(model).kasmina.grad_norm.clone())
        layer_of(model).base.zero_grad()
        optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]  # as a scaler does
        optimizer.step()  # without a gradient the norm stays
        assert torch.equal(layer_of(model).kasmina.grad_norm, norms[-1])
    torch.testing.assert_close(norms[1], norms[0])


# What else torch does.


class Plain(Optimizer):
    """Unlike torch's own, it has no graph break in its step()."""

    def __init__(self, parameters: Any, defaults: Any = None) -> None:
        super().__init__(parameters, defaults or {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(0.1 * parameter)


def test_a_compiled_step_of_an_optimizer_without_stacks_stays_one_graph() -> None:
    model = nn.Linear(3, 2)
    optimizer, before = Plain(model.parameters()), model.weight.detach().clone()
    torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    torch.testing.assert_close(model.weight.detach(), 0.9 * before)


@pytest.mark.parametrize("build", [Plain, lambda p: AdamW(p, lr=torch.tensor(0.1))])
def test_a_compiled_step_keeps_frozen_slots(build: Callable[[Any], Optimizer]) -> None:
    model = growing()
    layer_of(model).advance(0, S.STABILIZATION)
    optimizer = build(model.parameters())
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    frozen, free = rows(model, 0), rows(model, 1)
    loss_of(model, 0).backward()
    step()
    step()
    assert same(rows(model, 0), frozen)
    assert not same(rows(model, 1), free)


def test_copies_and_pickles_have_links_of_their_own() -> None:
    model = growing()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    train(model, optimizer, 1)
    layer_of(model).advance(0, S.STABILIZATION)
    twin, theirs = copy.deepcopy((model, optimizer))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other, its in ((twin, theirs), (loaded, AdamW(loaded.parameters(), weight_decay=0.1))):
        bank = bank_of(other)
        assert bank.layer is not None
        assert bank.layer() is layer_of(other)
        stack = growth.stacks_of(its)[0]
        assert stack.optimizers is None
        assert stack.bank is not None
        assert stack.bank() is bank
        frozen, free = rows(other, 0), rows(model, 1)
        train(other, its, 2)
        graft(layer_of(other), [2])
        assert same(rows(other, 0), frozen)
        assert same(rows(model, 1), free)
    assert copy.deepcopy(bank_of(model)).layer is None
    assert bank_of(model).capacity == 2


def test_unwrapped_and_orphaned_stacks_are_left_alone() -> None:
    model = growing()
    optimizer = AdamW(model.parameters())
    layer_of(model).advance(0, S.STABILIZATION)
    loss_of(model, 0).backward()
    for name, layer in kasmina_layers(model).items():
        setattr(model, name, layer.base)
    del layer
    gc.collect()
    optimizer.step()


def test_hooks_are_registered_once() -> None:
    code = (
        "import torch.optim.optimizer as o; a = len(o._global_optimizer_pre_hooks);"
        "import kasmina_fx, kasmina_fx.optim;"
        "print(len(o._global_optimizer_pre_hooks) - a, len(o._global_optimizer_post_hooks) - a)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_steps_and_growth_never_wait_for_the_device(fused: bool) -> None:
    model = growing().cuda()
    layer_of(model).advance(0, S.STABILIZATION)
    optimizer = Adam(model.parameters(), weight_decay=0.1, fused=fused)
    x, frozen = torch.randn(5, 8, device="cuda"), rows(model, 0)
    model(x).square().mean().backward()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
        bank_of(model).grow(4)
        growth.clear_slots(bank_of(model), torch.tensor([3]))
        optim.sync(optimizer, model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(rows(model, 0), frozen)
