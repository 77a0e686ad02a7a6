"""Stacks that grow under an optimizer train as if they had been reserved."""

from __future__ import annotations

import copy
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graph_cases import layer_of
from optim_cases import OPTIMIZERS, bank_of, growing, loss_of, rows, same, stacks, train
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from kasmina_fx import (
    optim,
)
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.optim import follower, hooks, state
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft


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
            graft(layer_of(model), seeds, "mlp")
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
    graft(layer_of(model), [2], "mlp")
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
        graft(layer_of(model), [2, 3], "mlp")
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
        graft(layer_of(model), [2], "mlp")
        late.backward()
        loss_of(model, 2).backward()
        graft(layer_of(model), [3, 4], "mlp")
        optimizer.step()
        return [stack.grad.clone() for stack in stacks(model) if stack.grad is not None]

    torch.testing.assert_close(gradients(0), gradients(8))


def test_no_gradient_is_passed_on_between_stacks_that_have_none() -> None:
    model = growing()
    for stack in stacks(model):
        stack.requires_grad_(False)
    graft(layer_of(model), [2], "mlp")
    assert all(stack.grad is None for stack in stacks(model))


def test_adafactor_survives_growth() -> None:
    model = growing()
    optimizer = Adafactor(model.parameters(), lr=0.05)
    train(model, optimizer, 3)
    kept = [copy.deepcopy(optimizer.state[stack]) for stack in stacks(model)]
    graft(layer_of(model), [2, 3, 4], "mlp")
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


def test_sgd_without_momentum_and_an_optimizer_that_never_stepped() -> None:
    model = growing()
    optimizers = [SGD(model.parameters(), lr=0.1), AdamW(model.parameters())]
    train(model, optimizers[0], 1)
    graft(layer_of(model), [2], "mlp")
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
        held = follower.stacks_of(optimizer)
        assert all(a is b for a, b in zip(held, old, strict=True))
        return 0.0

    optimizer.step(closure)
    assert all(a is b for a, b in zip(follower.stacks_of(optimizer), stacks(model), strict=True))


def test_a_state_dict_with_more_slots_keeps_the_optimizer_on_the_model() -> None:
    source, model = growing(reserve=8), growing()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    train(model, optimizer, 2)
    model.load_state_dict(source.state_dict())
    assert bank_of(model).capacity == 8
    assert all(a is b for a, b in zip(follower.stacks_of(optimizer), stacks(model), strict=True))
    before = rows(model, 0)
    train(model, optimizer, 2)
    assert not same(rows(model, 0), before)


def test_a_stack_that_its_owner_has_put_in_is_not_there_twice() -> None:
    model = growing()
    named = list(layer_of(model).named_parameters())
    optimizer = AdamW(named)
    loss_of(model, 0).backward()
    for stack in follower.stacks_of(optimizer):
        optimizer.state[stack]["exp_avg"] = torch.ones_like(stack)
    graft(layer_of(model), [2], "mlp")  # it has not stepped: nothing is replaced yet
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
    graft(layer_of(model), [2], "mlp")
    before, weight = rows(model, 0), layer_of(model).weight.detach().clone()
    with caplog.at_level(logging.WARNING, logger=hooks.__name__):
        train(model, optimizer, 1, one_scaler)
    assert "sync(optimizer, model)" in caplog.text
    assert same(rows(model, 0), before)
    assert not torch.equal(layer_of(model).weight, weight)
    train(model, optimizer, 1, one_scaler)
    assert not same(rows(model, 0), before)
