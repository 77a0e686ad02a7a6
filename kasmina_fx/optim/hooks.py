"""What happens around every ``step()`` of an optimizer that holds stacks.

Torch's hooks for all optimizers, registered once. They look at one that holds no stack and let it
be. Nothing waits for the device.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from kasmina_fx import epochs
from kasmina_fx._torch_compat import live_grad_scalers
from kasmina_fx.bank import Bank
from kasmina_fx.lifecycle import Mode
from kasmina_fx.optim import state
from kasmina_fx.optim.compact import Compacted, compact, couples, put_back
from kasmina_fx.optim.growth import (
    STEPPING,
    holds_stacks,
    meet,
    replace_grown,
    stacks_of,
)
from kasmina_fx.seed_store import SeedStore
from kasmina_fx.stack import StackedParameter
from kasmina_fx.staging import LOCK
from kasmina_fx.transfer import to_device

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """A stack before a step: who sat where, and the rows that nothing may change."""

    stack: StackedParameter
    where: Tensor  # int64 (n,)
    rows: Tensor  # (n, ...)
    slots: Tensor  # the bank's table
    held: Tensor  # the same on the CPU


@dataclass(frozen=True)
class _Step:
    """A step under way: what it may not change, and the layers whose ramps follow it."""

    kept: list[_Kept]
    ramps: dict[SeedStore, int]  # and how many ramp steps they had made
    compacted: list[Compacted]


#: Steps under way, the last one last: step() of a subclass may call its base's, which runs the
#: hooks again. One that raised stays until it is pushed out.
_STEPS: Final[weakref.WeakKeyDictionary[Optimizer, list[_Step]]] = weakref.WeakKeyDictionary()
_DEEPEST: Final = 4
#: Ramp steps made after optimizer steps. An optimizer may wrap one that holds the same stacks: what
#: the inner step ramped, the outer one does not.
_RAMPED: Final[weakref.WeakKeyDictionary[SeedStore, int]] = weakref.WeakKeyDictionary()


def register() -> None:
    """Register the hooks; called when the package is imported."""
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


# Dynamo traces these two in a compiled step(), and breaks the graph only if there are stacks.


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if holds_stacks(optimizer):
        # A closure's gradients are those of the stacks; and a compiled step would meet new ones.
        whole = len(args) > 1 or bool(kwargs) or torch.compiler.is_dynamo_compiling()
        _begin(optimizer, whole)


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if holds_stacks(optimizer):
        _end(optimizer)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's, unannotated
@torch.no_grad()
def _begin(optimizer: Optimizer, whole: bool) -> None:
    with LOCK:
        for step in _STEPS.get(optimizer, ()):
            put_back(optimizer, step.compacted)  # of a step that raised, or that calls this one
        replaced = replace_grown(optimizer)
        if replaced:
            _drop_scaled_gradients(optimizer, replaced)
        stacks = stacks_of(optimizer)
        for stack in stacks:
            meet(optimizer, stack)
            stack.drop_stale()
            stack.fresh = frozenset()
            if not stack.stepped_elsewhere():
                stack.late = ()  # of a step that raised
        for layer in {layer for layer in map(_layer_of, stacks) if layer is not None}:
            layer.colony.training.thread = threading.get_ident()
        _check_scalers(optimizer, stacks)
        kept = [kept for stack in stacks if (kept := _keep(stack)) is not None]
        ramps = {layer: _RAMPED.get(layer, 0) for layer in _led(stacks)}
        compacted = list(compact(optimizer)) if couples(optimizer) and not whole else []
        under_way = _STEPS.get(optimizer, [])[1 - _DEEPEST :]
        _STEPS[optimizer] = [*under_way, _Step(kept, ramps, compacted)]
        STEPPING[optimizer] = threading.get_ident()
    for layer in ramps:
        if epochs.in_use(layer, "needs_grad_norm"):
            _record_grad_norm(optimizer, layer)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's, unannotated
@torch.no_grad()
def _end(optimizer: Optimizer) -> None:
    with LOCK:
        steps = _STEPS.get(optimizer)
        step = steps.pop() if steps else _Step([], {}, [])  # none: a closure put its first stack in
        put_back(optimizer, step.compacted)
        STEPPING.pop(optimizer, None)
        outgrown = {id(p) for p in stacks_of(optimizer) if p.successor is not None}
        for kept in step.kept:
            if id(kept.stack) in outgrown:
                _write_on(kept)
            _write_back(kept)  # after that: what is frozen moved in the outgrown one
        replace_grown(optimizer)
        for stack in stacks_of(optimizer):
            _write_late(optimizer, stack)
            stack.drop_stale()
            bank, layer = _bank_of(stack), _layer_of(stack)
            if bank is not None and layer is not None:
                bank.left, layer.colony.training.awaits_backward = set(), False
    for layer, made in step.ramps.items():
        if layer.config.ramp_every == "step" and _RAMPED.get(layer, 0) == made:
            epochs.step_ramp(layer)
            _RAMPED[layer] = made + 1


# Frozen slots.


def _keep(stack: StackedParameter) -> _Kept | None:
    bank = _bank_of(stack)
    if bank is None:
        return None
    where, rows = bank.frozen_slots, stack.detach()
    rows = rows.index_select(0, where) if len(where) else rows[:0]
    return _Kept(stack, where, rows, bank.slots, bank.held)


def _write_back(kept: _Kept) -> None:
    if not len(kept.where):
        return
    stack = kept.stack.newest()
    bank, rows = _bank_of(stack), kept.rows
    if bank is not None and bank.slots is not kept.slots:
        # Seeds have changed meanwhile, in a closure or another thread: a slot that went to another
        # seed keeps what that has put there.
        same = bank.slots[kept.where] == kept.slots[kept.where]
        now = stack.detach().index_select(0, kept.where)
        rows = torch.where(same.view(-1, *[1] * (rows.dim() - 1)), rows, now)
    stack.data.index_copy_(0, kept.where, rows)


# What another thread did meanwhile.


def _write_on(kept: _Kept) -> None:
    """The step went on with a stack after a larger one took its place: hand its rows on."""
    stack = kept.stack.newest()
    bank = _bank_of(stack)
    if bank is None:
        return
    same = (kept.held > 0) & (bank.held[: len(kept.held)] == kept.held)
    where = to_device(same.nonzero().flatten(), stack.device)
    stack.data.index_copy_(0, where, kept.stack.detach().index_select(0, where))


def _write_late(optimizer: Optimizer, stack: StackedParameter) -> None:
    """Seeds that germinated or went back during the step start from what they were given."""
    for slots, rows in stack.late:
        stack.data.index_copy_(0, to_device(slots, stack.device), rows)
    if not stack.stepped_elsewhere():
        stack.late = ()
    state.clear(optimizer, stack, stack.fresh)


# Layers.


def _led(stacks: list[StackedParameter]) -> Iterator[SeedStore]:
    """The layers whose first stack is among these: one optimizer a layer has it."""
    held = {id(stack) for stack in stacks}
    for layer in dict.fromkeys(_layer_of(stack) for stack in stacks):
        if layer is not None and id(_first_stack(layer)) in held:
            yield layer


def _first_stack(layer: SeedStore) -> Tensor | None:
    for bank in layer.bank_list():
        for spec, stack in zip(bank.tensor_specs, bank.tensors(), strict=True):
            if spec.trainable:
                return stack
    return None


def _bank_of(stack: StackedParameter) -> Bank | None:
    return None if stack.bank is None else stack.bank()


def _layer_of(stack: StackedParameter) -> SeedStore | None:
    bank = _bank_of(stack)
    owner = None if bank is None or bank.owner is None else bank.owner()
    return owner if isinstance(owner, SeedStore) else None


def _record_grad_norm(optimizer: Optimizer, layer: SeedStore) -> None:
    store = layer
    before = store.grad_norm
    epochs.record_grad_norm(store)
    # A GradScaler leaves it to a fused optimizer to divide the gradients, which comes later.
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None and store.grad_norm is not before:
        store.grad_norm = store.grad_norm / scale


def _check_scalers(optimizer: Optimizer, stacks: list[StackedParameter]) -> None:
    """Drop gradients of reconstruction losses that were scaled, and that nobody divides."""
    layers = {layer for layer in map(_layer_of, stacks) if layer is not None}
    me = threading.get_ident()  # an outer optimizer's step may call this one's
    stepping = [optimizer, *(other for other, thread in STEPPING.items() if thread == me)]
    strange = {
        colony for colony in {layer.colony for layer in layers} if not colony.check_scaler(stepping)
    }
    for stack in stacks if strange else ():
        layer, bank = _layer_of(stack), _bank_of(stack)
        if layer is None or bank is None or layer.colony not in strange or stack.grad is None:
            continue
        trains = (bank.modes == Mode.RECONSTRUCTS).any(1)
        rows = stack.grad[: len(trains)]
        rows.masked_fill_(trains.view(-1, *[1] * (rows.dim() - 1)), 0.0)


def _drop_scaled_gradients(optimizer: Optimizer, replaced: list[StackedParameter]) -> None:
    """Drop gradients of stacks that a GradScaler did not find in the optimizer.

    It divided and checked those of the outgrown ones. Only an optimizer that has neither stepped
    nor been synced gets here: all others had the new stacks at once.
    """
    unchecked = [stack for stack in replaced if stack.grad is not None]
    if unchecked and live_grad_scalers():
        _LOG.warning(
            "%d stacks grew before their optimizer's first step: that step leaves them out, since "
            "a GradScaler did not see their gradients. kasmina_fx.optim.sync(optimizer, model) "
            "after the growth avoids it",
            len(unchecked),
        )
        for stack in unchecked:
            stack.grad = None
