"""The numbers of a ramp: their defaults and bounds."""

from __future__ import annotations

from typing import Any, Final

import pytest

from kasmina_fx import InvalidArgument
from kasmina_fx.config import SeedConfig
from kasmina_fx.grafting import (
    GraftingConfig,
)

NAN, INF = float("nan"), float("inf")
NAN, INF = float("nan"), float("inf")


def test_the_defaults_are_those_promised() -> None:
    config = GraftingConfig()
    assert (config.fixed_steps, config.high_drift_threshold) == (30, 0.12)
    assert (config.grad_norm_lower, config.grad_norm_upper) == (0.1, 1.0)
    assert config.curve == "linear"


NO_RAMP: Final[dict[str, list[Any]]] = {
    "fixed_steps": [0, -1, 1.5, True, "30", None],
    "curve": ["cubic", "Linear", None, 1, []],
    "high_drift_threshold": [-0.1, NAN, "0.1", None, True],
    "grad_norm_lower": [-0.1, 1.1, NAN, None],
    "grad_norm_upper": [0.05, NAN, "1"],
}


@pytest.mark.parametrize("name", NO_RAMP)
def test_values_that_make_no_ramp_are_refused(name: str) -> None:
    for value in NO_RAMP[name]:
        with pytest.raises(InvalidArgument, match=name):
            GraftingConfig(**{name: value})


def test_values_at_the_edge_are_taken() -> None:
    GraftingConfig(fixed_steps=1, high_drift_threshold=0, grad_norm_lower=0, grad_norm_upper=0)
    GraftingConfig(high_drift_threshold=INF, grad_norm_upper=INF)
    GraftingConfig(grad_norm_lower=2, grad_norm_upper=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grafting", None),
        ("grafting", {"fixed_steps": 3}),
        ("ramp_every", "batch"),
        ("embargo_epochs", -1),
        ("embargo_epochs", 1.0),
        ("embargo_epochs", True),
        ("error_limit", -1),
        ("error_limit", "3"),
    ],
)
def test_settings_of_seeds_that_are_none_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=name):
        SeedConfig(**{name: value})
