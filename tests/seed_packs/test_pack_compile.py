"""Switching is data: compiled models compile nothing for it, and have one pack a call."""

from __future__ import annotations

import threading

import pytest
import torch
from pack_cases import PACKS, X, optimizer_of, output, outputs, plain, train, with_packs
from torch import nn
from torch.optim import AdamW

import kasmina_fx
from kasmina_fx.testing import assert_no_recompiles

pytestmark = pytest.mark.untraced


@pytest.fixture(scope="module")
def switched() -> nn.Module:
    """A compiled model with three packs that was trained and evaluated once."""
    torch._dynamo.reset()
    model = with_packs(compile=True)
    train(model, optimizer_of(model, lambda p: AdamW(p, lr=0.01)), range(2))
    output(model)
    return model


@pytest.fixture(autouse=True)
def _no_compiled_code() -> None:
    """What the module's model has compiled stays."""


def test_three_packs_and_the_host_compile_nothing_more(switched: nn.Module) -> None:
    optimizer = optimizer_of(switched, lambda p: AdamW(p, lr=0.01))
    mine = kasmina_fx.packs(switched)
    with assert_no_recompiles():
        for name in ("a", "b", None, "c", "b", "a"):
            mine.activate(name)
            train(switched, optimizer, range(2)) if name else None
            output(switched)
            with kasmina_fx.seeds_off(switched):
                output(switched)


def test_each_pack_comes_back_to_the_bit_where_it_is_compiled(switched: nn.Module) -> None:
    before = outputs(switched)
    assert before[None].equal(torch.compile(plain())(X))
    for _ in range(2):
        after = outputs(switched)
        assert all(after[name].equal(out) for name, out in before.items())


def test_a_forward_of_another_thread_sees_one_pack(switched: nn.Module) -> None:
    mine, whole = kasmina_fx.packs(switched), outputs(switched)
    seen: list[torch.Tensor] = []
    done = threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not done.is_set():
                seen.append(switched(X))

    switched.eval()
    thread = threading.Thread(target=serve)
    thread.start()
    for name in (*PACKS, None) * 8:
        mine.activate(name)
    done.set()
    thread.join()
    switched.train()
    mine.activate("c")
    assert seen
    assert all(any(out.equal(one) for one in whole.values()) for out in seen)
