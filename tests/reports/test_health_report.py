"""A health report as a person reads it."""

from __future__ import annotations

from small_net_cases import X, layer_of, net

from kasmina_fx import (
    health_report,
)
from kasmina_fx.testing import graft


def test_a_report_prints_what_a_person_asks_for() -> None:
    model = net()
    graft(layer_of(model), [0], "mlp")
    assert str(health_report(model)) == "0: health unknown, 0 errors; 2 DORMANT, 1 GRAFTING"
    model(X)
    assert "0: health 0." in repr(health_report(model))
