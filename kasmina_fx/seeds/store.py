"""All tensors that the seeds add to a layer, in one module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.banks.bank import Bank
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.bases.host import Host
from kasmina_fx.chunk_manager import ChunkManager
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.lifecycle import holds_blueprint, roles
from kasmina_fx.physical.graph_inputs import SHOWN, GraphInputs, LayerTables
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.seeds.extra_state import packed, unpacked
from kasmina_fx.seeds.folded import Folded
from kasmina_fx.seeds.off import Off
from kasmina_fx.seeds.packs import LayerPacks
from kasmina_fx.seeds.registered import Registered, seal
from kasmina_fx.seeds.siblings import Siblings
from kasmina_fx.seeds.telemetry import Telemetry
from kasmina_fx.state_tensor import StateTensor
from kasmina_fx.transactions.buffers import Float32Module, to_device

#: Of the entries in a state dict; a checkpoint of another version is refused.
LAYOUT_VERSION: Final = 3
_KEYS: Final = count()


class SeedStore(Float32Module):
    """State, telemetry and banks of a layer, under the one name ``kasmina`` in its state dict.

    Attributes:
        shown: What the next forward reads.
        registered: The registered tensors that it was derived from.
        seal: int64 ``()``, a buffer: see :func:`kasmina_fx.seeds.registered.seal`; ``sealed`` is
            the same number.
        stages, ids: Of the seeds that forwards see, int ``(S,)`` on the CPU.
        folded: What it runs in evaluation while its model is finished.
        off: Seeds that forwards see as DORMANT, for a while.
        takes_part: Forwards read its banks: a seed of it has grown, or see ``Siblings``.
        packs: Sets of its seeds that are put away.
        observed: Forwards keep statistics, of the first of ``one_in`` equal parts of a batch and at
            most ``rows_seen`` rows of it (0: all); ``in_eval``: those in evaluation too.
    """

    seal: Tensor
    grad_norm: Tensor
    reference_weight: Tensor | None
    shown: GraphInputs
    registered: Registered
    stages: Tensor
    ids: Tensor
    folded: Folded | None
    observed: bool
    takes_part = False  # of pickled ones, too, that knew no such thing
    one_in: int
    rows_seen: int
    in_eval: bool

    def __init__(self, chunks: ChunkManager, host: Host, name: str, config: SeedConfig) -> None:
        super().__init__()
        like = host.like
        device = torch.device("cpu") if like is None else like.device
        self.chunks, self.host, self.name, self.config = chunks, host, name, config
        self.siblings: Siblings[SeedStore] = Siblings()
        self.state = StateTensor(
            chunks.num_chunks, device, name=name, embargo_epochs=config.embargo_epochs
        )
        self.telemetry = Telemetry(chunks.num_chunks, device)
        self.pads, self.off, self.packs = bool(config.pad), Off(), LayerPacks()
        self.banks = nn.ModuleDict()
        one = torch.ones((), dtype=torch.float32, device=device)
        idle = torch.zeros(chunks.num_chunks, dtype=torch.int64, device=device)
        # No buffers: what is derived is nobody's to load, average or broadcast.
        self.roles, self.loss_scale = idle, one
        self.register_buffer("seal", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("grad_norm", -one)
        self.register_buffer("reference_weight", None)  # the host's, at the last step of a ramp
        self.layout: ChunkLayout = chunks.layout
        self.layout_text = str(chunks.layout)  # as markers carry it
        self.key: str | None = None  # of what it shows, where Dynamo reaches that by a global
        self.observe(True)
        self.misses_entries = False  # in a state dict that is being loaded, which has others'
        self.ramp_steps = 0  # made after steps of optimizers
        #: Rows of the state tensor, and the strategies that seeds in GRAFTING have in them.
        self.ramps_of: tuple[Tensor, tuple[int, ...]] | None = None
        self.highest_id = 0  # blueprint ids up to here were given out
        self.blueprints: dict[int, str] = {}  # ids whose parameters are shared, and their names

    @property
    def num_seeds(self) -> int:
        """Seeds of the layer."""
        return self.chunks.num_chunks

    def stacks(self) -> list[StackedParameter]:
        """The registered stacks of all banks, in order."""
        return [stack for bank in self.bank_list() for stack in bank.tensors()]

    def shown_stacks(self) -> list[StackedParameter]:
        """Those of them that forwards read."""
        return self.stacks() if self.takes_part else []

    def bank_of(self, seed_id: int) -> tuple[Bank, int] | None:
        """The bank and slot that hold a seed's blueprint, or None."""
        blueprint_id = self.state.blueprint_ids[seed_id : seed_id + 1]
        if not bool(holds_blueprint(self.state.stages[seed_id : seed_id + 1])):
            return None
        for bank in self.bank_list():
            run = bank.run
            if run.first_seed <= seed_id < run.first_seed + run.count:
                slot = int(bank.slot_of(blueprint_id))
                if slot >= 0:
                    return bank, slot
        return None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside become visible at once, at the end; an exception undoes them all."""
        with self.state.transaction():
            before = {bank: bank.held for bank in self.bank_list()}
            try:
                yield
            except BaseException:
                for bank in self.bank_list():  # some of them newer than the transaction
                    bank.give_back(before.get(bank, bank.held[:0]))
                if not self.shown.shows(self.shown_stacks()):  # they grew, and stay as large
                    with self.siblings.threads.forwards.publication():
                        self.publish_stacks()
                raise

    def bank_list(self) -> list[Bank]:
        """The banks in the order in which graphs name them."""
        return list(self.banks.values())  # type: ignore[arg-type]  # holds nothing but banks

    def has_bank(self, kind: str, shared: bool) -> bool:
        """Say whether there is a bank for the blueprint."""
        return any((b.spec.kind, b.spec.shared) == (kind, shared) for b in self.bank_list())

    def take_ids(self, count: int) -> Tensor:
        """Blueprint ids that nothing uses or has used, int64 ``(count,)``."""
        used = [self.highest_id, int(self.state.blueprint_ids.max()), *self.blueprints]
        used += [int(bank.held.max()) for bank in self.bank_list()]
        self.highest_id = max(used) + count
        return torch.arange(count, device="cpu") + max(used) + 1

    def join(self, siblings: Siblings[SeedStore]) -> None:
        """Share the siblings' locks and loss scale from now on, and start to grow with them."""
        self.siblings, self.state.threads = siblings, siblings.threads
        siblings.add(self)

    def publish(self, tables_changed: bool = True) -> None:
        """Make the state that is on the host now what every later forward reads.

        Args:
            tables_changed: False where only alphas did.
        """
        if not tables_changed:
            self._show(self.shown.with_alpha(self.state.alpha))
            return
        self.state.on_publish = weakref.WeakMethod(self.publish)
        self.join(self.siblings)
        self._derive()
        if not self.takes_part and any(bool(bank.held.any()) for bank in self.bank_list()):
            self.siblings.let_grow(self)
        self.publish_stacks()

    def publish_stacks(self) -> None:
        """Show forwards the banks and stacks that are registered, in the last published state."""
        if len(self.banks):
            GROWING.add(self)
        for bank in self.bank_list():
            bank.owner, bank.training_loop = weakref.ref(self), self.siblings.training
        self._show(self._inputs(self.telemetry.probe(), self.scale(), self.telemetry.sensing()))

    def registered_inputs(self) -> GraphInputs:
        """What an exported graph reads: registered tensors alone."""
        return self._inputs(self.telemetry.faults, self.loss_scale)

    def _inputs(self, faults: Tensor, loss_scale: Tensor, *squares: Tensor | None) -> GraphInputs:
        banks = self.bank_list() if self.takes_part else []
        specs, tables = [bank.spec for bank in banks], [bank.tables() for bank in banks]
        layer = LayerTables(self.state.alpha, self.roles, faults, loss_scale)
        return GraphInputs(layer, specs, tables, self.shown_stacks(), *squares)

    def _show(self, inputs: GraphInputs) -> None:
        state = [(self.state, "state_tensor"), (self.state, "alpha"), (self, "seal")]
        self.shown, self.registered = inputs, Registered(state, self.bank_list())
        self.folded = None
        self.siblings.folding.forget()
        if self.key is not None:
            SHOWN[self.key] = inputs

    def show_by_key(self) -> None:
        """Let Dynamo reach what is shown through a global, see :data:`SHOWN`."""
        self.key = f"{self.name}#{next(_KEYS)}"
        SHOWN[self.key] = self.shown
        weakref.finalize(self, SHOWN.pop, self.key, None)

    def observe(self, policy: bool | TelemetryPolicy) -> None:
        """Keep statistics of every step (True), none (False), or as a policy says.

        Raises:
            InvalidArgument: Neither a bool nor a policy.
        """
        if not isinstance(policy, (bool, TelemetryPolicy)):
            raise InvalidArgument(f"telemetry={shown(policy)}: give a bool or a TelemetryPolicy")
        chosen = policy if isinstance(policy, TelemetryPolicy) else TelemetryPolicy()
        self.observed, self.one_in = policy is not False, chosen.one_in
        self.rows_seen, self.in_eval = chosen.rows or 0, chosen.in_eval
        self.telemetry.observe_every(chosen.every)
        self.telemetry.sense(chosen.gradients)

    def scale(self) -> Tensor:
        """What multiplies the gradient of reconstruction losses, float32 ``()``."""
        return self.siblings.loss_scale.tensor(self.loss_scale)

    def reload(self) -> None:
        """Take the host's tables from the registered tensors: after these were loaded."""
        self.state.refresh_mirror()
        for bank in self.bank_list():
            bank.held = bank.slots.detach().cpu().clone()
            bank.forget()
        self.publish()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is shown: it is derived again."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {k: v for k, v in state.items() if k not in ("shown", "registered", "folded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's, unannotated
        by_key, self.key = self.key is not None, None
        self.publish()
        if by_key:
            self.show_by_key()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeedStore:
        super()._apply(fn, recurse)
        self.packs.apply(fn)
        self.publish()  # .to() replaced tensors
        return self

    @torch.inference_mode(False)
    def _derive(self) -> None:
        """Derive the layer's and every bank's tables from the state."""
        device = self.state.alpha.device
        self.stages = stages = self.off.shown(self.state.stages)
        self.roles = to_device(roles(stages), device)
        if self.loss_scale.device != device:
            self.loss_scale = torch.ones((), dtype=torch.float32, device=device)
        self.ids = ids = self.state.blueprint_ids
        for bank in self.bank_list():
            seeds, shown = bank.run.seeds, stages[bank.run.seeds] if self.off else None
            bank.publish(ids[seeds], self.state.stages[seeds], self.pads, shown)
        self.sealed = self.own_seal()
        self.seal = to_device(torch.tensor(self.sealed, device="cpu"), device)

    def derived(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the tables that graphs read and nobody registers, with their names."""
        yield from (("roles", self.roles), ("loss_scale", self.loss_scale))
        for bank in self.bank_list():
            for name, table in bank.tables()._asdict().items():
                yield f"banks.{bank.key}.{name}", table

    def own_seal(self) -> int:
        """The seal of what the host knows."""
        return seal(self.state.rows, {bank.key: bank.held for bank in self.bank_list()})

    def get_extra_state(self) -> Tensor:
        """What other tensors can't say: the layout, the shared blueprints and the banks."""
        extra: dict[str, Any] = {
            "version": LAYOUT_VERSION,
            "layout": str(self.layout),
            "highest_id": self.highest_id,
            "blueprints": dict(self.blueprints),
            "banks": {key: str(bank.spec) for key, bank in self.banks.items()},
        }
        if self.packs.kept:
            extra["packs"] = self.packs.described()
        return packed(extra)

    def set_extra_state(self, given: Any) -> None:
        """Take ids and shared blueprints; the rest was read before anything was loaded."""
        state = unpacked(given)
        self.highest_id = state["highest_id"]
        self.blueprints = {int(number): str(kind) for number, kind in state["blueprints"].items()}


#: The stores of this process that have a bank.
GROWING: Final[weakref.WeakSet[SeedStore]] = weakref.WeakSet()
