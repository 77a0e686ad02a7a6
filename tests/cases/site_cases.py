"""Blends described as lowerings are asked about them, without a graph."""

from __future__ import annotations

from typing import Any

import torch

from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.lowerings import Site
from kasmina_fx.physical.layout import BankSpec, ChunkLayout


def site(chunks: str = "dim=-1 runs=9x4", kind: str = "mlp", active: int = 2, **other: Any) -> Site:
    """One bank on the first run of a contiguous float32 output ``(rows, features)`` on a CPU."""
    layout = ChunkLayout.parse(chunks)
    specs = lookup(kind).specs(layout.runs[0].size)
    given: dict[str, Any] = {
        "chunks": layout,
        "banks": (BankSpec(kind, 0, False, len(specs)),),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "rank": 2,
        "dense": True,
        "sizes": (tuple(spec.shape for spec in specs),),
        "dtypes": frozenset({torch.float32}),
        "running": (max(2, active),),
        "places": (max(2, active),),
        "rows": 512,
    }
    return Site(**given | other)
