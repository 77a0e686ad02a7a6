"""Each group's worth is the loss without it; everything is as before afterwards."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from counterfactual_cases import BATCHES, Noisy, loss_fn
from pack_cases import first, grow, output, plain, small
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import (
    CounterfactualReport,
    InsideForward,
    InvalidArgument,
    InvalidType,
    SeedIndexError,
    TelemetryPolicy,
    counterfactual,
    groups_by_layer,
    groups_by_seed,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.testing import assert_no_recompiles


def grown(**settings: Any) -> nn.Sequential:
    model = small(**settings)
    grow(model, [0, 1, 3], "mlp")
    first(model).reset([1])
    return model


def losses(model: nn.Module) -> list[float]:
    with torch.no_grad():
        return [float(loss_fn(model.eval(), batch)) for batch in BATCHES]


def without(model: nn.Module, seeds: dict[str, list[int]]) -> list[float]:
    """Losses of a copy in which seeds are gone."""
    twin = copy.deepcopy(model)
    for name, ids in seeds.items():
        kasmina_layers(twin)[name].reset(ids)
    return losses(twin)


def assert_is(report: CounterfactualReport, name: str, off: list[float], on: list[float]) -> None:
    found = report.all_off if name == "all" else report[name]
    differences = torch.tensor(off, dtype=torch.float64) - torch.tensor(on, dtype=torch.float64)
    assert found.loss == pytest.approx(sum(off) / len(off), rel=1e-6)
    assert found.worth == pytest.approx(differences.mean().item(), rel=1e-4, abs=1e-7)
    wanted = (differences.std() / math.sqrt(len(on))).item()
    assert found.standard_error == pytest.approx(wanted, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("compile", [False, True])
def test_worth_is_what_a_model_without_the_seeds_loses(compile: bool) -> None:
    model = grown(compile=compile)
    report = counterfactual(model, BATCHES, loss_fn)
    eager = grown()
    on = losses(eager)
    assert report.loss == pytest.approx(sum(on) / 4, rel=1e-5)
    assert report.batches == 4
    wanted = {"0": {"0": [0, 3]}, "2": {"2": [0, 1, 3]}}
    for name, seeds in wanted.items():
        assert_is(report, name, without(eager, seeds), on)
    assert_is(report, "all", without(eager, wanted["0"] | wanted["2"]), on)
    assert report.all_off.loss == pytest.approx(sum(losses(plain())) / 4, rel=1e-5)
    with assert_no_recompiles():
        again = counterfactual(model, BATCHES, loss_fn)
    assert again == report


def test_the_most_needed_group_comes_first_and_reads_as_a_table() -> None:
    report = counterfactual(grown(), BATCHES, loss_fn, groups_by_seed(grown()))
    assert [row.name for row in sorted(report.groups, key=lambda r: -r.worth)] == [
        row.name for row in report.groups
    ]
    assert {row.name for row in report.groups} == {"0[0]", "0[3]", "2[0]", "2[1]", "2[3]"}
    lines = str(report).splitlines()
    assert lines[0].split() == ["group", "off", "loss", "worth", "±", "s.e."]
    assert lines[1].split()[0] == "none"
    assert lines[2].startswith(report.groups[0].name)
    assert lines[-2].startswith("all")
    assert "4 batches" in lines[-1]
    assert json.loads(json.dumps(report.to_dict()))["batches"] == 4
    with pytest.raises(KeyError):
        report["z"]


def test_groups_are_anything_that_seeds_off_takes() -> None:
    model = grown()
    assert list(groups_by_layer(model)) == ["0", "2"]
    report = counterfactual(model, BATCHES, loss_fn, {"both": ["0", "2"], "some": {"0": [3]}})
    assert report["both"].loss == report.all_off.loss
    assert counterfactual(model, BATCHES, loss_fn, {}).groups == ()


def test_one_batch_has_no_standard_error() -> None:
    report = counterfactual(grown(), BATCHES[0], loss_fn)
    assert math.isnan(report.all_off.standard_error)
    assert "1 batch;" in str(report)


def test_all_is_as_before_afterwards() -> None:
    torch.manual_seed(1)
    model = kasminify(Noisy(), num_seeds=4, compile=False, telemetry=TelemetryPolicy(in_eval=True))
    grow(model, [0, 2], "mlp")
    model(torch.randn(6, 8)).sum().backward()
    model.norm.eval()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    data: Any = BATCHES
    loader: Any = torch.utils.data.DataLoader(data, batch_size=None, shuffle=True)
    report = counterfactual(model, loader, loss_fn)
    assert report.batches == 4
    assert torch.get_rng_state().equal(random)
    assert [module.training for module in model.modules()] == flags
    now = model.state_dict()
    assert [name for name in saved if not now[name].equal(saved[name])] == []
    for p, before in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None and before is None) or p.grad.equal(before)  # type: ignore[union-attr,arg-type]  # both or none


def test_every_evaluation_draws_the_same_numbers() -> None:
    torch.manual_seed(1)
    model = kasminify(Noisy(), num_seeds=4, compile=False)
    report = counterfactual(model, BATCHES, loss_fn, {"asleep": "fc"})
    assert report["asleep"].worth == report.all_off.worth == 0.0


def test_an_error_leaves_all_as_before() -> None:
    model = grown().train()
    on = output(model)

    def fails(model: nn.Module, batch: Any) -> Tensor:
        if first(model).kasmina.off:
            raise ZeroDivisionError
        return loss_fn(model, batch)

    with pytest.raises(ZeroDivisionError):
        counterfactual(model, BATCHES, fails)
    assert model.training
    assert "forward" not in vars(model)
    assert output(model).equal(on)


# What is refused.


def generator() -> Iterator[Any]:
    yield from BATCHES


def test_an_iterable_of_batches_is_gone_through_once() -> None:
    assert counterfactual(grown(), generator(), loss_fn).batches == 4


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batches": []}, InvalidArgument, "holds no batch"),
        ({"batches": 3}, InvalidType, "an iterable of batches"),
        ({"loss_fn": 3}, InvalidType, "give a function"),
        ({"loss_fn": lambda *_: "x"}, InvalidType, "one number"),
        ({"loss_fn": lambda *_: True}, InvalidType, "one number"),
        ({"loss_fn": lambda *_: torch.zeros(2)}, InvalidType, "one number"),
        ({"groups": ["0"]}, InvalidType, "give a Mapping"),
        ({"groups": {"x": {"0": [9]}}}, SeedIndexError, "seed 9"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type, match: str) -> None:
    model = grown()
    given: dict[str, Any] = {"batches": BATCHES, "loss_fn": loss_fn} | arguments
    on = output(model)
    with pytest.raises(error, match=match):
        counterfactual(model, **given)
    assert output(model).equal(on)


def test_numbers_are_losses_too() -> None:
    assert counterfactual(grown(), BATCHES, lambda m, b: float(loss_fn(m, b))).batches == 4


def test_not_inside_a_forward() -> None:
    model = grown()
    with kasmina_fx.hold_seeds(model), pytest.raises(InsideForward):
        counterfactual(model, BATCHES, loss_fn)
