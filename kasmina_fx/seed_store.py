"""All tensors that the seeds add to a layer, in one module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.bank import Bank
from kasmina_fx.chunk_manager import ChunkManager
from kasmina_fx.colony import Colony
from kasmina_fx.config import SeedConfig
from kasmina_fx.float32_module import Float32Module
from kasmina_fx.gate import GATE
from kasmina_fx.host import Host
from kasmina_fx.layout import ChunkLayout
from kasmina_fx.lifecycle import holds_blueprint, roles
from kasmina_fx.published import Published
from kasmina_fx.stack import StackedParameter
from kasmina_fx.state_tensor import StateTensor
from kasmina_fx.tables import LayerTables
from kasmina_fx.telemetry import Telemetry
from kasmina_fx.transfer import to_device

#: Of the entries in a state dict; a checkpoint of another version is refused.
LAYOUT_VERSION: Final = 3


class SeedStore(Float32Module):
    """State, telemetry and banks of a layer, under the one name ``kasmina`` in its state dict."""

    roles: Tensor
    loss_scale: Tensor
    grad_norm: Tensor
    reference_weight: Tensor | None

    def __init__(self, chunks: ChunkManager, host: Host, name: str, config: SeedConfig) -> None:
        super().__init__()
        like = host.like
        device = torch.device("cpu") if like is None else like.device
        self.chunks, self.host, self.name, self.config = chunks, host, name, config
        self.colony: Colony[SeedStore] = Colony()
        self.on_publish: Callable[[Published], None] | None = None  # the layer that shows it
        self.state = StateTensor(
            chunks.num_chunks, device, name=name, embargo_epochs=config.embargo_epochs
        )
        self.telemetry = Telemetry(chunks.num_chunks, device)
        self.pads = bool(config.pad)
        self.banks = nn.ModuleDict()
        one = torch.ones((), dtype=torch.float32, device=device)
        idle = torch.zeros(chunks.num_chunks, dtype=torch.int64, device=device)
        self.register_buffer("roles", idle, persistent=False)
        self.register_buffer("loss_scale", one, persistent=False)
        self.register_buffer("grad_norm", -one)
        self.register_buffer("reference_weight", None)  # the host's, at the last step of a ramp
        self.layout: ChunkLayout = chunks.layout
        self.misses_entries = False  # in a state dict that is being loaded, which has others'
        self.highest_id = 0  # blueprint ids up to here were given out
        self.blueprints: dict[int, str] = {}  # ids whose parameters are shared, and their names

    @property
    def num_seeds(self) -> int:
        """Seeds of the layer."""
        return self.chunks.num_chunks

    def stacks(self) -> list[StackedParameter]:
        """The registered stacks of all banks, in order."""
        return [stack for bank in self.bank_list() for stack in bank.tensors()]

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
                if not self._published.shows(self.stacks()):  # they grew, and stay as large
                    with GATE.publication():
                        self.publish_stacks()
                raise

    def bank_list(self) -> list[Bank]:
        """The banks in the order in which graphs name them."""
        return list(self.banks.values())  # type: ignore[arg-type]  # holds nothing but banks

    def has_bank(self, kind: str, shared: bool) -> bool:
        """Is there a bank for the blueprint?"""
        return any((b.spec.kind, b.spec.shared) == (kind, shared) for b in self.bank_list())

    def take_ids(self, count: int) -> Tensor:
        """Blueprint ids that nothing uses or has used, int64 ``(count,)``."""
        used = [self.highest_id, int(self.state.blueprint_ids.max()), *self.blueprints]
        used += [int(bank.held.max()) for bank in self.bank_list()]
        self.highest_id = max(used) + count
        return torch.arange(count, device="cpu") + max(used) + 1

    def publish(self, tables_changed: bool = True) -> None:
        """Make the state that is on the host now what every later forward reads.

        Args:
            tables_changed: False where only alphas did.
        """
        if not tables_changed:
            self._show(self._published.with_alpha(self.state.alpha))
            return
        self.state.on_publish = self.publish
        self.colony.add(self)
        self._derive()
        self.publish_stacks()

    def publish_stacks(self) -> None:
        """Show forwards the banks and stacks that are registered, in the last published state."""
        for bank in self.bank_list():
            bank.owner, bank.training_loop = weakref.ref(self), self.colony.training
        self._show(self.read_by_graph(self.telemetry.probe(), self.scale()))

    def read_by_graph(self, faults: Tensor, loss_scale: Tensor) -> Published:
        """What a graph reads of the layer now."""
        banks = self.bank_list()
        specs, tables = [bank.spec for bank in banks], [bank.tables() for bank in banks]
        layer = LayerTables(self.state.alpha, self.roles, faults, loss_scale)
        return Published(layer, specs, tables, self.stacks())

    def _show(self, published: Published) -> None:
        self._published = published
        if self.on_publish is not None:
            self.on_publish(published)

    def scale(self) -> Tensor:
        """What multiplies the gradient of reconstruction losses, float32 ``()``."""
        return self.colony.loss_scale(self.loss_scale)

    def reload(self) -> None:
        """Take the host's tables from the registered tensors: after these were loaded."""
        self.state.refresh_mirror()
        for bank in self.bank_list():
            bank.held = bank.slots.detach().cpu().clone()
            bank.forget()
        if bool(self.state.holding.any()):
            self.colony.find_scaler()
        self.publish()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was published, and to whom: derived, and connected again."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_published", None)
        return state | {"on_publish": None}

    @torch.inference_mode(False)
    def _derive(self) -> None:
        """Derive the layer's and every bank's tables from the state."""
        self.roles = to_device(roles(self.state.stages), self.roles.device)
        stages, ids = self.state.stages, self.state.blueprint_ids
        for bank in self.bank_list():
            seeds = slice(bank.run.first_seed, bank.run.first_seed + bank.run.count)
            bank.publish(ids[seeds], stages[seeds], self.pads)

    def get_extra_state(self) -> dict[str, Any]:
        """What tensors can't say: the layout, the shared blueprints and the banks."""
        return {
            "version": LAYOUT_VERSION,
            "layout": str(self.layout),
            "highest_id": self.highest_id,
            "blueprints": dict(self.blueprints),
            "banks": {key: str(bank.spec) for key, bank in self.banks.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take ids and shared blueprints; the rest was read before anything was loaded."""
        self.highest_id = state["highest_id"]
        self.blueprints = {int(number): str(kind) for number, kind in state["blueprints"].items()}
