"""What a graph reads of a layer's seeds: tables, and the banks' stacked parameters.

All of it is tensor data that host code replaces as a whole: nothing here is compiled in.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from torch import Tensor

from kasmina_fx._torch.tracing import same_size, size_of
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.physical.layout import BankSpec, Run, format_banks, parse_banks


class LayerTables(NamedTuple):
    """The tables of a layer.

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
        """Return the tables of a run's seeds."""
        if run.count == size_of(self.alpha, 0):
            return self
        first, count = run.first_seed, run.count
        alpha, roles, faults = (t.narrow(0, first, count) for t in self[:3])
        return LayerTables(alpha, roles, faults, self.loss_scale)


class BankTables(NamedTuple):
    """The tables of a bank.

    ``seeds`` int64 ``(K, M)``: which seed of the run sits at slot k, place m, -1 for none.
    ``positions`` int64 ``(n,)``: the inverse, ``k * M + m`` or -1. ``modes`` int64 ``(K, M)``: the
    :class:`~kasmina_fx.lifecycle.Mode` of the seed there. ``trainees`` int64 ``(T,)``: the places
    of seeds in TRAINING, padded with -1. ``order`` int64 ``(Q,)``: the places of all seeds that
    run, in the order of their chunks, padded with -1 to a multiple of
    :func:`~kasmina_fx.physical.layout.together`.
    """

    seeds: Tensor
    positions: Tensor
    modes: Tensor
    trainees: Tensor
    order: Tensor


#: Rows of a blend's second output, float32 ``(NOTES, S)``: was the blueprint rejected (1), its mean
#: squared difference from its chunk (:data:`NO_LOSS` where it did not run), and the mean square of
#: what it added to the output.
NOTES: Final = 3
NOTE_REJECTED: Final = 0
NOTE_LOSS: Final = 1
NOTE_DELTA: Final = 2
NO_LOSS: Final = -1.0


class BlendArguments(NamedTuple):
    """Holds what ``kasmina::blend`` takes: its fields are the operator's schema, in order.

    ``y``: floating point, any shape, the layout's features along its feature dim. ``layer``: the
    tensors of :class:`LayerTables`; empty if there is no bank. ``seeds``, ``positions``, ``modes``,
    ``trainees``, ``order``: one each a bank, as in :class:`BankTables`. ``params``: the banks'
    stacked tensors in a row, each ``(capacity >= K, ...)``. ``chunks``: ``str(ChunkLayout)``.
    ``banks``: ``format_banks(...)``.
    """

    y: Tensor
    layer: Sequence[Tensor]
    seeds: Sequence[Tensor]
    positions: Sequence[Tensor]
    modes: Sequence[Tensor]
    trainees: Sequence[Tensor]
    order: Sequence[Tensor]
    params: Sequence[Tensor]
    chunks: str
    banks: str

    def tensors(self) -> list[Tensor]:
        """Return all tensors in one row."""
        return [self.y, *(t for name in LISTS for t in getattr(self, name))]

    def share_sizes(self) -> None:
        """Tell a tracer which sizes are one number: each symbol is an input of a graph, and read.

        Raises:
            RuntimeError: Tables or stacks of one bank differ in size.
        """
        for _, tables, params in self.bank_inputs():
            for a, b in zip(tables.seeds.shape, tables.modes.shape, strict=True):
                same_size(a, b)
            for stack in params[1:]:
                same_size(stack.shape[0], params[0].shape[0])

    def bank_inputs(self) -> list[BankInputs]:
        """Return the specs, tables and parameters of each bank."""
        found, first = [], 0
        tables = zip(*(getattr(self, name) for name in BankTables._fields), strict=True)
        for spec, of_bank in zip(parse_banks(self.banks), tables, strict=True):
            params = self.params[first : first + spec.num_params]
            found.append(BankInputs(spec, BankTables(*of_bank), params))
            first += spec.num_params
        return found


class BankInputs(NamedTuple):
    """Holds what a graph reads of one bank."""

    spec: BankSpec
    tables: BankTables
    params: Sequence[Tensor]


#: The fields of :class:`BlendArguments` that hold tables, and with ``params`` all that hold lists.
TABLES: Final = ("layer", "seeds", "positions", "modes", "trainees", "order")
LISTS: Final = (*TABLES, "params")


