"""What is known of a seed at one moment, in the shape that older code reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kasmina_fx.compat.chunked.states import SeedLifecycle


@dataclass
class LogicalSeedState:
    """A seed at one moment; ``lifecycle_state`` is one of the five."""

    layer_id: str
    seed_id: int
    chunk_idx: int
    lifecycle_state: SeedLifecycle
    blueprint_id: int
    epochs_in_state: int
    grafting_strategy: int
    health_score: float = 1.0
    error_count: int = 0

    @property
    def is_active(self) -> bool:
        """LOADING or ACTIVE."""
        return self.lifecycle_state in (SeedLifecycle.LOADING, SeedLifecycle.ACTIVE)

    @property
    def is_terminal(self) -> bool:
        """FOSSILIZED or ERROR_RECOVERY."""
        return self.lifecycle_state in (SeedLifecycle.FOSSILIZED, SeedLifecycle.ERROR_RECOVERY)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return {
            **asdict(self),
            "lifecycle_state": self.lifecycle_state.name,
            "lifecycle_value": self.lifecycle_state.value,
            "is_active": self.is_active,
            "is_terminal": self.is_terminal,
        }


def logical_states(
    layer_id: str, rows: Tensor, health_scores: Tensor, error_counts: Tensor
) -> list[LogicalSeedState]:
    """Return the seeds of a layer one by one.

    Args:
        layer_id: Its name.
        rows: int32 ``(S, 4)``, with the five states in the first column.
        health_scores: float32 ``(S,)``.
        error_counts: int16 ``(S,)``.
    """
    columns = zip(rows.tolist(), health_scores.tolist(), error_counts.tolist(), strict=True)
    return [
        LogicalSeedState(
            layer_id, seed, seed, SeedLifecycle(state), blueprint, epochs, strategy, health, errors
        )
        for seed, ((state, blueprint, epochs, strategy), health, errors) in enumerate(columns)
    ]
