"""Gradients of reconstruction losses are averages over the backward passes that accumulate.

A training loop that accumulates gradients divides its loss by the number of micro-batches; of the
reconstruction losses, which it never sees, it can't. So each backward pass counts as one batch, and
the gradient of a slot that learns from its reconstruction loss alone is the mean over the passes
since gradients were last cleared: by ``zero_grad()``, or by a step of an optimizer. (Clearing in
place, ``zero_grad(set_to_none=False)``, without a step in between is not seen.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kasmina_fx._torch.tracing import StorageOf
from kasmina_fx.banks.stack import StackedParameter


class Passes:
    """Counts the backward passes that have gone into a stack's gradient.

    Attributes:
        slots: int64 ``(n,)``: whose gradients are averages.
    """

    def __init__(self, slots: Tensor, gradient: Tensor) -> None:
        self.slots, self.count = slots, 1
        self._storage = StorageOf(gradient)
        self._mean: Tensor | None = None  # of the first pass alone it is the gradient itself

    def continues(self, slots: Tensor, gradient: Tensor) -> bool:
        """Say whether a gradient is the one that is counted, and the same slots are averaged."""
        return slots is self.slots and self._storage.is_of(gradient)

    def take(self, gradient: Tensor) -> None:
        """One pass more has been added to ``gradient``: make it the mean again."""
        self.count += 1
        total = gradient.index_select(0, self.slots)
        mean = total / self.count
        if self._mean is not None:  # after the second pass, total is mean before + what was added
            mean = self._mean + (total - 2 * self._mean) / self.count
        self._mean = mean
        gradient.index_copy_(0, self.slots, mean)


def watch(stack: StackedParameter, averages: bool) -> None:
    """Let a stack's gradient be averaged, or not: a hook costs each step of a deep model."""
    if averages and stack.averaging is None:
        stack.averaging = stack.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
    elif not averages and stack.averaging is not None:
        stack.averaging.remove()
        stack.averaging = None


@torch.no_grad()
def average(stack: Any) -> None:
    """The hook of a stack, after a backward pass has added to its gradient."""
    bank = stack.bank() if isinstance(stack, StackedParameter) and stack.bank else None
    if bank is None or stack.grad is None or not len(bank.reconstructing):
        return
    passes: Passes | None = stack.passes
    if passes is not None and passes.continues(bank.reconstructing, stack.grad):
        passes.take(stack.grad)
    else:
        stack.passes = Passes(bank.reconstructing, stack.grad)
