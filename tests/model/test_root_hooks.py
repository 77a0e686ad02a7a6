"""Hooks of a compiled model work whenever they come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_net_cases import X, net


@pytest.mark.parametrize("telemetry", [False, True])
def test_hooks_of_a_compiled_root_work_whenever_they_come_and_go(telemetry: bool) -> None:
    model = net(compile=True, telemetry=telemetry)
    before = model(X)
    handle = model.register_forward_hook(lambda m, args, out: out * 0)
    assert not model(X).any()
    handle.remove()
    assert torch.equal(model(X), before)
    model.register_forward_pre_hook(lambda m, args: (args[0] * 0,))
    bias: Any = model[0].bias
    torch.testing.assert_close(model(X), bias.expand(2, -1))
