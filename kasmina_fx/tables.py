"""What a blend marker reads beside the layer's output and its banks' parameters.

All of it is tensor data that host code replaces as a whole: nothing here is compiled in.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

from kasmina_fx.layout import Run


class LayerTables(NamedTuple):
    """One of each a layer.

    ``alpha`` float32 ``(S,)``: blend factors. ``roles`` int64 ``(S,)``: the
    :class:`~kasmina_fx.lifecycle.Role` of each seed. ``faults`` float32 ``(S,)``: a leaf whose
    *gradient* counts, for each seed, the steps in which a gradient of its blueprint was NaN or Inf.
    ``loss_scale`` float32 ``()``: what multiplies the gradient of the reconstruction loss.
    """

    alpha: Tensor
    roles: Tensor
    faults: Tensor
    loss_scale: Tensor

    def of(self, run: Run) -> LayerTables:
        """The tables of a run's seeds."""
        if run.count == len(self.alpha):
            return self
        first, count = run.first_seed, run.count
        alpha, roles, faults = (t.narrow(0, first, count) for t in self[:3])
        return LayerTables(alpha, roles, faults, self.loss_scale)


class BankTables(NamedTuple):
    """One of each a bank.

    ``seeds`` int64 ``(K, M)``: which seed of the run sits at slot k, place m, -1 for none.
    ``positions`` int64 ``(n,)``: the inverse, ``k * M + m`` or -1. ``modes`` int64 ``(K, M)``: the
    :class:`~kasmina_fx.lifecycle.Mode` of the seed there. ``trainees`` int64 ``(T,)``: the places
    of seeds in TRAINING, padded with -1.
    """

    seeds: Tensor
    positions: Tensor
    modes: Tensor
    trainees: Tensor


#: Rows of a blend's second output, float32 ``(NOTES, S)``: was the blueprint rejected (1), its mean
#: squared difference from its chunk (:data:`NO_LOSS` where it did not run), and the mean square of
#: what it added to the output.
NOTES: Final = 3
NOTE_REJECTED: Final = 0
NOTE_LOSS: Final = 1
NOTE_DELTA: Final = 2
NO_LOSS: Final = -1.0
