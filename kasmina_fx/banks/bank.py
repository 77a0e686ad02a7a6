"""A bank: all blueprints of one class for the chunks of one run, stacked.

Each *slot* of a bank holds one set of blueprint parameters; the table ``slots`` says whose, by
blueprint id. What the graph reads (``BankTables``) is derived from that
table and the state tensor, on the host, and published as new tensors.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx._torch.dynamo import mark_dynamic
from kasmina_fx.banks.accumulation import watch
from kasmina_fx.banks.placement import SMALLEST, Placement, derive, slots_of, with_some_off
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.blueprints import Blueprint, lookup
from kasmina_fx.blueprints.base import own_random_numbers
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.lifecycle import Mode
from kasmina_fx.physical.graph_inputs import BankTables
from kasmina_fx.physical.layout import BankSpec, Run
from kasmina_fx.transactions.buffers import to_device
from kasmina_fx.transactions.threads import Training


class Bank(nn.Module):
    """Stacked parameters of one blueprint class, and who sits in which slot.

    Args:
        kind: Name of the blueprint.
        run_index: Which run of the layer, and ``run`` itself.
        shared: One set of parameters for all seeds with the same id (else every id has one seed).
        capacity: Slots to start with.
        dtype: Of the parameters.
        device: Of all tensors.
    """

    slots: Tensor

    def __init__(
        self,
        kind: str,
        run_index: int,
        run: Run,
        *,
        shared: bool,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.blueprint: Blueprint = lookup(kind)
        self.run, self._dtype = run, dtype
        self.tensor_specs = self.blueprint.specs(run.size)
        self.spec = BankSpec(kind, run_index, shared, len(self.tensor_specs))
        self.held = torch.zeros(0, dtype=torch.int64, device="cpu")  # the host's copy of ``slots``
        self.register_buffer("slots", torch.zeros(0, dtype=torch.int64, device=device))
        # No buffers: what is derived is nobody's to load, average or broadcast.
        empty = torch.empty(0, dtype=torch.int64, device=device)
        self.seeds = self.positions = self.modes = self.trainees = self.order = empty
        self.reconstructing = empty  # slots that learn from their reconstruction loss alone
        self.frozen_slots = empty  # slots whose parameters nothing may change
        self._froze = self.held  # ids of blueprints that nothing might change, when last published
        self.left: set[int] = set()  # slots that seeds let go of since an optimizer's last step
        self.owner: weakref.ref[nn.Module] | None = None  # whose it is; set by its publish()
        self.training_loop = Training()  # the owner's, likewise
        self.grow(capacity)
        self.publish(*torch.zeros(2, run.count, dtype=torch.int64, device="cpu"))

    @property
    def capacity(self) -> int:
        """Slots allocated."""
        return len(self.held)

    @property
    def key(self) -> str:
        """Name in its layer: ``mlp_run0``, ``mlp_shared_run0``."""
        return bank_key(self.spec)

    def tensors(self) -> list[StackedParameter]:
        """The registered stacks, in the order of the blueprint's specs.

        Raises:
            InvalidArgument: Somebody has parametrized, pruned or removed one.
        """
        if len(self._parameters) != len(self.tensor_specs):
            names = {registered_name(spec.name) for spec in self.tensor_specs}
            raise InvalidArgument(
                f"the bank {self.key} lacks its parameters {sorted(names - set(self._parameters))}:"
                " stacks can't be parametrized, pruned or removed; give the blueprint's own module "
                "the parametrization"
            )
        return list(self._parameters.values())  # type: ignore[arg-type]  # grow() sets no None

    @torch.inference_mode(False)  # or what an evaluation grows could never train
    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` slots; old slots keep their values, new ones are zero.

        The stacks become new Parameter objects, to which optimizers are carried over. A backward
        still to run keeps the old ones.
        """
        device, used = self.slots.device, self.capacity
        for spec in self.tensor_specs:
            name = registered_name(spec.name)
            old = self._parameters.get(name)
            dtype = spec.dtype or (self._dtype if old is None else old.dtype)
            fresh = torch.zeros(capacity, *spec.shape, dtype=dtype, device=device)
            if old is not None:
                fresh[:used] = old.detach()
            trains = spec.trainable if old is None else old.requires_grad
            stack = StackedParameter(fresh, requires_grad=trains)
            if isinstance(old, StackedParameter):
                old.hand_over(stack, self.trained_elsewhere)
            self.register_parameter(name, stack)
        held = torch.zeros(capacity, dtype=torch.int64, device="cpu")
        slots = torch.zeros(capacity, dtype=torch.int64, device=device)
        held[:used], slots[:used] = self.held, self.slots[:used]
        self.held, self.slots, self.left = held, slots, set()
        self.mark()

    @torch.inference_mode(False)
    def acquire(self, ids: Tensor, name: str = "") -> None:
        """Give each blueprint id (int64 ``(n,)``) a free slot with fresh parameters.

        ``name``, of the layer, is one of the things that say what values they get.
        """
        if not len(ids):
            return
        free = self._free()
        if len(free) < len(ids):
            room = self.capacity
            while room < int((self.held > 0).sum()) + len(ids):
                room *= 2
            self.grow(room)
            free = self._free()
        taken = free[: len(ids)]
        self.held = self.held.index_put((taken,), ids)  # a transaction may need the old table
        with own_random_numbers(name, self.spec.run, ids.tolist()):
            fresh = self.blueprint.initial(self.run.size, len(ids))
        for stack, values in zip(self.tensors(), fresh, strict=True):
            stack.write_rows(taken, to_device(values.to(stack.dtype), stack.device))
        self.restart(taken)

    def restart(self, slots: Tensor) -> None:
        """Slots (int64 on the CPU) start anew: no gradient, and no state in optimizers."""
        given = frozenset(slots.tolist())
        for stack in self.tensors():
            stack.restart(given, self.trained_elsewhere)

    def forget(self) -> None:
        """What was frozen before says nothing of what was loaded."""
        self._froze = self.held[:0]

    def _free(self) -> Tensor:
        """Slots to give away, int64 ``(n,)``: no backward still to run reads them."""
        free = self.held == 0
        if self.awaits_backward:
            free[list(self.left)] = False
        return free.nonzero().flatten()

    @property
    def awaits_backward(self) -> bool:
        """Whether a backward may still be to run, of a forward that was compiled."""
        return self.training_loop.awaits_backward

    @property
    def trained_elsewhere(self) -> bool:
        """Whether another thread trains the layer."""
        return self.training_loop.elsewhere()

    def give_back(self, held: Tensor) -> None:
        """Undo what was acquired since the table was ``held``; the stacks stay as large."""
        self.held = nn.functional.pad(held, (0, self.capacity - len(held)))

    def slot_of(self, blueprint_ids: Tensor) -> Tensor:
        """Slot of each blueprint id, -1 where the bank holds none: int64 ``(n,)`` on the CPU."""
        return slots_of(blueprint_ids, self.held)

    @torch.inference_mode(False)
    def publish(
        self, blueprint_ids: Tensor, stages: Tensor, pad: bool = False, shown: Tensor | None = None
    ) -> None:
        """Show what the run's seeds, ``(n,)``, are now; slots that they let go of are free.

        ``pad``: as of :class:`~kasmina_fx.SeedConfig`. ``shown``: the stages that forwards are to
        see, if they are others.
        """
        now = self.placement(blueprint_ids, stages, self.held, pad)
        if shown is not None:
            now = with_some_off(now, self.placement(blueprint_ids, shown, now.held, pad))
        self.held, self.left = now.held, self.left | now.left
        if len(now.starts):  # momentum and weight decay went on while it waited to train
            self.restart(now.starts)
        self._froze = now.froze
        self.trained = ((self.held > 0) & ~now.frozen).nonzero().flatten()  # slots, on the CPU
        device = self.slots.device
        self.slots = to_device(self.held, device)
        alone = (now.tables.modes == Mode.RECONSTRUCTS).any(1)
        alone &= (now.tables.modes != Mode.LEARNS).all(1)
        self.reconstructing = to_device(alone.nonzero().flatten(), device)
        self.frozen_slots = to_device(now.frozen.nonzero().flatten(), device)
        for name, table in now.tables._asdict().items():
            setattr(self, name, to_device(table, device))
        self.mark()

    def placement(
        self, blueprint_ids: Tensor, stages: Tensor, held: Tensor, pad: bool = False
    ) -> Placement:
        """Derive what the bank would be for such seeds and slots; changes nothing."""
        shared, froze, size = self.spec.shared, self._froze, self.run.size
        return derive(blueprint_ids, stages, held, shared=shared, froze=froze, pad=pad, size=size)

    def tables(self) -> BankTables:
        """What the graph reads."""
        return BankTables(self.seeds, self.positions, self.modes, self.trainees, self.order)

    def mark(self) -> None:
        """Tell Dynamo which dimensions change as a layer grows."""
        if self.capacity >= SMALLEST:
            for stack in self.tensors():
                mark_dynamic(stack, 0)
        for stack in self.tensors():
            if isinstance(stack, StackedParameter):
                watch(stack, stack.requires_grad and len(self.reconstructing) > 0)
                stack.bank = weakref.ref(self)
        for table in (self.seeds, self.modes, self.trainees, self.order):
            for dim, size in enumerate(table.shape):
                if size >= SMALLEST:
                    mark_dynamic(table, dim)

    def extra_repr(self) -> str:
        """Class, run and slots in use."""
        return f"{self.spec}, {int((self.held > 0).sum())} of {self.capacity} slots in use"

    def slot_tensors(self, slot: int) -> dict[str, Tensor]:
        """Views of one slot's parameters and buffers, named as in ``blueprint.module(size)``."""
        return {
            spec.name: stack[slot]
            for spec, stack in zip(self.tensor_specs, self.tensors(), strict=True)
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint may hold more or fewer slots than are allocated here: take its capacity.
        before = dict(self._parameters)
        slots = state_dict.get(prefix + "slots")
        if slots is not None and len(slots) != self.capacity:
            self.held = self.held[:0]
            for stack in self.tensors():
                if stack.is_floating_point():
                    self._dtype = stack.dtype  # .to() may have changed it since
            for name in list(self._parameters):
                del self._parameters[name]
            self.grow(len(slots))
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, loaded in list(self._parameters.items()):
            if loaded is not None and not isinstance(loaded, StackedParameter):  # assign=True
                self._parameters[name] = StackedParameter(loaded.detach(), loaded.requires_grad)
        for name, now in self._parameters.items():
            old = before.get(name)
            if isinstance(now, StackedParameter):
                if isinstance(old, StackedParameter) and old is not now:
                    old.hand_over(now)
                now.fresh, now.late = frozenset(), ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the owner out, which connects again."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's, unannotated
        return state | {"owner": None, "training_loop": Training()}


def bank_key(spec: BankSpec) -> str:
    """Name of a bank in its layer."""
    return f"{spec.kind}{'_shared' if spec.shared else ''}_run{spec.run}"


def registered_name(name: str) -> str:
    """Name a stack in its bank, after the tensor's name in the blueprint's module."""
    # A parameter's name can't contain a dot; '/' reads the same and can't occur in one.
    return f"/{name}" if name in _ATTRIBUTES else name.replace(".", "/")


#: What a bank has beside its stacks: a tensor of a user's module may have any of these names.
_ATTRIBUTES: Final = frozenset(
    {
        *vars(Bank),
        *BankTables._fields,
        *("blueprint", "run", "tensor_specs", "spec", "held", "slots", "left", "owner", "trained"),
        *("reconstructing", "frozen_slots", "training_loop", "_dtype", "_froze"),
    }
)


def bank_of(stack: StackedParameter) -> Bank | None:
    """The bank that holds a stack; None once a larger stack has taken its place."""
    return None if stack.bank is None else stack.bank()
