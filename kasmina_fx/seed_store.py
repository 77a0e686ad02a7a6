"""All tensors that the seeds add to a layer, in one module."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.bank import Bank
from kasmina_fx.chunk_manager import ChunkManager
from kasmina_fx.config import SeedConfig
from kasmina_fx.float32_module import Float32Module
from kasmina_fx.layout import ChunkLayout
from kasmina_fx.lifecycle import roles
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

    def __init__(
        self, chunks: ChunkManager, device: torch.device, name: str, config: SeedConfig
    ) -> None:
        super().__init__()
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

    def layer_tables(self, faults: Tensor, loss_scale: Tensor) -> LayerTables:
        """What the graph reads of the layer as a whole."""
        return LayerTables(self.state.alpha, self.roles, faults, loss_scale)

    @torch.inference_mode(False)
    def publish(self) -> None:
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
