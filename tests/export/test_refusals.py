"""What finalize refuses, what it leaves, and what it keeps of a host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folded_cases import exact, finished, fossils
from host_cases import frozen_copy, network, wrapped_twin
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    StillGrowing,
    finalize,
    kasmina_layers,
    kasminify,
    unkasminify,
)
from kasmina_fx.errors import GraphMismatch, InvalidArgument, InvalidType, NoTargets
from kasmina_fx.testing import graft

S = SeedLifecycle
X = torch.linspace(-2, 2, 30).view(5, 6)
ON_THEIR_WAY = (
    S.GERMINATED,
    S.TRAINING,
    S.GRAFTING,
    S.STABILIZATION,
    S.EVALUATING,
    S.FINE_TUNING,
)


def grown_to(stage: SeedLifecycle) -> Any:
    """One FOSSILIZED seed, and one on its way."""

    def grow(layer: KasminaLayer) -> None:
        graft(layer, 0, "mlp", 0.5, stage)
        fossils(layer, 2, "residual_mlp", 0.5)

    return finished(grow=grow)


@pytest.mark.parametrize("stage", ON_THEIR_WAY, ids=lambda stage: stage.name)
def test_seeds_on_their_way_are_refused_frozen_or_dropped(stage: SeedLifecycle) -> None:
    model = grown_to(stage)
    before = frozen_copy(model)
    with pytest.raises(StillGrowing, match=rf'0: 1 in {stage.name}\. .*growing="freeze"'):
        finalize(model)
    frozen, dropped = finalize(model, growing="freeze"), finalize(model, growing="drop")
    assert frozen_copy(model) == before
    torch.testing.assert_close(frozen(X).double(), exact(model, X), atol=2e-6, rtol=2e-6)
    kasmina_layers(model)["0"].reset(0)
    torch.testing.assert_close(dropped(X).double(), exact(model, X), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(finalize(model)(X), dropped(X))


@pytest.mark.parametrize("stage", [S.CULLED, S.CANCELLED, S.ROLLED_BACK], ids=lambda s: s.name)
def test_seeds_that_ended_are_gone(stage: SeedLifecycle) -> None:
    model = grown_to(S.GERMINATED if stage is S.CANCELLED else S.TRAINING)
    kasmina_layers(model)["0"].advance(0, stage)
    torch.testing.assert_close(finalize(model)(X).double(), exact(model, X), atol=2e-6, rtol=2e-6)


def test_many_layers_are_counted() -> None:
    model = wrapped_twin(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))))
    for layer in kasmina_layers(model).values():
        graft(layer, [0, 1], "affine", 0.5, S.GRAFTING)
        graft(layer, 2, "affine", 0.5, S.TRAINING)
    with pytest.raises(StillGrowing, match=r"1 in TRAINING, 2 in GRAFTING; .*; and 2 more layers"):
        finalize(model)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"growing": "maybe"}, InvalidArgument, "error, freeze, drop"),
        ({"growing": None}, InvalidArgument, "growing=None"),
        ({"example_inputs": X}, InvalidType, "a tuple of positional arguments"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        finalize(finished(), **given)


def test_models_without_seeds() -> None:
    with pytest.raises(NoTargets, match="kasminify"):
        finalize(network())
    with pytest.raises(InvalidType, match="give a model"):
        finalize(3)  # type: ignore[type-var]


def test_unkasminify_points_to_finalize() -> None:
    model = finished(grow=lambda layer: fossils(layer, 0, "mlp"))
    for fold in (False, True):
        with pytest.raises(StillGrowing, match=r"finalize\(model\) makes a plain copy"):
            unkasminify(model, fold=fold)


class ReadsWeight(nn.Module):
    """A model that reads a layer's weight where seeds are not asked."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.linear(self.fc(x), self.fc.weight)
        return out


def test_a_weight_that_is_read_elsewhere_is_found_by_example_inputs() -> None:
    model = finished(ReadsWeight(), lambda layer: fossils(layer, 0, "affine"))
    with pytest.raises(GraphMismatch, match="output 0 of the finalised model is"):
        finalize(model, example_inputs=(X,))