class GraphInputs:
    """A layer's tables at one moment: replaced whole, so that none sees half a change.

    A plain object, because Dynamo (torch 2.11 to 2.13) forces the shapes of whatever it reaches as
    a module's parameter or buffer to be static.

    Attributes:
        banks: The banks as markers name them; ``banks_in_eval``: those of a layer in evaluation.
        layer: As of :class:`BlendArguments`; so are ``seeds``, ``positions``, ``modes``,
            ``trainees``, ``order`` and ``params``.
        gradients: Where the gradients of the layer's output are looked at, ``squares`` and
            ``loss_scale`` of :mod:`kasmina_fx.physical.sense`; else empty.
    """

    def __init__(
        self,
        layer: LayerTables,
        specs: Sequence[BankSpec],
        tables: Sequence[BankTables],
        params: Sequence[Tensor],
        squares: Tensor | None = None,
    ) -> None:
        self.banks = format_banks(specs)
        # The same text where no blueprint cares: then nothing is compiled anew.
        self.banks_in_eval = format_banks([spec_in_eval(spec) for spec in specs])
        self.layer = list(layer) if specs else []
        self.seeds = [bank.seeds for bank in tables]
        self.positions = [bank.positions for bank in tables]
        self.modes = [bank.modes for bank in tables]
        self.trainees = [bank.trainees for bank in tables]
        self.order = [bank.order for bank in tables]
        self.params: list[Tensor] = list(params)
        # A tensor of its own: blends share no input with a host.
        self.gradients = [] if squares is None else [squares, layer.loss_scale.data.view(())]

    def blend_arguments(self, y: Tensor, chunks: str, training: bool) -> BlendArguments:
        """Return what a blend of ``y`` takes."""
        banks = self.banks if training else self.banks_in_eval
        return BlendArguments(
            y,
            self.layer,
            self.seeds,
            self.positions,
            self.modes,
            self.trainees,
            self.order,
            self.params,
            chunks,
            banks,
        )

    def shows(self, params: Sequence[Tensor]) -> bool:
        """Say whether the stacks are those that are registered now."""
        same = map(operator.is_, self.params, params)
        return len(self.params) == len(params) and all(same)

    def with_alpha(self, alpha: Tensor) -> GraphInputs:
        """Return the same tables with other alphas."""
        changed = GraphInputs.__new__(GraphInputs)
        changed.__dict__.update(self.__dict__)
        if self.layer:
            changed.layer = [alpha, *self.layer[1:]]
        return changed

    def with_params(self, params: Sequence[Tensor]) -> GraphInputs:
        """Return the same tables with the parameters that are registered now."""
        changed = GraphInputs.__new__(GraphInputs)
        changed.__dict__.update(self.__dict__)
        changed.params = list(params)
        return changed


#: Inputs that Dynamo has to reach by a key, and not through their layer. Below a module of torch's
#: own (``nn.TransformerEncoderLayer``), whatever it reaches through attributes has static shapes
#: (LOCAL_UNSPECIALIZED_BUILTIN_NN_MODULE, torch 2.11 to 2.13). Each key is compiled in, so that
#: models of one class share no compiled code: layers elsewhere are not here.
SHOWN: Final[dict[str, GraphInputs]] = {}

_TABLE_SOURCE: Final = re.compile(
    rf"(\.shown|\bSHOWN\[[^\]]+\]|\.groups\[\d+\]\[1\])\.({'|'.join(TABLES)}|gradients)\["
)


def is_table_source(source: str) -> bool:
    """Say whether Dynamo found a table at this source.

    For example at ``L['self']._modules['fc']._modules['kasmina'].shown.seeds[0]``. The names are
    those of :data:`SHOWN`, of the attribute ``shown`` of a layer's store, and of the attributes of
    :class:`GraphInputs`.
    """
    return _TABLE_SOURCE.search(source) is not None


def spec_in_eval(spec: BankSpec) -> BankSpec:
    """Return a bank's spec in evaluation: another if its blueprint behaves differently there."""
    blueprint = lookup(spec.kind)
    return spec if blueprint.in_mode(False) is blueprint else replace(spec, training=False)
