"""What the fused lowering says of blends that it does not compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import STAGES, Blend, fused, interpreter
from torch import nn

from kasmina_fx import KasminaLayer
from kasmina_fx.lowerings import Site, lowering_named
from kasmina_fx.physical.blend import blend
from kasmina_fx.physical.layout import BankSpec, ChunkLayout
from kasmina_fx.testing import graft

__all__ = ["interpreter"]


def site(size: int = 4) -> Site:
    asked, _ = Blend([size] * 9, dict.fromkeys(STAGES, "lora")).arguments()
    banks = tuple(bank.spec for bank in asked.bank_inputs())
    sizes = (tuple(tuple(p.shape[1:]) for p in asked.params),)
    chunks, cpu = ChunkLayout.parse(asked.chunks), torch.device("cpu")
    return Site(chunks, banks, torch.float32, cpu, 2, True, sizes, frozenset({torch.float32}))


MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device": torch.device("meta")}, "no Triton kernel runs on meta here"),
    "dtype": ({"dtype": torch.bfloat16}, "for a CPU compute in float32, not in torch.bfloat16"),
    "parameters": (
        {"dtypes": frozenset({torch.float32, torch.bfloat16})},
        "kernels for a CPU read parameters in float32, not in torch.bfloat16",
    ),
    "strides": ({"dense": False}, "features of the last dim of a contiguous output"),
    "rank": ({"chunks": ChunkLayout.parse("dim=1 runs=9x4"), "rank": 3}, "of the last dim"),
}


def test_a_site_that_has_kernels_has_no_reason() -> None:
    assert lowering_named("fused").why_not(site()) is None
    assert lowering_named("fused").why_not(site(64)) is None
    assert lowering_named("fused").why_not(site(1024)) is None


@pytest.mark.parametrize("miss", MISSES)
def test_a_near_miss_is_told_its_reason(miss: str) -> None:
    changed, reason = MISSES[miss]
    why_not = lowering_named("fused").why_not(replace(site(), **changed))
    assert why_not is not None
    assert reason in why_not


def test_chunks_beyond_what_was_measured_are_left_to_plain_operators() -> None:
    why_not = lowering_named("fused").why_not(site(1025))
    assert why_not == "chunks of 1,025 features are more than the 1,024 of kernels for a CPU"


@pytest.mark.usefixtures("interpreter")
def test_chunks_beyond_what_a_program_holds_are_left_to_plain_operators() -> None:
    assert lowering_named("fused").why_not(site(64)) is None
    why_not = lowering_named("fused").why_not(site(65))
    assert why_not == "chunks of 65 features are more than a program's registers hold"


@pytest.mark.usefixtures("interpreter")
def test_a_blueprint_may_have_kernels_of_tiles_alone() -> None:
    other = replace(site(), banks=(BankSpec("bottleneck", 0, False, 6),), sizes=(((4,),) * 6,))
    assert lowering_named("fused").why_not(other) is None
    assert lowering_named("dense").why_not(other) == (
        "blueprint bottleneck has no kernel of whole rows"
    )


@pytest.mark.usefixtures("interpreter")
def test_kernels_of_triton_compute_no_float64() -> None:
    why_not = lowering_named("fused").why_not(replace(site(), dtype=torch.float64))
    assert why_not == "kernels compute in float32, bfloat16 and float16, not in torch.float64"


def test_under_autocast_an_output_in_float32_is_blended_in_float32() -> None:
    layer = KasminaLayer(nn.Identity(), 4, chunk_sizes=[4] * 4, feature_dim=-1)
    graft(layer, [1, 2], "mlp", 0.5)
    asked = layer.kasmina.shown.blend_arguments(
        torch.randn(5, 16), layer.kasmina.layout_text, False
    )
    expected, _ = blend(asked)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out, _ = fused(asked)
    torch.testing.assert_close(out, expected)
