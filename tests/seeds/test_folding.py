"""What is linear folds into a weight that is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_net_cases import X, layer_of, net
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    StillGrowing,
    kasminify,
    unkasminify,
)
from kasmina_fx.testing import graft


def fossils(model: nn.Module, kind: str) -> None:
    graft(layer_of(model), [0, 1], kind, 0.7, SeedLifecycle.FOSSILIZED)
    with torch.no_grad():
        for parameter in layer_of(model).blueprint_parameters(False):
            parameter.normal_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["affine", "lora"])
@pytest.mark.parametrize(
    "base", [nn.Linear, lambda i, o, bias: nn.Conv1d(i, o, 3, padding=1, bias=bias)]
)
def test_linear_blueprints_fold(base: Callable[..., nn.Module], kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(base(4, 6, bias=bias)).double()
    model = kasminify(
        made, num_seeds=3, targets=(nn.Linear, nn.Conv1d), compile=False, telemetry=False
    )
    fossils(model, kind)
    x = (
        torch.randn(2, 4, dtype=torch.float64)
        if base is nn.Linear
        else torch.randn(2, 4, 5).double()
    )
    before = model(x)
    folded = unkasminify(model, fold=True)
    torch.testing.assert_close(folded(x), before)
    assert type(folded[0]) in (nn.Linear, nn.Conv1d)
    assert (folded[0].bias is None) == (not bias and kind == "lora")


@pytest.mark.parametrize(
    "change",
    [lambda m: prune.l1_unstructured(m, "weight", 0.5), spectral_norm, weight_norm],
    ids=["prune", "spectral_norm", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_computes_is_not_folded_into(
    change: Callable[[nn.Module], Any],
) -> None:
    model = net()
    fossils(model, "affine")
    change(model[0])
    before = model.eval()(X)
    with pytest.raises(StillGrowing, match="computed by a hook"):
        unkasminify(model, fold=True)
    torch.testing.assert_close(model(X), before)


def test_hooks_of_a_module_by_hand_come_before_its_seeds_and_do_not_fold() -> None:
    layer = KasminaLayer(nn.Linear(4, 6), 3)
    graft(layer, [0], "affine", 0.7, SeedLifecycle.FOSSILIZED)
    layer.base.register_forward_hook(lambda m, args, out: out.relu())
    with pytest.raises(StillGrowing, match="hooks of its base"):
        unkasminify(nn.Sequential(layer), fold=True)


class Normed(nn.Linear):
    """A Linear whose output is not what its weight alone says."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = super().forward(input) / self.weight.norm()
        return out


@pytest.mark.parametrize(
    ("layer", "kind", "why"),
    [
        (lambda: KasminaLayer(nn.Conv1d(4, 6, 1, groups=2), 2, chunk_sizes=[2, 4]), "lora",
         "several groups of its convolution"),
        (lambda: KasminaLayer(nn.Linear(4, 5), 3, chunk_sizes=[2, 1, 2], feature_dim=-2), "affine",
         "watch dimension -2 of its output"),
        (lambda: KasminaLayer(Normed(4, 6), 2), "affine", "a Normed has a forward of its own"),
    ],
)  # fmt: skip
def test_what_does_not_mix_features_of_the_weight_does_not_fold(
    layer: Callable[[], KasminaLayer], kind: str, why: str
) -> None:
    made = layer()
    graft(made, [1], kind, 0.7, SeedLifecycle.FOSSILIZED)
    with pytest.raises(StillGrowing, match=why):
        unkasminify(nn.Sequential(made), fold=True)


@pytest.mark.parametrize(("kind", "seed"), [("lora", 0), ("lora", 3), ("affine", 2)])
def test_a_chunk_in_one_group_of_a_convolution_folds(kind: str, seed: int) -> None:
    base = nn.Conv1d(4, 8, 1, groups=2).double()
    layer = KasminaLayer(base, 4, chunk_sizes=[2, 1, 3, 2])  # the third lies in both groups
    graft(layer, [seed], kind, 0.7, SeedLifecycle.FOSSILIZED)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters(False):
            parameter.normal_()
    model, x = nn.Sequential(layer), torch.randn(2, 4, 5).double()
    before = model(x)
    torch.testing.assert_close(unkasminify(model, fold=True)(x), before)
