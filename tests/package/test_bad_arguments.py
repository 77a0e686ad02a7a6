"""Arguments that a layer refuses, changing nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import snapshot
from torch import Tensor, nn

from kasmina_fx import (
    ChunkedKasminaLayer,
    IllegalTransition,
    InvalidArgument,
    InvalidType,
    KasminaError,
    KasminaLayer,
    SeedIndexError,
    SeedLifecycle,
    UnknownBlueprint,
)
from kasmina_fx.testing import graft


def _any(value: Any) -> Any:
    """What the types would refuse too."""
    return value


BAD_SEEDS = {
    "negative": (-1, SeedIndexError, "seed -1 .*0 to 3"),
    "too large": (4, SeedIndexError, "seed 4 .*0 to 3"),
    "one of many": ([0, 7], SeedIndexError, "seed 7"),
    "float": (1.0, InvalidType, "float"),
    "bool": (True, InvalidType, "bool"),
    "float tensor": (torch.tensor([1.0]), InvalidType, "float32"),
    "twice": ([1, 2, 1], InvalidArgument, "seed 1 .*twice"),
    "str": ("1", InvalidType, "str"),
}
CALLS: dict[str, Callable[[KasminaLayer, Any], Any]] = {
    "germinate": lambda layer, ids: layer.request_germination(ids),
    "cancel": lambda layer, ids: layer.cancel_germination(ids),
    "advance": lambda layer, ids: layer.advance(ids, SeedLifecycle.TRAINING),
    "set_alpha": lambda layer, ids: layer.set_alpha(ids, 0.5),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("ids", "error", "message"), BAD_SEEDS.values(), ids=BAD_SEEDS)
def test_bad_seed_ids_are_refused_by_name_and_change_nothing(
    call: Callable[[KasminaLayer, Any], Any], ids: Any, error: type[Exception], message: str
) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4, layer_id="fc7")
    layer.request_germination(0, "affine")
    before = snapshot(layer)
    with pytest.raises(error, match=f"fc7.*{message}") as caught:
        call(layer, ids)
    assert isinstance(caught.value, KasminaError)
    assert snapshot(layer) == before


BAD_CALLS: dict[str, tuple[Callable[[KasminaLayer], Any], type[Exception], str]] = {
    "unknown id": (lambda x: x.request_germination(1, 5), UnknownBlueprint, "id 5.*register"),
    "id 0": (lambda x: x.request_germination(1, 0), UnknownBlueprint, "id 0"),
    "negative id": (lambda x: x.request_germination(1, -1), UnknownBlueprint, "id -1"),
    "bool id": (lambda x: x.request_germination(1, True), InvalidType, "True"),
    "float id": (lambda x: x.request_germination(1, _any(1.0)), InvalidType, r"1\.0"),
    "unknown name": (lambda x: x.request_germination(1, "lroa"), UnknownBlueprint, "lora"),
    "strategy": (lambda x: x.request_germination(1, None, 9), InvalidArgument, "9.*FIXED_RAMP"),
    "registering an unknown name": (
        lambda x: x.register_blueprint("botleneck"),
        UnknownBlueprint,
        "bottleneck",
    ),
    "alpha NaN": (lambda x: x.set_alpha(0, float("nan")), InvalidArgument, "NaN"),
    "one alpha NaN": (
        lambda x: x.set_alpha([0, 1], torch.tensor([0.5, float("nan")])),
        InvalidArgument,
        "NaN",
    ),
    "too many alphas": (
        lambda x: x.set_alpha([0, 1], torch.tensor([0.5, 0.1, 0.2])),
        InvalidArgument,
        "3",
    ),
    "alpha a str": (lambda x: x.set_alpha(0, _any("half")), InvalidType, "half"),
    "illegal": (
        lambda x: x.advance(0, SeedLifecycle.GRAFTING),
        IllegalTransition,
        "seed 0.*GERMINATED to GRAFTING.*TRAINING, CANCELLED",
    ),
    "illegal for one": (
        lambda x: x.advance([0, 1], SeedLifecycle.TRAINING),
        IllegalTransition,
        "seed 1.*DORMANT to TRAINING",
    ),
    "no such stage": (lambda x: x.advance(0, 11), InvalidArgument, "11.*DORMANT"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused_and_change_nothing(
    call: Callable[[KasminaLayer], Any], error: type[Exception], message: str
) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination(0, "mlp")
    before = snapshot(layer)
    with pytest.raises(error, match=message) as caught:
        call(layer)
    assert isinstance(caught.value, KasminaError)
    assert snapshot(layer) == before


def test_an_empty_list_of_seeds_is_no_error() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    before = layer.state.state_tensor.clone()
    for stage in SeedLifecycle:
        layer.advance([], stage)
    layer.set_alpha([], 0.5)
    assert layer.cancel_germination([]) is True
    assert torch.equal(layer.state.state_tensor, before)


BAD_LAYERS: dict[str, tuple[Callable[[], Any], str]] = {
    "no seeds": (lambda: KasminaLayer(nn.Linear(4, 6), 0), "num_seeds|num_chunks=0"),
    "negative seeds": (lambda: KasminaLayer(nn.Linear(4, 6), -3), "-3"),
    "more seeds than features": (lambda: KasminaLayer(nn.Linear(4, 6), 7), "7.*6 features"),
    "float seeds": (lambda: KasminaLayer(nn.Linear(4, 6), _any(2.0)), "float"),
    "bool seeds": (lambda: KasminaLayer(nn.Linear(4, 6), True), "bool"),
    "sizes do not sum": (
        lambda: KasminaLayer(nn.Linear(4, 6), 2, chunk_sizes=[2, 3]),
        "sum to 5.*6",
    ),
    "zero size": (lambda: KasminaLayer(nn.Linear(4, 6), 3, chunk_sizes=[3, 0, 3]), "positive"),
    "too few sizes": (lambda: KasminaLayer(nn.Linear(4, 6), 3, chunk_sizes=[3, 3]), "2 chunk"),
    "no sizes": (lambda: KasminaLayer(nn.Linear(4, 6), 3, chunk_sizes=[]), "0"),
    "unknown base": (lambda: KasminaLayer(nn.ReLU(), 2), "ReLU.*chunk_sizes.*feature_dim"),
    "base half described": (lambda: KasminaLayer(nn.ReLU(), 2, feature_dim=-1), "ReLU"),
    "negative reserve": (lambda: KasminaLayer(nn.Linear(4, 6), 2, reserve=-1), "reserve=-1"),
    "bool reserve": (lambda: KasminaLayer(nn.Linear(4, 6), 2, reserve=True), "reserve=True"),
}


@pytest.mark.parametrize(("make", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_a_layer_that_can_not_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(KasminaError, match=message):
        make()


class Doubled(nn.Module):
    """A base with 8 features, which its class does not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


