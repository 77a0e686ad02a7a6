"""Transactions, views and reports of a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_cases import snapshot
from torch import Tensor, nn

from kasmina_fx import (
    ChunkedKasminaLayer,
    KasminaLayer,
    LogicalSeed,
    SeedIndexError,
    SeedLifecycle,
)
from kasmina_fx.testing import graft


def test_a_transaction_shows_all_or_nothing() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    graft(layer, 0)
    x = torch.randn(3, 4)
    before, out = snapshot(layer), layer(x)
    published = layer.state.state_tensor

    def fail() -> None:
        with layer.transaction():
            layer.request_germination([1, 2])
            layer.set_alpha(0, 1.0)
            layer.advance(0, SeedLifecycle.CULLED)
            assert layer.state.state_tensor is published  # nothing visible yet
            assert torch.equal(layer(x), out)
            raise RuntimeError("controller failed")

    with pytest.raises(RuntimeError, match="controller failed"):
        fail()
    layer.state.increment_epochs()  # publishes: nothing staged may come out with it
    layer.state.set_rows(0, epochs_in_state=0)
    layer.kasmina.telemetry.reset()
    before["kasmina.telemetry.accumulated"] = layer.kasmina.telemetry.accumulated.tolist()
    after = snapshot(layer)
    assert after["stages"] == before["stages"]
    assert after["alpha"] == before["alpha"]
    used = {name: bank["used"] for name, bank in after["stats"]["banks"].items()}
    assert used == {"residual_mlp_run0": 1}
    assert torch.equal(layer(x), out)


def test_a_failed_first_germination_leaves_no_slot_in_use() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)

    def fail(blueprint: int | str) -> None:
        with layer.transaction():
            layer.request_germination([1, 2], blueprint)
            raise RuntimeError("controller failed")

    for blueprint in ("mlp", layer.register_blueprint("affine")):
        with pytest.raises(RuntimeError, match="controller failed"):
            fail(blueprint)
    assert all(bank["used"] == 0 for bank in layer.get_layer_stats()["banks"].values())
    assert layer.request_germination([1, 2]) is True


def test_an_inner_transaction_that_fails_is_undone_alone() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)

    def fail() -> None:
        with layer.transaction():
            layer.request_germination(1)
            raise RuntimeError("inner")

    with layer.transaction():
        layer.request_germination(0)
        with pytest.raises(RuntimeError, match="inner"):
            fail()
    assert layer.state.get_state_distribution() == {"DORMANT": 3, "GERMINATED": 1}
    assert layer.bank_of(0) is not None


@pytest.mark.parametrize("build", [KasminaLayer, ChunkedKasminaLayer])
def test_seeds_are_views(build: Callable[[nn.Module, int], KasminaLayer]) -> None:
    layer = build(nn.Linear(4, 11), 4)
    seeds = layer.seeds
    assert len(seeds) == 4
    assert [seed.chunk for seed in seeds] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 11)]
    seed = seeds[3]
    graft(layer, 3, "affine", 0.5)
    assert isinstance(seed, LogicalSeed)
    assert (seed.stage, seed.alpha, seed.is_blended) == (SeedLifecycle.GRAFTING, 0.5, True)
    assert seed.blueprint_id == int(layer.state.state_tensor[3, 1])
    assert [s.seed_id for s in seeds[1:3]] == [1, 2]
    assert "GRAFTING" in repr(seed)
    for outside in (4, -1):
        with pytest.raises(SeedIndexError):
            seeds[outside]


def test_the_health_report() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4, layer_id="fc")
    graft(layer, 2, alpha=0.25)
    x = torch.randn(32, 4)
    out = layer(x)
    report = layer.get_health_report()
    chunks = out.detach().view(32, 4, 3)
    assert report["layer_id"] == "fc"
    assert report["num_seeds"] == 4
    assert report["count"].tolist() == [96.0] * 4
    torch.testing.assert_close(report["mean"], chunks.mean((0, 2)))
    torch.testing.assert_close(report["variance"], chunks.var((0, 2), correction=0))
    assert report["alpha"].tolist() == [0, 0, 0.25, 0]
    assert report["stage"].tolist() == [0, 0, 3, 0]
    assert all(t.device.type == "cpu" for t in report.values() if isinstance(t, Tensor))


def test_layer_stats() -> None:
    layer = KasminaLayer(nn.Linear(4, 11), 4, layer_id="fc", telemetry=False)
    graft(layer, 0)
    layer.request_germination([1, 3])
    assert layer.get_layer_stats() == {
        "layer_id": "fc",
        "num_seeds": 4,
        "features": 11,
        "layout": "dim=-1 runs=3x3+1x2",
        "stages": {"DORMANT": 1, "GERMINATED": 2, "GRAFTING": 1},
        "blended": 1,
        "banks": {
            "residual_mlp_run0": {"slots": 2, "used": 2},
            "residual_mlp_run1": {"slots": 2, "used": 1},
        },
        "folding": "",
        "telemetry_enabled": False,
    }


def test_ten_thousand_seeds_make_no_ten_thousand_objects() -> None:
    layer = KasminaLayer(nn.Linear(2, 10_000), 10_000)
    graft(layer, range(0, 10_000, 100), "affine")
    assert len(list(layer.modules())) < 10
    assert len(list(layer.state_dict())) < 15
    assert layer(torch.randn(2, 2)).shape == (2, 10_000)
