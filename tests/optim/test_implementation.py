"""An optimizer that holds a stack keeps torch's default of foreach or fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optim_cases import growing
from torch import nn
from torch.optim.optimizer import _default_to_fused_or_foreach

from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.optim.compact import CompactParameter

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def defaults(parameters: Sequence[torch.Tensor]) -> tuple[bool, bool]:
    chosen: tuple[bool, bool] = _default_to_fused_or_foreach(
        list(parameters), False, use_fused=True
    )
    return chosen


@pytest.mark.parametrize("device", DEVICES)
def test_torch_chooses_as_for_plain_parameters(device: str) -> None:
    plain = [nn.Parameter(torch.zeros(3, 4, device=device)) for _ in range(3)]
    stack = StackedParameter(torch.zeros(2, 3, device=device))
    compact = CompactParameter(torch.zeros(2, 3, device=device))
    assert defaults([*plain, stack, compact]) == defaults(plain)


class Loop(AssertionError):
    """The optimizer went through its parameters one by one."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta"])
def test_a_step_on_a_gpu_runs_foreach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def single(*args: Any, **kwargs: Any) -> None:
        raise Loop

    kind = "adam" if name == "AdamW" else name.lower()  # whose steps are those of Adam
    module = __import__(f"torch.optim.{kind}", fromlist=["x"])
    monkeypatch.setattr(module, f"_single_tensor_{kind}", single)
    model = growing().cuda()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    assert any(type(p) is StackedParameter for p in optimizer.param_groups[0]["params"])
    model(torch.randn(5, 8, device="cuda")).sum().backward()
    optimizer.step()
    mixed = [*model.parameters(), type("Other", (nn.Parameter,), {})(torch.zeros(2).cuda())]
    mixed[-1].grad = torch.zeros_like(mixed[-1])
    with pytest.raises(Loop):
        getattr(torch.optim, name)(mixed, lr=0.01).step()
