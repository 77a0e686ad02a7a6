"""A controller and a loop that count the same epochs; what a controller remembers."""

from __future__ import annotations

import json

import pytest
from small_net_cases import layer_of, net

from kasmina_fx import (
    InvalidArgument,
    InvalidType,
    SeedLifecycle,
)
from kasmina_fx.controllers import HealthController
from kasmina_fx.testing import graft


def test_a_controller_leaves_epochs_to_the_loop_and_remembers() -> None:
    model = net()
    graft(layer_of(model), [0], stage=SeedLifecycle.STABILIZATION)
    controller = HealthController(model, budget=1, settle_epochs=1, evaluate_epochs=1)
    controller.step({"loss": 1.0}, advance_epoch=False)
    assert layer_of(model).seeds[0].epochs_in_state == 0
    controller.step({"loss": 1.0})
    assert layer_of(model).seeds[0].stage is SeedLifecycle.EVALUATING
    fresh = HealthController(model, budget=1, evaluate_epochs=1)
    fresh.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    fresh.step({"loss": 2.0})
    assert layer_of(model).seeds[0].stage is SeedLifecycle.CULLED
    with pytest.raises(InvalidArgument, match="no state of a controller"):
        fresh.load_state_dict({"losses": [1]})
    with pytest.raises(InvalidType, match="advance_epoch"):
        fresh.step({"loss": 1.0}, advance_epoch=1)  # type: ignore[arg-type]
