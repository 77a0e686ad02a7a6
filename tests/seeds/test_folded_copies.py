"""Copies of a folded model: memory, several threads, and how many ways there are."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from folded_cases import (
    S,
    X,
    assert_as_reference,
    by_a_write_to_a_blueprint,
    by_an_optimizer,
    by_other_memory,
    evaluated,
    finished,
    fossils,
    held,
    is_folded,
    pruned,
)
from torch import Tensor, nn

from kasmina_fx import (
    transaction,
    unkasminify,
)
from kasmina_fx.optim import follow
from kasmina_fx.seeds.folded import ENOUGH
from kasmina_fx.testing import graft

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
