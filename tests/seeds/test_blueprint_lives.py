"""Blueprints over the lives of their seeds, and where a transaction fails."""

from __future__ import annotations

import threading

import pytest
import torch
from life_cases import S, bring, small_layer, stage_name

from kasmina_fx import (
    SeedLifecycle,
)
from kasmina_fx.lifecycle import (
    DEFAULT_EMBARGO,
)
from kasmina_fx.testing import graft

# Blueprints over a life.


@pytest.mark.parametrize("end", [S.CULLED, S.CANCELLED], ids=stage_name)
def test_a_private_blueprint_that_ends_frees_its_slot(end: SeedLifecycle) -> None:
    layer = small_layer()
    bring(layer, [0, 1], S.TRAINING)
    (bank,) = layer.kasmina.bank_list()
    assert (bank.held > 0).tolist() == [True, True]
    layer.advance(0, end)
    assert (bank.held > 0).tolist() == [False, True]
    assert bank.slots.tolist() == bank.held.tolist()
    assert layer.bank_of(0) is None
    assert layer.seeds[0].blueprint_id > 0  # it says what was culled, until it is dormant
    capacity = bank.capacity
    bring(layer, [2], S.TRAINING)
    assert bank.capacity == capacity  # the free slot is used again
    assert (bank.held > 0).tolist() == [True, True]


def test_a_shared_blueprint_outlives_its_seeds() -> None:
    layer = small_layer()
    shared = layer.register_blueprint("affine")
    graft(layer, [0, 1], shared)
    (bank,) = layer.kasmina.bank_list()
    with torch.no_grad():
        bank.get_parameter("shift").fill_(3.0)
    layer.advance([0, 1], S.CULLED)
    assert bank.held.tolist() == [shared]
    graft(layer, 2, shared)
    held = layer.bank_of(2)
    assert held is not None
    assert held[0].slot_tensors(held[1])["shift"].tolist() == [3.0, 3.0]


def test_a_seed_that_was_rolled_back_keeps_its_blueprint_until_reset() -> None:
    layer = small_layer()
    graft(layer, 0, "affine", 0.5)
    (bank,) = layer.kasmina.bank_list()
    with torch.no_grad():
        bank.get_parameter("shift")[0] = torch.tensor([2.0, 5.0])
    number, x = layer.seeds[0].blueprint_id, torch.randn(3, 4)
    layer.advance(0, S.ROLLED_BACK)
    bring(layer, [1, 2], S.GRAFTING)  # makes the bank grow
    layer.advance([1, 2], S.CULLED)
    for _ in range(DEFAULT_EMBARGO + 1):
        layer.step_epoch()
    assert layer.state.rows[0].tolist() == [S.ROLLED_BACK, number, DEFAULT_EMBARGO + 1, 0]
    held = layer.bank_of(0)
    assert held is not None
    assert held[0].slot_tensors(held[1])["shift"].tolist() == [2.0, 5.0]
    assert torch.equal(layer(x), layer.base(x))  # for inspection alone
    layer.reset(0)
    assert layer.bank_of(0) is None
    assert not bank.held.any()


# Transactions of a layer.


def test_a_failed_transaction_gives_slots_back() -> None:
    layer = small_layer(reserve=2)
    graft(layer, 0, None, 0.5)
    x, (bank,) = torch.randn(2, 4), layer.kasmina.bank_list()
    rows, held, out = layer.state.rows.tolist(), bank.held.tolist(), layer(x)

    def fail() -> None:
        with layer.transaction():
            layer.advance(0, S.CULLED)
            graft(layer, 1, None, 1.0)
            layer.reset(0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert layer.state.rows.tolist() == layer.state.state_tensor.tolist() == rows
    assert layer.state.alphas.tolist() == [0.5, 0, 0]
    assert bank.held.tolist() == held
    assert torch.equal(layer(x), out)
    graft(layer, 1, None, 1.0)
    assert [layer.bank_of(seed) is not None for seed in range(3)] == [True, True, False]


def test_a_failed_transaction_leaves_what_another_thread_did_meanwhile() -> None:
    layer = small_layer(reserve=2)
    begun = threading.Event()

    def fail() -> None:
        begun.set()
        with pytest.raises(KeyError), layer.transaction():
            raise KeyError

    thread = threading.Thread(target=fail, daemon=True)
    with layer.state.transaction():
        thread.start()
        assert begun.wait(20)
        thread.join(0.2)  # now it waits for this transaction
        graft(layer, 0)
    thread.join(20)
    assert layer.seeds[0].stage is S.GRAFTING
    assert layer.bank_of(0) is not None
