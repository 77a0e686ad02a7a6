"""New seeds are shared over layers, and chosen by chance inside; or by health, for who wants it."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import torch
from graph_cases import TwoLayers, wrapped
from torch import nn

from kasmina_fx import health_report, kasmina_layers
from kasmina_fx.controllers import HealthController
from kasmina_fx.controllers.places import by_layer
from kasmina_fx.lifecycle import SeedLifecycle as S


def chosen(model: nn.Module, **settings: Any) -> list[tuple[str, int]]:
    """Where seeds germinate in one step."""
    decisions = HealthController(model, **settings).step({"loss": 1.0})
    return [(d.layer, seed) for d in decisions if d.stage is S.GERMINATED for seed in d.seeds]


def model_of(seeds: int = 6, telemetry: bool = False) -> nn.Module:
    return wrapped(TwoLayers(), seeds=seeds, telemetry=telemetry)


def per_layer(places: list[tuple[str, int]]) -> Counter[str]:
    return Counter(name for name, _ in places)


def test_the_budget_is_shared_evenly_without_statistics() -> None:
    model = model_of()
    kasmina_layers(model)["up"].request_germination([0, 1])
    assert per_layer(chosen(model, budget=8)) == {"up": 2, "down": 4}


def test_shares_of_layers() -> None:
    assert per_layer(chosen(model_of(), budget=4, shares={"up": 3, "down": 1})) == {
        "up": 3,
        "down": 1,
    }
    assert per_layer(chosen(model_of(), budget=4, shares={"down": 0.5})) == {"down": 4}


def test_a_layer_that_is_full_leaves_its_share_to_the_others() -> None:
    free = {"a": [0], "b": [0, 1, 2], "c": []}
    places = list(by_layer(free, {"a": 0, "b": 9, "c": 0}, None, Random(0)))
    assert per_layer(places) == {"a": 1, "b": 3}
    assert places[0] == ("a", 0)


def test_the_choice_is_by_chance_and_the_same_for_the_same_seed() -> None:
    found = [tuple(chosen(model_of(), budget=4, random_seed=n)) for n in (0, 0, *range(1, 9))]
    assert found[0] == found[1]
    assert len(set(found)) > 4
    layers = [
        next(by_layer({"a": [0], "b": [0]}, {"a": 0, "b": 0}, None, Random(n)))[0]
        for n in range(16)
    ]
    assert set(layers) == {"a", "b"}


def test_the_lowest_health_is_first_if_asked_for() -> None:
    model = model_of(telemetry=True)
    assert chosen(model, budget=4, choose="health") == []  # telemetry saw nothing yet
    model(torch.randn(8, 8))
    health = health_report(model)
    known = sorted(
        (float(value), name, seed)
        for name, figures in health.items()
        for seed, value in enumerate(figures["health"])
    )
    wanted = {(name, seed) for _, name, seed in known[:4]}
    assert set(chosen(model, budget=4, choose="health")) == wanted
