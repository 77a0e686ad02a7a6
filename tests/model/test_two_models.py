"""What happens to one model holds up no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import kasmina_fx
from kasmina_fx import SeedLifecycle, kasmina_layers, kasminify
from kasmina_fx.testing import graft

LONG, SHORT = 20.0, 0.2  # seconds: for what must happen, and for what must not


class Slow(nn.Module):
    """A model whose forward goes on until it is told to end."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> Any:
        entered.set()
        ended.wait(LONG)
        return self.fc(x)


entered, ended = threading.Event(), threading.Event()


def model(plain: nn.Module | None = None) -> Any:
    plain = nn.Sequential(nn.Linear(4, 6)) if plain is None else plain
    return kasminify(plain, num_seeds=6, compile=False)


@contextmanager
def forward_of(slow: nn.Module) -> Iterator[None]:
    """Another thread is in the middle of the model's forward."""
    entered.clear()
    ended.clear()
    thread = threading.Thread(target=lambda: slow(torch.randn(2, 4)), daemon=True)
    thread.start()
    assert entered.wait(LONG)
    try:
        yield
    finally:
        ended.set()
        thread.join(LONG)
    assert not thread.is_alive()


def changed(other: Any) -> threading.Thread:
    """A thread that germinates, publishes and steps an optimizer of a model."""

    def change() -> None:
        layer = next(iter(kasmina_layers(other).values()))
        with kasmina_fx.transaction(other):
            layer.request_germination([0, 1], "affine")
            layer.advance([0, 1], SeedLifecycle.TRAINING)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        other(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        kasmina_fx.step_epoch(other)

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    return thread


def test_a_germination_does_not_wait_for_the_forward_of_another_model() -> None:
    slow, other = model(Slow()), model()
    with forward_of(slow):
        thread = changed(other)
        thread.join(LONG)
        assert not thread.is_alive()
        assert other[0].state.stages[:2].tolist() == [2, 2]


def test_nor_for_a_publication_that_waits_for_that_forward() -> None:
    slow, other = model(Slow()), model()
    with forward_of(slow):
        waiting = threading.Thread(target=lambda: graft(slow.fc, [0], "mlp"), daemon=True)
        waiting.start()
        waiting.join(SHORT)
        assert waiting.is_alive()  # of the same model: it waits
        thread = changed(other)
        thread.join(LONG)
        assert not thread.is_alive()
        assert waiting.is_alive()
    waiting.join(LONG)
    assert not waiting.is_alive()
    assert bool(slow.fc.state.blended[0])


def test_a_transaction_over_two_models_waits_for_both() -> None:
    slow, other = model(Slow()), model()
    both = nn.ModuleList([slow, other])

    def change() -> None:
        with kasmina_fx.transaction(both):
            slow.fc.request_germination(0, "affine")
            other[0].request_germination(0, "affine")

    with forward_of(slow):
        thread = threading.Thread(target=change, daemon=True)
        thread.start()
        thread.join(SHORT)
        assert thread.is_alive()
        assert not other[0].kasmina.state.state_tensor.any()
    thread.join(LONG)
    assert not thread.is_alive()
    assert int(slow.fc.state.stages[0]) == int(other[0].state.stages[0]) == 1


def test_forwards_that_call_each_other_cross_publications_of_both() -> None:
    """Each thread is inside one model, and enters the other while a publication waits for it."""
    a, b = model(), model()
    errors: list[BaseException] = []

    def calls(first: Any, second: Any) -> None:
        try:
            for _ in range(30):
                with kasmina_fx.hold_seeds(first):
                    time.sleep(0.001)
                    with kasmina_fx.hold_seeds(second):
                        pass
        except BaseException as error:
            errors.append(error)

    def publishes() -> None:
        for i in range(60):
            with kasmina_fx.transaction(nn.ModuleList([a, b])):
                a[0].set_alpha(0, i / 60)
                b[0].set_alpha(0, i / 60)

    threads = [
        threading.Thread(target=calls, args=(a, b), daemon=True),
        threading.Thread(target=calls, args=(b, a), daemon=True),
        threading.Thread(target=publishes, daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive(), "they wait for each other"
    assert errors == []


@pytest.mark.parametrize("way", ["sync", "step"])
def test_an_optimizer_of_two_models_holds_the_locks_of_both(way: str) -> None:
    a, b = model(), model()
    graft(a[0], [0], "mlp")
    graft(b[0], [0], "mlp")
    optimizer = torch.optim.SGD([*b.parameters(), *a.parameters()], lr=0.1)
    for _ in range(3):
        (a(torch.randn(2, 4)).sum() + b(torch.randn(2, 4)).sum()).backward()
        optimizer.step()
        graft(a[0], [int((a[0].state.stages == 0).nonzero()[0])], "mlp")
        if way == "sync":
            assert kasmina_fx.optim.sync(optimizer, a) is not None
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in a[0].blueprint_parameters())
