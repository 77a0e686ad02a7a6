"""Each sample of a batch goes through the pack that it names."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from pack_cases import X, first, output, outputs, small, with_packs
from torch import nn

import kasmina_fx
from kasmina_fx import InvalidArgument, InvalidType, compiles
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import assert_no_recompiles

NAMES = ["a", "b", None, "c", "b", "a"]


def by_sample(found: dict[str | None, torch.Tensor], names: Sequence[str | None]) -> torch.Tensor:
    return torch.stack([found[name][sample] for sample, name in enumerate(names)])


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_samples_go_through_their_packs(compile: bool) -> None:
    model = with_packs(compile=compile)
    mine, found = kasmina_fx.packs(model), outputs(model)
    mine.activate(per_sample=NAMES)
    assert mine.active == "c"
    before = compiles()
    torch.testing.assert_close(output(model), by_sample(found, NAMES))
    assert compiles() - before == compile  # once for the packs that there are
    with assert_no_recompiles():
        for names in ([None] * 6, ["a"] * 6, NAMES[::-1]):
            mine.activate(per_sample=names)
            torch.testing.assert_close(output(model), by_sample(found, names))
        mine.activate("c")
        assert output(model).equal(found["c"])


def test_only_the_packs_that_are_named_run_where_nothing_is_compiled() -> None:
    model = with_packs()
    mine = kasmina_fx.packs(model)
    mine.activate(per_sample=["b", None])
    assert len(first(model).kasmina.packs.mixed.groups) == 1
    output(model, X[:2])


def test_it_ends_with_the_next_pack_and_is_not_copied() -> None:
    model = with_packs()
    mine, found = kasmina_fx.packs(model), outputs(model)
    mine.activate(per_sample=NAMES)
    twin = small()
    twin.load_state_dict(model.state_dict())
    assert output(twin).equal(found["c"])
    assert output(copy.deepcopy(model)).equal(found["c"])
    mine.activate("a")
    assert output(model).equal(found["a"])


def test_seed_by_seed_it_is_refused() -> None:
    model = with_packs()
    kasmina_fx.packs(model).activate(per_sample=NAMES)
    with reference_mode(model), pytest.raises(InvalidArgument, match="through one pack"):
        model(X)


def test_batches_of_another_size_are_refused() -> None:
    model = with_packs()
    kasmina_fx.packs(model).activate(per_sample=NAMES)
    with pytest.raises(InvalidArgument, match=r"0 returned \(3, 12\); per_sample named 6"):
        model(X[:3])


def test_finished_packs_are_not_folded_meanwhile() -> None:
    model: nn.Module = with_packs()
    mine = kasmina_fx.packs(model)
    mine.activate("b")
    for layer in kasmina_fx.kasmina_layers(model).values():
        layer.advance([1, 2, 3], "FOSSILIZED")
    folded = output(model)
    mine.activate(per_sample=["b"] * 6)
    torch.testing.assert_close(output(model), folded)
    assert "each sample" in first(model).get_layer_stats()["folding"]


def test_seeds_that_are_off_and_mixed_packs_exclude_each_other() -> None:
    model = with_packs()
    mine = kasmina_fx.packs(model)
    with (
        kasmina_fx.seeds_off(model),
        pytest.raises(InvalidArgument, match="while seeds are off"),
    ):
        mine.activate(per_sample=NAMES)
    mine.activate(per_sample=NAMES)
    with (
        pytest.raises(InvalidArgument, match="activate one by its name"),
        kasmina_fx.seeds_off(model),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"per_sample": ["z"]}, InvalidArgument),
        ({"per_sample": [3]}, InvalidType),
        ({"per_sample": NAMES, "name": "a"}, InvalidArgument),
        ({"per_sample": 3}, InvalidType),
    ],
)
def test_bad_samples_change_nothing(arguments: dict[str, object], error: type) -> None:
    model = with_packs()
    before = output(model)
    with pytest.raises(error):
        kasmina_fx.packs(model).activate(**arguments)  # type: ignore[arg-type]  # on purpose
    assert output(model).equal(before)