@pytest.mark.parametrize("telemetry", [True, False])
@pytest.mark.parametrize(("sizes", "dim"), [([2, 2, 2], -1), ([4, 4], 2), ([4, 4], -3)])
def test_an_output_other_than_described_is_refused(
    sizes: list[int], dim: int, telemetry: bool
) -> None:
    layer = KasminaLayer(
        Doubled(), len(sizes), chunk_sizes=sizes, feature_dim=dim, telemetry=telemetry
    )
    for seed in range(2):
        with pytest.raises(InvalidArgument, match=r"shape \(8, 8\); its layer was made for"):
            layer(torch.randn(8, 4))
        graft(layer, [seed])
    right = KasminaLayer(Doubled(), 2, chunk_sizes=[4, 4], feature_dim=-1, telemetry=telemetry)
    graft(right, [1])
    assert right(torch.randn(8, 4)).shape == (8, 8)


@pytest.mark.parametrize("dim", ["x", True, 1.0])
def test_a_feature_dim_is_a_number(dim: Any) -> None:
    with pytest.raises(InvalidArgument, match="feature_dim="):
        KasminaLayer(nn.Linear(4, 6), 3, feature_dim=dim)


@pytest.mark.parametrize("sizes", [6, ["a"], [2.5, 3.5]])
def test_chunk_sizes_are_numbers(sizes: Any) -> None:
    with pytest.raises((InvalidArgument, InvalidType), match="chunk"):
        KasminaLayer(nn.Linear(4, 6), 2, chunk_sizes=sizes)


def test_a_refused_layer_has_not_moved_its_base() -> None:
    base = nn.Linear(4, 6)
    with pytest.raises(InvalidArgument):
        ChunkedKasminaLayer(base, 7, device="meta")
    assert base.weight.device.type == "cpu"
    moved = ChunkedKasminaLayer(base, 6, device="meta")
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
