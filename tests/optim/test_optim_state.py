"""Which of an optimizer's state has a row a slot, and slots used again."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from graph_cases import layer_of
from optim_cases import OPTIMIZERS, bank_of, growing, stacks, train
from torch.optim import AdamW

from kasmina_fx import (
    SeedLifecycle,
    optim,
)
from kasmina_fx.optim import follower, state
from kasmina_fx.testing import graft

S = SeedLifecycle


def test_state_that_is_no_tensor_has_no_rows() -> None:
    assert not state.has_rows("momentum_buffer", None, torch.zeros(3, 4))


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
    graft(layer, [4], "mlp")
    assert bank_of(model).capacity == 2
    (group,) = optimizer.param_groups
    starts = {"sum": group.get("initial_accumulator_value"), "step_size": group["lr"]}
    for stack, before in zip(stacks(model), kept, strict=True):
        for key, value in optimizer.state[stack].items():
            if key == "kasmina_births":
                assert value["slots"] == {1: 0}
            elif key == "step" or (key, stack.dim()) == ("col_var", 2):  # of all slots together
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
    layer_of(model).request_germination(4, "mlp")
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
    known = follower.stacks_of(optimizer)[0].followers
    assert known is not None
    assert len(known) == 1
    del optimizer
    gc.collect()
    assert not known
    graft(layer_of(model), [2], "mlp")
