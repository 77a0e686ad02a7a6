"""Inductor's cache on disk: used, and never with another release's backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import OneLayer, layer_of, wrapped
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from kasmina_fx import backend
from kasmina_fx.testing import graft


def _first_step(hit: bool) -> dict[str, Tensor]:
    """What a step of a new model gives, which finds its graphs in the cache or doesn't."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = wrapped(OneLayer(), seeds=4, telemetry=True)
    layer = layer_of(model)
    graft(layer, [1, 3], "affine", alpha=0.5)
    x = torch.randn(6, 8, requires_grad=True)
    counters.clear()
    run: Any = torch.compile(model, backend="kasmina", fullgraph=True)
    run(x).square().sum().backward()
    assert counters["aot_autograd"]["autograd_cache_hit"] == hit
    assert counters["aot_autograd"]["autograd_cache_saved"] == (not hit)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    assert len(grads) > 2
    return {**grads, "x": x.grad, "telemetry": layer.kasmina.telemetry.accumulated.clone()}


@pytest.mark.slow
def test_a_second_first_call_finds_its_graphs_and_an_edited_package_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fresh_cache():
        made = _first_step(hit=False)
        found = _first_step(hit=True)
        assert found.keys() == made.keys()
        for name, value in made.items():
            assert torch.equal(found[name], value), name
        monkeypatch.setattr(backend, "_source_digest", lambda: "another release")
        _first_step(hit=False)
