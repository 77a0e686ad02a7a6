"""Plans of fused blends."""

from __future__ import annotations

import pytest

from kasmina_fx.lowerings.plan import Plan, Tiling


@pytest.mark.parametrize(
    ("size", "hidden", "tiling"),
    [
        (1, 2, (16, 16, 32)),
        (3, 6, (5, 16, 32)),
        (4, 0, (4, 16, 16)),
        (12, 24, (1, 16, 32)),
        (20, 4, (1, 32, 16)),
        (64, 128, (1, 64, 128)),
    ],
)
def test_small_chunks_share_a_tile_and_all_are_padded_for_tensor_cores(
    size: int, hidden: int, tiling: tuple[int, int, int]
) -> None:
    plan = Plan("mlp", size, hidden, 0, 0, 9, "float32")
    assert plan.tiling == Tiling(*tiling)
    assert Plan.parse(str(plan)) == plan
