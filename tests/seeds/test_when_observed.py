"""Statistics are of training, unless asked for, and in no program that is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_net_cases import X, layer_of, net

from kasmina_fx import (
    TelemetryPolicy,
    capture,
    find_matches,
)
from kasmina_fx.testing import graft


@pytest.mark.parametrize("backend", [None, "eager"])
def test_evaluation_counts_nothing_unless_it_is_asked_to(backend: str | None) -> None:
    torch._dynamo.reset()
    for policy, expected in ((True, 4), (TelemetryPolicy(in_eval=True), 8)):
        model = net(telemetry=policy)
        run: Any = torch.compile(model, backend=backend) if backend else model
        run(X)
        model.eval()
        run(X)
        assert layer_of(model).get_health_report()["count"].tolist() == [expected] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_and_exported_programs_keep_no_statistics_and_run() -> None:
    model = net()
    graft(layer_of(model), [0], "mlp")
    expected = model(X)
    counted = layer_of(model).get_health_report()["count"].tolist()
    traced = torch.jit.trace(model, X, check_trace=False)  # which runs the model as well
    torch.testing.assert_close(traced(X), expected)
    exported = capture(model, X, frontend="export")
    assert [match.is_blend for match in find_matches(exported)] == [True]
    assert layer_of(model).get_health_report()["count"].tolist() == counted
