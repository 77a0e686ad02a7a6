"""Kernels in C++ in graphs that Inductor compiles: a life of a model, against matmul."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_lives_are_close, life, same_bits

from kasmina_fx.lowerings.plan import KERNELS

pytestmark = pytest.mark.untraced


@pytest.mark.slow
@pytest.mark.parametrize("kind", KERNELS)
def test_a_compiled_life_is_the_same_with_kernels_and_with_products(kind: str) -> None:
    (kernels, graphs), (matmul, _) = (
        life(name, torch.float32, kind, "cpu", 32) for name in ("fused", "matmul")
    )
    assert_lives_are_close(kernels, matmul, 1e-4)
    assert graphs <= 3
    (again, _) = life("fused", torch.float32, kind, "cpu", 32)
    assert same_bits(kernels, again)
