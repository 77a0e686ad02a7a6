"""From which share of the features on one pass over all of them is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from site_cases import site

from kasmina_fx.lowerings.fused import Fused
from kasmina_fx.lowerings.share import why_no_pass, why_tiles

#: 100 chunks, the activation that follows, a backward, and places from which on the pass is taken.
CASES: dict[str, tuple[int, str, bool, int]] = {
    "filled tiles, evaluation": (4, "gelu", False, 5),
    "filled tiles, training": (4, "gelu", True, 25),
    "others, evaluation": (3, "silu", False, 25),
    "others, training": (12, "gelu_tanh", True, 25),
    "loaded one by one, training": (3, "gelu", True, 60),
    "wide ones, training": (33, "gelu", True, 25),
    "no activation": (4, "", False, 60),
    "an activation that keeps what it returns": (4, "relu", True, 60),
}


@pytest.mark.parametrize("case", CASES)
def test_the_share_decides_between_tiles_and_a_pass_over_all(case: str) -> None:
    size, then, training, first = CASES[case]
    given: dict[str, Any] = {"chunks": f"dim=-1 runs=100x{size}", "dtype": torch.bfloat16}
    given["then"] = then
    below = site(**given, training=training, places=(first - 1,))
    above = site(**given, training=training, places=(first,))
    assert f"{first - 1}% of the features run: tiles touch these alone" in (why_tiles(below) or "")
    assert why_tiles(above) is None
    gpu = torch.device("cuda")
    assert Fused().why_rather_not(site(**given, training=training, places=(1,), device=gpu)) is None
    crowded = site(**given, training=training, places=(first,), device=gpu)
    assert Fused().why_rather_not(crowded) == (
        f"{first}% of the features run: one pass over all takes less"
    )


def test_where_no_kernel_passes_over_all_tiles_are_not_discouraged() -> None:
    there: dict[str, Any] = {"kind": "bottleneck", "places": (9,), "device": torch.device("cuda")}
    assert why_no_pass(site(**there)) == "blueprint bottleneck has no kernel of whole rows"
    assert Fused().why_rather_not(site(**there)) is None
