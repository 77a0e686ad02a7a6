"""What happens around every ``step()`` of an optimizer that holds stacks.

Torch's hooks for all optimizers, registered once. They look at one that holds no stack and let it
be. Nothing waits for the device. Before a step, in this order:

1. put back what a step that raised, or that calls this one, has compacted;
2. take the larger stacks in the places of outgrown ones;
3. drop gradients of seeds that are gone, of banks that none is in, and of reconstruction losses
   under another scale;
4. keep what is frozen, and compact where one number's step depends on the others.

After it: put back what was compacted, then what is frozen, then what other threads wrote meanwhile;
then let ramps make their step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from kasmina_fx._torch.amp import stepping_scaler
from kasmina_fx._torch.optim import allow_foreach
from kasmina_fx.banks.bank import Bank
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.lifecycle import Mode
from kasmina_fx.optim import ages, following, state
from kasmina_fx.optim.compact import CompactParameter, compact, couples, put_back
from kasmina_fx.optim.follower import (
    Held,
    OptimizerFollower,
    follower_of,
    holds_stacks,
    stepping_here,
)
from kasmina_fx.optim.frozen import keep, put_back_frozen, write_on
from kasmina_fx.optim.step import Step
from kasmina_fx.seeds import epochs
from kasmina_fx.seeds.loss_scale import Change
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.buffers import to_device

_LOG: Final = logging.getLogger(__name__)
_DEEPEST: Final = 4


def register() -> None:
    """Register the hooks, and stacks as parameters; called when the package is imported."""
    allow_foreach(StackedParameter, CompactParameter)
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


# Dynamo traces these two in a compiled step(), and breaks the graph only if there are stacks.


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_dynamo_compiling() and StackedParameter.exists:
        following.catch_up(optimizer)
        following.warn_once(optimizer)
    if _may_hold_stacks() and holds_stacks(optimizer):
        # A closure's gradients are those of the stacks; and a compiled step would meet new ones.
        whole = len(args) > 1 or bool(kwargs) or torch.compiler.is_dynamo_compiling()
        _begin(optimizer, whole)


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _may_hold_stacks() and holds_stacks(optimizer):
        _end(optimizer)


def _may_hold_stacks() -> bool:
    # Dynamo would guard on what changes with the first stack.
    return torch.compiler.is_dynamo_compiling() or StackedParameter.exists


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's, unannotated
@torch.no_grad()
def _begin(optimizer: Optimizer, whole: bool) -> None:
    follower = follower_of(optimizer)
    with follower.alone():
        for step in follower.steps:
            put_back(optimizer, step.compacted)
        replaced = follower.replace_grown() if follower.held().outgrown() else []
        held = follower.held()
        if replaced:
            _drop_scaled_gradients(replaced)
        _forget_before(held)
        follower.thread = threading.get_ident()
        _check_scales(held)
        if not whole:
            _leave_out_empty(optimizer, held)
        kept = [keep(bank, stacks) for bank, stacks in held.banks()]
        ramps = {store: store.ramp_steps for store in held.led()}
        compacted = list(compact(optimizer)) if couples(optimizer) and not whole else []
        follower.steps = [*follower.steps[1 - _DEEPEST :], Step(kept, ramps, compacted)]
    for store in ramps:
        if epochs.in_use(store, "needs_grad_norm"):
            _record_grad_norm(optimizer, store)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's, unannotated
@torch.no_grad()
def _end(optimizer: Optimizer) -> None:
    follower = follower_of(optimizer)
    with follower.alone():
        # None: a closure put its first stack in.
        step = follower.steps.pop() if follower.steps else Step([], {}, [])
        put_back(optimizer, step.compacted)
        for group in optimizer.param_groups:
            for stack in group["params"]:
                if type(stack) is StackedParameter and stack.grad is not None:
                    ages.correct(optimizer, stack, group)
        follower.thread = None
        outgrown = follower.held().outgrown()
        for kept in step.kept:
            if outgrown:
                write_on(kept)
            put_back_frozen(kept)  # after that: what is frozen moved in the outgrown one
        if outgrown:
            follower.replace_grown()
        _settle(follower)
    for store, made in step.ramps.items():
        # An optimizer may wrap one that holds the same stacks: what the inner step ramped, the
        # outer one does not.
        if store.config.ramp_every == "step" and store.ramp_steps == made:
            epochs.step_ramp(store)
            store.ramp_steps = made + 1


def _settle(follower: OptimizerFollower) -> None:
    """Let what happened during a step stand, and forget what the step had to know."""
    held = follower.held()
    for stack in held.stacks:
        stack.passes = None
        if stack.late or stack.fresh:
            _write_late(follower, stack)
        if stack.stale:
            stack.drop_stale()
    for bank, _ in held.banks():
        if bank.left:  # a module takes microseconds to set an attribute
            bank.left = set()
    for siblings in held.siblings:
        siblings.training.awaits_backward = siblings.training.awaits_gradients = False
        siblings.folding.stepped = True


def _forget_before(held: Held) -> None:
    """What was given away before this step starts with it; this thread trains these models."""
    for stack in held.stacks:
        if stack.stale:
            stack.drop_stale()
        stack.fresh = frozenset()
        if stack.late and not stack.stepped_elsewhere():
            stack.late = ()  # of a step that raised
    for siblings in held.siblings:
        siblings.training.thread = threading.get_ident()


def _leave_out_empty(optimizer: Optimizer, held: Held) -> None:
    """Let a step pass by the stacks on a CPU whose slots nobody holds: their gradients are zero.

    State is made by the first step, so that saved optimizers have that of all stacks. On CUDA a
    step that is recorded is replayed when the bank holds seeds.
    """
    for bank, stacks in held.banks():
        if stacks[0].is_cpu and not bank.trained.numel() and not bank.frozen_slots.numel():
            for stack in stacks:
                if stack.grad is not None and optimizer.state.get(stack):
                    stack.grad = None


def _write_late(follower: OptimizerFollower, stack: StackedParameter) -> None:
    """Seeds that germinated or went back during the step start from what they were given."""
    for slots, rows in stack.late:
        stack.data.index_copy_(0, to_device(slots, stack.device), rows)
    if stack.late and not stack.stepped_elsewhere():
        stack.late = ()
    state.clear(follower.optimizer, stack, stack.fresh)


def _record_grad_norm(optimizer: Optimizer, store: SeedStore) -> None:
    before = store.grad_norm
    epochs.record_grad_norm(store)
    # A GradScaler leaves it to a fused optimizer to divide the gradients, which comes later.
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None and store.grad_norm is not before:
        store.grad_norm = store.grad_norm / scale


def _check_scales(held: Held) -> None:
    """Mend gradients of reconstruction losses that another scale divides than multiplied them.

    If none multiplied them, the scale does so now; else they are dropped, and so are those of slots
    that learn from the model's loss as well.
    """
    stepping = stepping_here()
    for siblings in held.siblings:
        change = siblings.loss_scale.check(stepping)
        if change is Change.NONE:
            continue
        siblings.publish_stacks()
        for store in siblings:
            store.telemetry.forget_gradients()
        for bank, stacks in held.banks():
            if bank.training_loop is siblings.training:
                found = change is Change.FOUND
                _rescale(bank, stacks, siblings.loss_scale.tensor(stacks[0]) if found else None)


def _rescale(bank: Bank, stacks: Sequence[StackedParameter], scale: Tensor | None) -> None:
    trains = bank.modes == Mode.RECONSTRUCTS
    alone = trains.all(1) if scale is not None else torch.zeros_like(trains[:, 0])
    for stack in stacks:
        if stack.grad is not None:
            rows = stack.grad[: len(trains)]
            shape = (-1, *[1] * (rows.dim() - 1))
            rows.masked_fill_((trains.any(1) & ~alone).view(shape), 0.0)
            if scale is not None:
                rows.copy_(torch.where(alone.view(shape), rows * scale, rows))


def _drop_scaled_gradients(replaced: list[StackedParameter]) -> None:
    """Drop gradients of stacks that a GradScaler did not find in the optimizer.

    It divided and checked those of the outgrown ones. Only an optimizer that has neither stepped
    nor been synced gets here: all others had the new stacks at once.
    """
    unchecked = [stack for stack in replaced if stack.grad is not None]
    if unchecked and stepping_scaler() is not None:
        _LOG.warning(
            "%d stacks grew before their optimizer's first step: that step leaves them out, since "
            "a GradScaler did not see their gradients. kasmina_fx.optim.sync(optimizer, model) "
            "after the growth avoids it",
            len(unchecked),
        )
        for stack in unchecked:
            stack.grad = None
