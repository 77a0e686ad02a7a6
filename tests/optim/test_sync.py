"""kasmina_fx.optim.sync."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from graph_cases import OneLayer, TwoLayers, layer_of, wrapped
from optim_cases import growing, loss_of, stacks, train
from torch import nn
from torch.optim import SGD, Adagrad, AdamW

from kasmina_fx import (
    InvalidType,
    KasminaError,
    NoTargets,
    optim,
)
from kasmina_fx.testing import graft


def test_sync_reports_and_is_idempotent() -> None:
    model = growing()
    run: Any = torch.compile(model, backend="eager")
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    graft(layer_of(model), [2], "mlp")
    graft(layer_of(model), [3, 4], "mlp")
    graft(layer_of(model), [5], "affine")
    report = optim.sync(optimizer, run)
    names = [name for name, _ in model.named_parameters() if "banks" in name]
    assert [c.name for c in report.carried] + [c.name for c in report.added] == names
    assert {(c.group, c.before, c.now) for c in report.carried} == {(0, 2, 8)}
    assert {(c.group, c.now) for c in report.added} == {(0, 2)}
    assert f"carried in group 0: {names[0]} (2 to 8 slots)" in str(report)
    assert f"added to group 0: {names[-1]} (2 slots)" in str(report)
    before = copy.deepcopy(optimizer.state_dict())
    again = optim.sync(optimizer, model)
    assert again == optim.SyncReport((), ())
    assert str(again) == "nothing to carry or add"
    torch.testing.assert_close(optimizer.state_dict(), before)
    train(run, optimizer, 2)
    with pytest.raises(AttributeError):
        report.carried = ()  # type: ignore[misc]  # frozen


def test_stacks_are_added_beside_those_they_belong_to() -> None:
    model = wrapped(TwoLayers(), seeds=3)
    up, down = layer_of(model, "up"), layer_of(model, "down")
    groups: list[dict[str, Any]] = [
        {"params": list(down.base.parameters()), "lr": 0.1},
        {"params": list(up.base.parameters()), "lr": 0.2},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3},
    ]
    optimizer = Adagrad(groups)
    graft(up, [0], "mlp")
    assert {change.group for change in optim.sync(optimizer, model).added} == {0, 1}
    for number, layer in enumerate((down, up)):
        held = optimizer.param_groups[number]["params"]
        expected = [*layer.base.parameters(), *layer.blueprint_parameters()]
        assert all(p is q for p, q in zip(held, expected, strict=True))
    # With the layer's other stacks, wherever these are.
    moved = optimizer.param_groups[1]["params"][2:]
    del optimizer.param_groups[1]["params"][2:]
    optimizer.param_groups[2]["params"] += moved
    graft(up, [1], "affine")
    report = optim.sync(optimizer, model)
    assert {c.group for c in report.added if c.name.startswith("up.")} == {2}
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2, 0.3]
    for number in range(3):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()
    # Nothing of the layer is there: the last group.
    alone = SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=0.1)
    assert {change.group for change in optim.sync(alone, model).added} == {1}


def test_options_names_and_schedulers_go_on() -> None:
    model = growing()
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if "banks" not in n], "weight_decay": 0.0},
        {"params": [(n, p) for n, p in named if "banks" in n], "lr": 0.02},
    ]
    optimizer = AdamW(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(2):
        train(model, optimizer, 1)
        scheduler.step()
    places = [len(group["params"]) for group in optimizer.param_groups]
    graft(layer_of(model), [2, 3], "mlp")
    graft(layer_of(model), [4], "affine")
    optim.sync(optimizer, model)
    train(model, optimizer, 1)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.0125, 0.0025])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.01]
    assert [len(g["params"]) for g in optimizer.param_groups] == [places[0], places[1] + 2]
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_an_optimizer_of_two_models() -> None:
    one, other = growing(), growing()
    optimizer = AdamW([*one.parameters(), *other.parameters()])
    for model in (one, other):
        loss_of(model, 0).backward()
    optimizer.step()
    graft(layer_of(other), [2], "mlp")
    carried = optim.sync(optimizer, one).carried
    assert {change.name for change in carried} == {"mlp_run0"}
    graft(layer_of(other), [3, 4], "mlp")
    held = stacks(other)
    del other, model
    gc.collect()
    assert {change.name for change in optim.sync(optimizer, one).carried} == {"another model's"}
    assert held[0].shape[0] == 8
    optimizer.step()


@pytest.mark.parametrize("kind", [nn.Linear, nn.Sequential])
def test_errors_of_sync(kind: Any) -> None:
    model = growing()
    optimizer = AdamW(model.parameters())
    plain = nn.Linear(2, 2) if kind is nn.Linear else nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(NoTargets, match="call kasminify"):
        optim.sync(optimizer, plain)
    for wrong in (model, None, [optimizer]):
        with pytest.raises(InvalidType, match=r"no torch\.optim\.Optimizer"):
            optim.sync(wrong, model)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(KasminaError, match=r"no nn\.Module"):
        optim.sync(optimizer, optimizer)  # type: ignore[arg-type]  # what is tested


def test_sync_of_dormant_layers_and_under_inference_mode() -> None:
    model = wrapped(OneLayer(), seeds=4)
    optimizer = AdamW(model.parameters())
    assert optim.sync(optimizer, model) == optim.SyncReport((), ())
    with torch.inference_mode():
        graft(layer_of(model), [0, 1], "mlp")
        optim.sync(optimizer, model)
    train(model, optimizer, 1)
    with torch.inference_mode():
        graft(layer_of(model), [2], "mlp")
        optim.sync(optimizer, model)
    train(model, optimizer, 1)
    state = optimizer.state[stacks(model)[0]]
    assert not any(torch.is_tensor(t) and t.is_inference() for t in state.values())
