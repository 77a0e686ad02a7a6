"""How many seeds each layer of a model gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kasmina_fx import InvalidArgument, InvalidType, kasmina_layers, kasminify
from kasmina_fx.targets import default_num_seeds


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 100), nn.Linear(100, 10))


def counts(**given: Any) -> dict[str, int]:
    model = kasminify(network(), compile=False, **given)
    return {name: layer.num_seeds for name, layer in kasmina_layers(model).items()}


def test_by_default_chunks_are_wide() -> None:
    assert counts() == {"0": 4, "2": 6, "3": 1}
    assert counts(num_seeds=None) == counts()
    assert [default_num_seeds(n) for n in (1, 15, 16, 31, 16_000, 10**6)] == [
        1,
        1,
        1,
        1,
        1000,
        1000,
    ]


def test_a_number_is_capped_at_the_features() -> None:
    assert counts(num_seeds=50) == {"0": 50, "2": 50, "3": 10}


@pytest.mark.parametrize("given", [[4, 5, 2], (4, 5, 2)])
def test_one_number_a_layer_in_the_order_of_the_modules(given: Any) -> None:
    assert counts(num_seeds=given) == {"0": 4, "2": 5, "3": 2}


def test_a_function_of_name_and_module() -> None:
    seen = []

    def choose(name: str, module: nn.Module) -> int:
        seen.append((name, type(module)))
        return 3 if name == "2" else 1

    assert counts(num_seeds=choose) == {"0": 1, "2": 3, "3": 1}
    assert seen == [(name, nn.Linear) for name in ("0", "2", "3")]
    report = kasminify(network(), num_seeds=choose, dry_run=True)
    assert report.taken == {"0": 1, "2": 3, "3": 1}


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a text": (
        "ab",
        InvalidType,
        "an int, one for each layer, or a function",
    ),
    "a float": (2.5, InvalidType, "num_seeds=2.5: give an int"),
    "True": (True, InvalidType, "num_seeds=True: give an int"),
    "a tensor": (torch.ones(3), InvalidType, "give an int, one for each layer"),
    "none": (0, InvalidArgument, "num_seeds=0: give an int of at least 1"),
    "too few": ([4, 5], InvalidArgument, "holds 2 numbers, and 3 modules get seeds: 0, 2, 3"),
    "one is none": ([4, 0, 2], InvalidArgument, "num_seeds of 2=0: give an int of at least 1"),
    "no int": (lambda *_: 1.5, InvalidArgument, "num_seeds of 0=1.5: give an int of at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_count_changes_nothing(case: str) -> None:
    given, error, message = BAD[case]
    model = network()
    with pytest.raises(error, match=message):
        kasminify(model, num_seeds=given, compile=False)
    assert all(type(module) is nn.Linear for module in (model[0], model[2], model[3]))
