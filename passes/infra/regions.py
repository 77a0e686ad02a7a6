"""Autocast regions of a graph: which one a node lies in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from kasmina_fx._torch.amp import ENTER_AUTOCAST, EXIT_AUTOCAST
from kasmina_fx.passes.infra.metadata import value_of


@dataclass(frozen=True)
class Autocast:
    """Autocast settings of one device type; ``dtype`` is None where it is off."""

    device: str
    dtype: torch.dtype | None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Run with these settings, whatever is set outside."""
        with torch.autocast(
            self.device, dtype=self.dtype, enabled=self.dtype is not None, cache_enabled=False
        ):
            yield


def autocast_at(node: Node) -> Autocast:
    """Return what a node runs under: the innermost region, else what the caller has set."""
    host: Any = node.args[0]  # a marker's first argument: always a node
    device = str(value_of(host).device.type)
    open_regions: list[Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is ENTER_AUTOCAST:
            open_regions.append(other)
        elif other.target is EXIT_AUTOCAST:
            open_regions.remove(other.args[0])
    for region in reversed(open_regions):
        kind, dtype, enabled, *_ = region.args
        if kind == device:
            chosen: Any = dtype or torch.get_autocast_dtype(device)
            return Autocast(device, chosen if enabled else None)
    enabled = torch.is_autocast_enabled(device)
    return Autocast(device, torch.get_autocast_dtype(device) if enabled else None)
