"""Back to a plain model."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_cases import frozen_copy, network, perturb, wrapped_twin
from torch import nn

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    StillGrowing,
    kasmina_layers,
    unkasminify,
)
from kasmina_fx.testing import graft


def test_unkasminify_gives_the_plain_model_back_with_its_current_weights() -> None:
    model = network()
    bases, keys = [model[0], model[2]], list(model.state_dict())
    wrapped_twin(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    x = torch.randn(3, 5)
    expected = model(x)
    assert unkasminify(model) is model
    assert [model[0], model[2]] == bases
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert kasmina_layers(model) == {}
    model.load_state_dict(network().state_dict())
    assert list(kasmina_layers(wrapped_twin(model, 3))) == ["0", "2"]


def test_unkasminify_of_a_plain_model_changes_nothing() -> None:
    model = network()
    before = list(model.named_modules())
    assert unkasminify(model) is model
    assert list(model.named_modules()) == before


def test_seeds_that_are_not_blended_do_not_hinder_unkasminify() -> None:
    model = wrapped_twin(network())
    layer = kasmina_layers(model)["0"]
    layer.request_germination([0, 1], "mlp")
    layer.advance(1, SeedLifecycle.TRAINING)
    unkasminify(model)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("mlp", SeedLifecycle.FOSSILIZED),
        ("affine", SeedLifecycle.GRAFTING),
        ("affine", SeedLifecycle.FINE_TUNING),
    ],
)
def test_unkasminify_refuses_to_lose_a_blended_seed(
    kind: str, stage: SeedLifecycle, fold: bool
) -> None:
    model = wrapped_twin(network())
    first, last = kasmina_layers(model).values()
    graft(first, 0, "affine")  # could be folded: must not be, as the other one can't
    first.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    graft(last, [2], kind)
    last.state.set_rows(2, lifecycle_state=stage)
    before, modules = frozen_copy(model), list(model.named_modules())
    with pytest.raises(StillGrowing, match=r"2: seed 2 is blended" if fold else r"0: seed 0.*fold"):
        unkasminify(model, fold=fold)
    assert frozen_copy(model) == before
    assert list(model.named_modules()) == modules


def test_a_fossilized_affine_seed_needs_fold_to_be_asked_for() -> None:
    model = wrapped_twin(network())
    layer = kasmina_layers(model)["2"]
    graft(layer, 1, "affine")
    layer.state.set_rows(1, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match="fold=True"):
        unkasminify(model)


FOLDABLE = {
    "linear": (lambda: nn.Linear(5, 11), (4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 11, bias=False), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 11, 3), (3, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 11, 3, padding=1), (3, 2, 6, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 11, 3, bias=False), (3, 2, 6, 5)),
    "grouped conv2d": (lambda: nn.Conv2d(11, 11, 3, groups=11), (3, 11, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 11, 1), (3, 2, 4, 3, 2)),
}


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize(("make", "shape"), FOLDABLE.values(), ids=FOLDABLE)
def test_unkasminify_folds_fossilized_affine_seeds(
    make: Callable[[], nn.Module], shape: tuple[int, ...], shared: bool
) -> None:
    model: Any = nn.Sequential(make(), nn.Tanh()).double()
    frozen = model[0].weight
    frozen.requires_grad_(False)
    wrapped_twin(model, 3, targets=[nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d])  # 4, 4, 3
    layer = kasmina_layers(model)["0"]
    graft(layer, [0, 2], layer.register_blueprint("affine") if shared else "affine", 1.0)
    layer.set_alpha(2, 0.3)
    perturb(model)
    layer.state.set_rows([0, 2], lifecycle_state=SeedLifecycle.FOSSILIZED)
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    unkasminify(model, fold=True)
    assert not any(isinstance(module, KasminaLayer) for module in model.modules())
    assert model[0].weight is frozen
    assert not frozen.requires_grad
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    assert not list(model.named_buffers())


def test_a_base_without_a_foldable_weight_is_refused() -> None:
    model: Any = nn.Sequential(nn.ConvTranspose2d(2, 8, 1), nn.LayerNorm(8))
    wrapped_twin(model, 2, targets=[nn.ConvTranspose2d])
    layer = kasmina_layers(model)["0"]
    graft(layer, 0, "affine")
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match="ConvTranspose2d"):
        unkasminify(model, fold=True)


def test_folding_into_a_tied_weight_leaves_its_other_owner_as_it_was_or_is_refused() -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    wrapped_twin(model, 3)
    layer = kasmina_layers(model)["head"]
    graft(layer, 0, "affine", 1.0)
    perturb(model)
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    x = torch.randn(2, 8)
    embedded, out = model["embed"](torch.arange(9)), model["head"](x)
    try:
        unkasminify(model, fold=True)
    except StillGrowing:
        assert model["head"] is layer
    torch.testing.assert_close(model["embed"](torch.arange(9)), embedded)
    torch.testing.assert_close(model["head"](x), out)


def test_folding_into_a_computed_weight_is_refused() -> None:
    model: Any = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh())
    wrapped_twin(model, 3)
    layer = kasmina_layers(model)["0"]
    graft(layer, 0, "affine")
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match="parametrization"):
        unkasminify(model, fold=True)


def test_folding_a_rejected_blueprint_is_refused() -> None:
    model = wrapped_twin(network())
    layer = kasmina_layers(model)["0"]
    graft(layer, 0, "affine")
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with torch.no_grad():
        next(layer.blueprint_parameters())[0, 0] = float("inf")
    with pytest.raises(StillGrowing, match="NaN or Inf"):
        unkasminify(model, fold=True)


def test_folding_two_layers_that_share_a_base_is_refused() -> None:
    base = nn.Linear(6, 6)
    model: Any = nn.Sequential(KasminaLayer(base, 3), KasminaLayer(base, 2))
    layer = kasmina_layers(model)["0"]
    graft(layer, 0, "affine")
    layer.state.set_rows(0, lifecycle_state=SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match="tied"):
        unkasminify(model, fold=True)


def test_a_pickled_model_works_and_may_be_unwrapped() -> None:
    model = wrapped_twin(network())
    first = kasmina_layers(model)["0"]
    graft(first, [0, 1], "mlp")
    x = torch.randn(3, 5)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), expected)
    twin.load_state_dict(model.state_dict())
    kasmina_layers(twin)["0"].advance([0, 1], SeedLifecycle.CULLED)
    assert isinstance(unkasminify(twin)[0], nn.Linear)
    assert torch.equal(model(x), expected)
