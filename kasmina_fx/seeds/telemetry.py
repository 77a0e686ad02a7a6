"""The statistics that a layer keeps of its seeds, in buffers of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from kasmina_fx.physical.sense import PASSES, SENSED, SPACING
from kasmina_fx.physical.statistics import (
    COUNT,
    DELTA,
    EVERY,
    LOSS,
    NEAR_ZERO,
    NON_FINITE,
    PHASE,
    REJECTED,
    ROWS,
    RUNS,
    SQUARED_DEVIATIONS,
)
from kasmina_fx.transactions.buffers import Float32Module


def check_statistics(accumulated: Tensor, faults: Tensor, previous_loss: Tensor) -> None:
    """Refuse what no steps could have left in a layer's buffers.

    Raises:
        ValueError: Says which.
    """
    counts = accumulated[[COUNT, NEAR_ZERO, NON_FINITE, PHASE, EVERY, REJECTED, RUNS]]
    squares = accumulated[[SQUARED_DEVIATIONS, LOSS, DELTA]]
    for name, values in (("counts", counts), ("faults", faults)):
        if not bool(((values >= 0) & (values < torch.inf)).all()):
            raise ValueError(f"telemetry: {name} below 0, or not finite")
    # NaN may be: a host whose output jumps by more than float32 holds has no mean any more.
    if bool((squares < 0).any() | (previous_loss < 0).any()):
        raise ValueError("telemetry: squares below 0")


class Telemetry(Float32Module):
    """A layer's statistics.

    Buffers: ``accumulated``, float32 ``(ROWS, S)``; ``faults``, float32 ``(S,)``: steps in which a
    gradient of the seed's blueprint was NaN or Inf. ``previous_loss``, float32 ``(S,)``: LOSS at
    the last step of the ramp. ``gradients``, float32 ``(SENSED, S)``, as
    of :mod:`kasmina_fx.physical.sense`: None where nobody asks, and in no state dict.
    """

    accumulated: Tensor
    faults: Tensor
    previous_loss: Tensor
    gradients: Tensor | None

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        # float32 whatever the layer's dtype: bfloat16 can't count past 256.
        empty = torch.zeros(ROWS, num_seeds, dtype=torch.float32, device=device)
        self.register_buffer("accumulated", empty)
        self.register_buffer("faults", torch.zeros_like(empty[0]))
        self.register_buffer("previous_loss", torch.zeros_like(empty[0]))
        self.register_buffer("gradients", None, persistent=False)

    def probe(self) -> Tensor:
        """A leaf float32 ``(S,)`` whose gradient accumulates in ``faults``."""
        return _adding_to(self.faults, torch.zeros_like(self.faults))

    def sensing(self) -> Tensor | None:
        """A leaf with the values of ``gradients``, where its gradient accumulates; None as that."""
        if self.gradients is None:
            return None
        # .data: what backward reads of it is to be what is there by then.
        return _adding_to(self.gradients, self.gradients.data)

    @torch.inference_mode(False)
    def sense(self, wanted: bool) -> None:
        """Look at gradients of outputs from the next publication on, or forget them."""
        if wanted != (self.gradients is not None):
            self.gradients = torch.zeros_like(self.accumulated[:SENSED]) if wanted else None
        self._sense_next()

    def observe_like(self, other: Telemetry) -> None:
        """Observe as often as another layer's statistics do, and gradients if these do."""
        self.accumulated[EVERY] = other.accumulated[EVERY, 0]
        self.sense(other.gradients is not None)

    def _sense_next(self) -> None:
        if self.gradients is not None:
            self.gradients[PASSES] = 0.0
            self.gradients[SPACING] = self.accumulated[EVERY].clamp_min(1.0)

    def forget_gradients(self) -> None:
        """Start anew what is known of the gradients of outputs."""
        if self.gradients is not None:
            self.gradients.zero_()
            self._sense_next()

    def observe_every(self, steps: int) -> None:
        """Observe one step in so many from now on."""
        self.accumulated[EVERY] = 0.0 if steps == 1 else float(steps)
        self.accumulated[PHASE] = 0.0

    @torch.inference_mode(False)
    def forget_blueprints(self, ids: Tensor) -> None:
        """Start anew what is known of the blueprints of some seeds (int64 ``(n,)``, CPU)."""
        where = ids.to(self.faults.device, non_blocking=True)
        for row in (REJECTED, RUNS, LOSS, DELTA):
            self.accumulated[row].index_fill_(0, where, 0.0)
        self.faults.index_fill_(0, where, 0.0)
        self.previous_loss.index_fill_(0, where, 0.0)

    def reset(self) -> None:
        """Forget all statistics; how often to observe stays."""
        every = self.accumulated[EVERY].clone()
        self.accumulated.zero_()
        self.accumulated[EVERY] = every
        self.faults.zero_()
        self.previous_loss.zero_()
        self.forget_gradients()


def _adding_to(total: Tensor, values: Tensor) -> Tensor:
    """Return a leaf of these values whose gradient accumulates in ``total``."""
    leaf = values.requires_grad_()
    leaf.grad = total  # AccumulateGrad adds in place to a gradient that is there,

    def keep(leaf: Tensor) -> None:
        if leaf.grad is not None and leaf.grad is not total:
            total.copy_(leaf.grad.detach())
            leaf.grad = total

    leaf.register_post_accumulate_grad_hook(keep)  # but not under create_graph
    return leaf
