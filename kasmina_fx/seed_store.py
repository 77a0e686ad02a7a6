"""All tensors that the seeds add to a layer, in one module."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from kasmina_fx.bank import Bank
from kasmina_fx.chunk_manager import ChunkManager
from kasmina_fx.layout import ChunkLayout
from kasmina_fx.state_tensor import StateTensor
from kasmina_fx.telemetry import Telemetry

#: Of the entries in a state dict; a checkpoint of another version is refused.
LAYOUT_VERSION: Final = 1


class SeedStore(nn.Module):
    """State, telemetry and banks of a layer, under the one name ``kasmina`` in its state dict."""

    def __init__(self, chunks: ChunkManager, device: torch.device, name: str) -> None:
        super().__init__()
        self.state = StateTensor(chunks.num_chunks, device, name=name)
        self.telemetry = Telemetry(chunks.num_chunks, device)
        self.banks = nn.ModuleDict()
        self.layout: ChunkLayout = chunks.layout
        self.blueprints: dict[int, str] = {}  # ids whose parameters are shared, and their names

    def bank_list(self) -> list[Bank]:
        """The banks in the order in which graphs name them."""
        return list(self.banks.values())  # type: ignore[arg-type]  # holds nothing but banks

    def has_bank(self, kind: str, shared: bool) -> bool:
        """Is there a bank for the blueprint?"""
        return any((b.spec.kind, b.spec.shared) == (kind, shared) for b in self.bank_list())

    def next_id(self) -> int:
        """A blueprint id that nothing uses."""
        used = [int(self.state.blueprint_ids.max()), *self.blueprints]
        used += [int(bank.held.max()) for bank in self.bank_list()]
        return max(used) + 1

    def publish(self) -> None:
        """Derive every bank's tables from the state."""
        state = self.state
        for bank in self.bank_list():
            seeds = slice(bank.run.first_seed, bank.run.first_seed + bank.run.count)
            bank.publish(
                state.blueprint_ids[seeds],
                state.holding[seeds],
                state.blended[seeds],
                state.alphas[seeds],
            )

    def get_extra_state(self) -> dict[str, Any]:
        """What tensors can't say: the layout, the shared blueprints and the banks."""
        return {
            "version": LAYOUT_VERSION,
            "layout": str(self.layout),
            "blueprints": dict(self.blueprints),
            "banks": {key: str(bank.spec) for key, bank in self.banks.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the shared blueprints; the rest was read before anything was loaded."""
        self.blueprints = {int(number): str(kind) for number, kind in state["blueprints"].items()}
