"""Kernels under each mode of ``torch.compile``, and with deterministic algorithms, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import assert_lives_are_close, life, same_bits

pytestmark = pytest.mark.gpu
LOWERINGS = ["fused", "dense"]


@pytest.mark.parametrize(
    ("lowering", "mode"),
    [("fused", "reduce-overhead"), ("dense", "reduce-overhead"), ("dense", "max-autotune")],
)
def test_a_life_is_the_same_in_each_mode(lowering: str, mode: str) -> None:
    found, _ = life(lowering, torch.float32, "mlp", "cuda", mode=mode)
    expected, _ = life(lowering, torch.float32, "mlp", "cuda", mode="default")
    assert_lives_are_close(found, expected, 1e-4)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_deterministic_algorithms_give_the_same_bits_twice(
    lowering: str, dtype: torch.dtype, mode: str | None
) -> None:
    lives = [life(lowering, dtype, "mlp", "cuda", mode=mode)[0] for _ in range(2)]
    assert same_bits(*lives)
