"""One tensor of every slot's blueprint, and what it tells the optimizers that step it."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from kasmina_fx.transactions.buffers import to_device


class Follower(Protocol):
    """An optimizer that has state of a stack, as the stack sees it."""

    def steps_elsewhere(self) -> bool:
        """Say whether it is in the middle of a step, in another thread."""

    def replaced(self) -> None:
        """A stack of its was outgrown: take the larger one."""

    def restarted(self, stack: StackedParameter, slots: frozenset[int]) -> None:
        """Slots start anew: forget what is known of them."""

    def known_of(self, stack: StackedParameter, slots: list[int]) -> Any:
        """Return a copy of what is known of some slots."""

    def knew(self, stack: StackedParameter, slots: list[int], known: Any) -> None:
        """What was known of some slots holds again."""


class StackedParameter(nn.Parameter):
    """One tensor of every slot's blueprint, ``(capacity, ...)``.

    A subclass, because Dynamo (torch 2.11 to 2.13) forces shapes static where
    ``type(t) is nn.Parameter``.

    Attributes:
        bank: The module that holds it; None once a larger stack has taken its place.
        successor: That larger one.
        followers: The optimizers that have state of it.
        fresh: Slots given to new seeds since an optimizer last began to step it.
        stale: Slots whose gradient is of an earlier seed, until the thread that trains drops it.
        passes: The backward passes that are in its gradient, where they are averaged; see
            :mod:`kasmina_fx.banks.accumulation`.
        averaging: The handle of that hook, while it is there.
        late: Rows (slots, values) written while another thread's optimizer was stepping it.
        swapped: Its successor holds another pack: gradients still to come are nobody's.
    """

    exists: ClassVar[bool] = False  # one was ever made in this process
    made: ClassVar[int] = 0  # so many were
    bank: weakref.ref[Any] | None = None
    successor: StackedParameter | None = None
    followers: weakref.WeakSet[Follower] | None = None
    fresh: frozenset[int] = frozenset()
    late: tuple[tuple[Tensor, Tensor], ...] = ()
    stale: frozenset[int] = frozenset()
    passes: Any = None
    averaging: Any = None
    swapped: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make one, and let optimizers know that there are any."""
        StackedParameter.exists = True
        StackedParameter.made += 1
        return super().__new__(cls, *args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> Any:
        """Rebuilt as what it is: torch would make a plain Parameter of it."""
        return StackedParameter, (self.detach(), self.requires_grad)

    def newest(self) -> StackedParameter:
        """The stack that holds its slots now."""
        stack = self
        while stack.successor is not None:
            stack = stack.successor
        return stack

    def is_of_another_pack(self) -> bool:
        """Say whether its slots hold another pack by now."""
        stack = self
        while stack.successor is not None and not stack.swapped:
            stack = stack.successor
        return stack.swapped

    def stepped_elsewhere(self) -> bool:
        """Say whether an optimizer of another thread is in the middle of stepping it."""
        return any(follower.steps_elsewhere() for follower in list(self.followers or ()))

    @torch.no_grad()
    def hand_over(self, new: StackedParameter, trained_elsewhere: bool = False) -> None:
        """Let ``new`` take its place: gradient, and optimizers that have met it.

        Right away, not at their next step: a GradScaler looks for gradients before that. A gradient
        that another thread may be about to drop is left where it is: torch does not lock them.
        """
        new.followers, self.bank, self.successor = self.followers, None, new
        if new.stepped_elsewhere():
            new.fresh, new.late = self.fresh, self.late
        if self.requires_grad and new.requires_grad:
            # A backward of a forward before the growth is still to run, perhaps.
            self.register_post_accumulate_grad_hook(_pass_on)  # type: ignore[no-untyped-call]
            if not trained_elsewhere:
                _pass_on(self)
        for follower in list(self.followers or ()):
            # In the middle of another thread's step(), the end of that does it.
            if not follower.steps_elsewhere():
                follower.replaced()

    @torch.no_grad()
    def write_rows(self, slots: Tensor, rows: Tensor) -> None:
        """Put ``rows`` into some slots (int64 on the CPU).

        Another thread's step under way may put back what it found there: its end writes again.
        """
        rows = rows.to(self.device, self.dtype)
        # .data: no backward still to run reads these slots, so its saved stacks stay valid.
        self.data.index_copy_(0, to_device(slots, self.device), rows)
        if self.stepped_elsewhere():
            self.late = (*self.late, (slots, rows))

    @torch.no_grad()
    def restart(self, slots: frozenset[int], trained_elsewhere: bool) -> None:
        """Slots start anew: no gradient, and no state in optimizers."""
        self.stale |= slots
        if not trained_elsewhere:  # else zero_grad() may be under way in that thread
            self.drop_stale()
        self.fresh |= slots
        for follower in list(self.followers or ()):
            follower.restarted(self, slots)

    @torch.no_grad()
    def drop_stale(self) -> None:
        """Drop gradients of seeds that are gone; only in the thread that trains."""
        if self.stale and self.grad is not None:
            where = to_device(torch.tensor(sorted(self.stale), device="cpu"), self.device)
            self.grad.index_fill_(0, where, 0.0)
        self.stale = frozenset()


@torch.no_grad()
def _pass_on(old: Tensor) -> None:
    if old.grad is None or not isinstance(old, StackedParameter):
        return
    if old.is_of_another_pack():
        old.grad = None
        return
    new = old.newest()
    more = resized(old.grad, len(new))
    new.grad = more if new.grad is None else new.grad + more
    old.grad = None


def resized(tensor: Tensor, rows: int, fill: float | Tensor = 0.0) -> Tensor:
    """A copy with so many rows; those that are new hold ``fill``."""
    kept = min(rows, len(tensor))
    copy = tensor.new_zeros(rows, *tensor.shape[1:])
    copy[:kept] = tensor.detach()[:kept]
    copy[kept:] += fill
    return copy
