"""Kernels in C++ in graphs that Inductor compiles: a life of a model, against matmul."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import assert_lives_are_close, life, same_bits
from torch import nn
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code

from kasmina_fx import kasmina_layers, kasminify
from kasmina_fx.lowerings.plan import KERNELS
from kasmina_fx.testing import graft

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


def test_banks_of_one_layer_take_turns_on_one_gradient() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 70), nn.GELU())
    kasminify(model, num_seeds=20, telemetry=False)  # ten chunks of 4 features, ten of 3
    for seeds, kind in ((range(12), "mlp"), (range(12, 20), "lora")):
        graft(kasmina_layers(model)["0"], seeds, kind, 0.5)
    with fresh_inductor_cache():
        _, (forward, backward) = run_and_get_code(
            lambda: model(torch.randn(6, 8)).square().sum().backward()
        )
    buffer = "empty_strided_cpu((6, 70)"
    assert forward.count("tiles_on_cpu.default(") == backward.count("_backward.default(") == 4
    assert forward.count(buffer) == 3  # of the linear and the GELU, and what the latter keeps
    assert buffer not in backward  # it lies there
