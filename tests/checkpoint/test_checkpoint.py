"""Checkpoint files: what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import Number, contents_of, everything, grown, network, used
from torch import nn

from kasmina_fx import (
    checkpoint,
    kasmina_layers,
)
from kasmina_fx.errors import CheckpointError
from kasmina_fx.testing import graft


@pytest.mark.parametrize("reserve", [0, 2, 8], ids=lambda n: f"into {n}")
@pytest.mark.parametrize("saved_reserve", [0, 8], ids=lambda n: f"from {n}")
def test_a_grown_model_comes_back_in_a_fresh_one_of_any_capacity(
    path: Path, saved_reserve: int, reserve: int
) -> None:
    source, fresh = grown(reserve=saved_reserve), network(reserve=reserve)
    checkpoint.save(source, path)
    assert used(fresh) != used(source)
    assert checkpoint.load(fresh, path) == {}
    assert used(fresh) == used(source)
    x = torch.randn(3, 5)
    assert torch.equal(fresh(x), source(x))
    # And it goes on growing.
    for model in (source, fresh):
        layer = kasmina_layers(model)["0"]
        torch.manual_seed(5)
        graft(layer, 2, "mlp", 1.0)
    assert torch.equal(fresh(x), source(x))


def test_loading_replaces_what_the_model_had_grown(path: Path) -> None:
    source, other = grown(), network()
    for layer in kasmina_layers(other).values():
        graft(layer, range(4), "bottleneck", 1.0)
    checkpoint.save(source, path)
    checkpoint.load(other, path)
    assert used(other) == used(source)


def test_the_model_that_was_saved_is_not_changed_and_loads_its_own_file(path: Path) -> None:
    model = grown()
    before = everything(model)
    checkpoint.save(model, path)
    assert everything(model) == before
    checkpoint.load(model, path)
    assert everything(model) == before


def test_the_state_dict_alone_holds_everything_and_plain_torch_reads_the_file(path: Path) -> None:
    source, fresh = grown(), network()
    checkpoint.save(source, path)
    fresh.load_state_dict(contents_of(path)["model"])
    assert used(fresh) == used(source)


def test_compiled_models(path: Path) -> None:
    source: Any = torch.compile(grown(), backend="eager")
    target: Any = torch.compile(network(), backend="eager")
    x = torch.randn(3, 5)
    target(x)
    checkpoint.save(source, path)
    checkpoint.load(target, path)
    torch.testing.assert_close(target(x), source(x))
    plain = network()
    checkpoint.load(plain, path)
    torch.testing.assert_close(plain(x), source(x))


def test_a_model_without_seeds(path: Path) -> None:
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source(torch.randn(5, 3))
    checkpoint.save(source, path)
    checkpoint.load(target, path)
    assert everything(target)[0] == everything(source)[0]


def test_the_dtype_is_the_models_and_what_is_lazy_is_made(path: Path) -> None:
    source = nn.Sequential(nn.LazyLinear(3))
    source(torch.zeros(1, 2))
    checkpoint.save(source, path)
    target = nn.Sequential(nn.LazyLinear(3))
    checkpoint.load(target, path)
    assert target[0].weight.shape == (3, 2)
    checkpoint.load(source.double(), path)
    assert source[0].weight.dtype == torch.float64


METADATA: dict[str, Any] = {
    "none": None,
    "list": [True, 1, -(2**70), 0.1, float("inf"), "text", [], {}],
    "dict": {"": {"deeper": [[1]]}},
}


def test_metadata_comes_back(path: Path) -> None:
    checkpoint.save(network(), path, metadata=METADATA)
    assert checkpoint.load(network(), path) == METADATA
    assert checkpoint.load(network(), str(path)) == METADATA


_LOOP: list[Any] = []


_LOOP.append({"again": _LOOP})


BAD_METADATA = {
    "a list": ([1], "metadata is a list"),
    "a number": (1, "metadata is a int"),
    "a tuple": ({"a": (1, 2)}, r"metadata\['a'\] is a tuple.*convert"),
    "a tensor": ({"a": [torch.zeros(1)]}, r"metadata\['a'\]\[0\] is a Tensor"),
    "a module": ({"a": nn.Linear(1, 1)}, "Linear"),
    "an enum": ({"a": Number.ONE}, "Number"),
    "a key": ({"a": {1: 2}}, r"metadata\['a'\] has the key 1"),
    "a loop": ({"a": _LOOP}, "itself again"),
}


@pytest.mark.parametrize(("given", "match"), BAD_METADATA.values(), ids=BAD_METADATA)
def test_metadata_that_would_not_come_back_is_refused(path: Path, given: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        checkpoint.save(network(), path, metadata=given)
    assert list(path.parent.iterdir()) == []
