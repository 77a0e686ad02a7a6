"""When a finished model runs folded, and when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folded_cases import (
    X,
    assert_as_reference,
    by_reference,
    evaluated,
    finished,
    fossils,
    held,
    is_folded,
    pruned,
    three,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kasmina_fx import (
    KasminaLayer,
    TelemetryPolicy,
)
from kasmina_fx.testing import graft

# When.


def mixed(model: Any) -> None:
    graft(model[2], [1], "affine", 0.5)


def in_training(model: Any) -> None:
    model.train()


def observed(model: Any) -> None:
    model[0].set_telemetry(TelemetryPolicy(in_eval=True))


def with_a_hook_before(model: Any) -> None:
    model[0].register_forward_pre_hook(lambda module, args: None)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(model[0], "weight", Doubled())


def of_a_class_of_its_own(model: Any) -> None:
    model[0].weight = type("Own", (nn.Parameter,), {})(model[0].weight.detach())


def made_for_inference(model: Any) -> None:
    with torch.inference_mode():
        model[0].weight = nn.Parameter(model[0].weight.clone())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (made_for_inference, "has no numbers that count what is written to them"),
        (mixed, "seeds that are not FOSSILIZED run in 2"),
        (observed, "statistics are kept there"),
        (with_a_hook_before, "a hook comes before its base"),
        (pruned, "computed by a hook"),
        (parametrized, "computed by a parametrization"),
        (of_a_class_of_its_own, "weight is a Own, not a plain Parameter"),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "when it was folded before"])
def test_a_layer_is_not_folded(change: Callable[[Any], None], why: str, late: bool) -> None:
    model = finished()
    if late:
        assert is_folded(model, X)
        assert "folded into its weight" in model[0].get_layer_stats()["folding"]
    change(model)
    evaluated(model, X)
    assert "not folded" in model[0].get_layer_stats()["folding"]
    assert why in model[0].get_layer_stats()["folding"]
    assert_as_reference(model, X)
    if change is not observed:  # forwards see to that one
        assert not is_folded(model, X)


def test_statistics_that_are_kept_in_evaluation_see_blueprints() -> None:
    model = finished(telemetry=TelemetryPolicy(in_eval=True))
    evaluated(model, X)
    assert model[0].get_health_report()["runs"].tolist() == [1, 0, 1, 1]


def test_with_a_gradient_or_in_training_nothing_is_folded() -> None:
    model = finished()
    model(X).sum().backward()
    assert held(model) is None
    evaluated(model.train(), X)
    assert held(model) is None
    model.eval()
    model[0].train()  # one layer alone: the others are what they are
    assert_as_reference(model, X)


def test_float16_is_not_folded_nor_what_autocasts_to_it() -> None:
    model = finished(three().half())
    assert "float16 ends where" in model[0].get_layer_stats()["folding"]
    model = finished()
    with torch.autocast("cpu", torch.bfloat16):
        lower = evaluated(model, X)
    assert lower.dtype is torch.bfloat16
    assert is_folded(model, X)
    before = model[0].weight.detach().clone()
    copied = held(model)
    assert copied is not None
    assert copied.weight is not None
    copied.weight.data.fill_(torch.nan)  # whoever uses it is seen
    assert bool(evaluated(model, X).isnan().any())
    with torch.autocast("cpu", torch.float16):
        assert bool(evaluated(model, X).isfinite().all())
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("plain", "settings", "kind", "why"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(6)), {"targets": (nn.LayerNorm,)}, "affine",
         "a LayerNorm has no weight to fold into"),
        (lambda: nn.Sequential(nn.Linear(6, 8)), {}, "mlp", "only affine and lora"),
        (lambda: nn.Sequential(Doubling(6, 8)), {}, "lora", "has a forward of its own"),
    ],
)  # fmt: skip
def test_what_does_not_fold_is_blended(
    plain: Callable[[], nn.Module], settings: Any, kind: str, why: str
) -> None:
    model = finished(plain(), lambda layer: fossils(layer, [0], kind), **settings)
    assert not is_folded(model, X)
    assert why in model[0].get_layer_stats()["folding"]
    assert_as_reference(model, X)


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_layers_that_do_not_fold_keep_no_other_from_it() -> None:
    plain = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6))
    model = finished(
        plain, lambda layer: fossils(layer, [0], "lora"), targets=(nn.Linear, nn.LayerNorm)
    )
    fossils(model[1], [1], "affine")
    assert is_folded(model, X, "0")
    assert not is_folded(model, X, "1")
    assert is_folded(model, X, "2")  # of which no seed is in use
    idle = held(model, "3")
    assert idle is not None
    assert idle.weight is None  # its own forward, alone
    assert_as_reference(model, X)
    assert "a LayerNorm has no weight" in model[1].get_layer_stats()["folding"]
    assert model[2].get_layer_stats()["folding"] == ""


def test_layers_by_hand_are_blended() -> None:
    layer = KasminaLayer(nn.Linear(6, 8), 4, telemetry=False).eval()
    fossils(layer, [0], "affine")
    evaluated(layer, X)
    assert layer.kasmina.folded is None
    assert "made by hand" in layer.get_layer_stats()["folding"]


def test_a_layer_called_by_itself_is_blended() -> None:
    model = finished()
    assert is_folded(model, X)
    with torch.no_grad():
        model[0].weight.data.mul_(3)  # which a call of the model would not have seen
        alone = model[0](X)
    torch.testing.assert_close(alone, by_reference(model[0], X), atol=1e-5, rtol=1e-5)
    model[0].publish()  # as one says so
    assert held(model) is None
    assert_as_reference(model, X, 1e-5)


def test_a_seed_that_neither_runs_nor_is_a_fossil_hinders_nothing() -> None:
    model = finished()
    model[2].request_germination([0], "mlp")
    model[0].request_germination([1], "mlp")
    assert is_folded(model, X)
    assert_as_reference(model, X)