class KnowsWeight(nn.Module):
    """A model that is NaN where its layer's weight is another."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("weight", self.fc.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.fc.weight == self.weight, 1.0, torch.nan)


def test_numbers_that_are_not_finite_are_compared_too() -> None:
    model = finished(KnowsWeight(), lambda layer: fossils(layer, 0, "affine"))
    with pytest.raises(GraphMismatch, match="or one is not finite"):
        finalize(model, example_inputs=(X,))


def test_a_tied_weight_is_not_folded() -> None:
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    plain[1].weight = plain[0].weight
    model = kasminify(plain, num_seeds=3, compile=False)
    fossils(kasmina_layers(model)["0"], [0, 1], "affine")
    final = finalize(model, example_inputs=(X,))
    assert final[1].weight is final[0].weight
    torch.testing.assert_close(final(X).double(), exact(model, X), atol=2e-6, rtol=2e-6)


def test_grouped_convolutions_and_parametrized_weights_are_not_folded() -> None:
    x = torch.randn(2, 4, 5, 5)
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
    spectral = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)))
    for plain in (grouped, spectral):
        model = kasminify(plain, num_seeds=2, targets=(nn.Conv2d,), compile=False).eval()
        fossils(kasmina_layers(model)["0"], 1, "lora")
        final = finalize(model, example_inputs=(x,))
        assert hasattr(final[0], "grown")
        torch.testing.assert_close(final(x).double(), exact(model, x), atol=2e-6, rtol=2e-6)


def test_hooks_see_what_they_saw() -> None:
    seen: list[Tensor] = []
    model = finished(grow=lambda layer: fossils(layer, 0, "mlp"))
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    final = finalize(model, example_inputs=(X,))
    assert torch.equal(seen[0], seen[1]) or torch.allclose(seen[0], seen[1], atol=1e-6)
    with torch.no_grad():
        assert torch.equal(final[0](X), seen[-1])


def test_layers_made_by_hand() -> None:
    base = nn.Linear(6, 8)
    base.register_forward_hook(lambda module, args, out: out * 2)  # before its seeds
    layer = KasminaLayer(base, 4)
    fossils(layer, [0, 2], "affine")
    whole = nn.Sequential(layer, nn.Tanh()).eval()
    final = finalize(whole, example_inputs=(X,))
    assert type(final[0]) is nn.Linear
    alone: nn.Module = finalize(layer)
    assert type(alone) is nn.Linear
    torch.testing.assert_close(final(X), whole(X))
    layer.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(InvalidArgument, match="0: hooks of a layer made by hand"):
        finalize(whole)
    with pytest.raises(InvalidArgument, match="model: hooks of a layer made by hand"):
        finalize(layer)


def test_a_host_that_has_the_name_already() -> None:
    plain = nn.Sequential(nn.Linear(6, 8))
    plain[0].grown = "old"  # type: ignore[assignment]
    model = kasminify(plain, num_seeds=4, compile=False)
    fossils(kasmina_layers(model)["0"], 0, "mlp")
    with pytest.raises(InvalidArgument, match="attribute 'grown' of its own"):
        finalize(model)


@pytest.mark.parametrize("kind", ["mlp", "affine"])
def test_an_encoder_does_not_pass_by_what_grew(kind: str) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = kasminify(
        encoder, num_seeds=4, compile=False, filter_fn=lambda module, name: name == "linear1"
    ).eval()
    fossils(kasmina_layers(model)["linear1"], [0, 3], kind)
    x = torch.randn(2, 3, 8)
    final = finalize(model, example_inputs=(x,))
    assert type(final) is nn.TransformerEncoderLayer
    assert bool(final.activation_relu_or_gelu) is (kind == "affine")  # the fast path
    with torch.no_grad():
        torch.testing.assert_close(final(x).double(), exact(model, x), atol=5e-6, rtol=5e-6)
