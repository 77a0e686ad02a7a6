"""What a node runs under, among the autocast regions of its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from kasmina_fx._torch.amp import ENTER_AUTOCAST, EXIT_AUTOCAST
from kasmina_fx.passes.infra.regions import Autocast, autocast_at

Region = tuple[str, torch.dtype | None, bool]


def at(*regions: Region, closed: int = 0) -> Autocast:
    """What a node on the CPU runs under inside regions, of which the last ``closed`` are closed."""
    graph = Graph()
    y = graph.placeholder("y")
    y.meta["val"] = torch.empty(2)
    opened: list[Node] = [
        graph.call_function(ENTER_AUTOCAST, (device, dtype, enabled, None))
        for device, dtype, enabled in regions
    ]
    for _ in range(closed):
        graph.call_function(EXIT_AUTOCAST, (opened.pop(),))
    node: Any = graph.call_function(torch.relu, (y,))
    return autocast_at(node)


HALF, OFF = ("cpu", torch.bfloat16, True), ("cpu", torch.bfloat16, False)
OF_A_GPU = ("cuda", torch.float16, True)


@pytest.mark.parametrize(
    ("regions", "closed", "dtype"),
    [
        ((), 0, None),
        ((HALF,), 0, torch.bfloat16),
        ((HALF,), 1, None),
        ((HALF, OFF), 0, None),
        ((HALF, OFF), 1, torch.bfloat16),
        ((OF_A_GPU,), 0, None),  # of another device
        ((HALF, OF_A_GPU), 0, torch.bfloat16),
        ((("cpu", None, True),), 0, torch.bfloat16),  # the default of the device
    ],
)
def test_the_innermost_open_region_of_the_nodes_device_counts(
    regions: tuple[Region, ...], closed: int, dtype: torch.dtype | None
) -> None:
    assert at(*regions, closed=closed) == Autocast("cpu", dtype)
    with torch.autocast("cpu", torch.bfloat16):  # what the caller has set, where no region says
        own = [region for region in regions if region[0] == "cpu"][: len(regions) - closed]
        outside = torch.bfloat16 if not own else dtype
        assert at(*regions, closed=closed) == Autocast("cpu", outside)
