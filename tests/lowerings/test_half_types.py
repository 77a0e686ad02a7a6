"""Kernels in float16, in Triton's interpreter; of bfloat16 it makes nonsense (Triton 3.9)."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import STAGES, Blend, errors_against_float64, interpreter

from kasmina_fx.lowerings.plan import KERNELS

__all__ = ["interpreter"]
pytestmark = [pytest.mark.untraced, pytest.mark.usefixtures("interpreter")]


@pytest.mark.parametrize(
    "size",
    [1, pytest.param(4, marks=pytest.mark.slow), 5, pytest.param(12, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_in_float16_are_close_to_float64(kind: str, size: int) -> None:
    case = Blend([size] * 9, dict.fromkeys(STAGES, kind), rows=50, dtype=torch.float16)
    assert max(errors_against_float64(case)) < 5e-3
