"""An optimizer's state in a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import contents_of, everything, forge, grown, network, used
from torch import nn

from kasmina_fx import (
    checkpoint,
    kasmina_layers,
)
from kasmina_fx.errors import CheckpointError
from kasmina_fx.testing import graft


def _adam(model: nn.Module, groups: int = 1) -> Any:
    named = list(model.named_parameters())
    split = [[p for name, p in named if name.startswith("0")], [p for _, p in named]]
    first = {id(p) for p in split[0]}
    split[1] = [p for p in split[1] if id(p) not in first]
    lists = split if groups == 2 else [[p for _, p in named]]
    return torch.optim.Adam([{"params": p, "lr": 0.1 / (i + 1)} for i, p in enumerate(lists)])


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(7, 5)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("saved_reserve", "reserve"), [(0, 0), (0, 8), (8, 0), (2, 2)])
def test_training_goes_on_as_if_it_had_not_stopped(
    path: Path, saved_reserve: int, reserve: int, groups: int
) -> None:
    model, fresh = grown(reserve=saved_reserve), network(reserve=reserve)
    optimizer = _adam(model, groups)
    _train(model, optimizer, 3)
    checkpoint.save(model, path, optimizer=optimizer)
    other = _adam(fresh, groups)
    for group in other.param_groups:
        group["lr"] = 7.0
    checkpoint.load(fresh, path, optimizer=other)
    owned = {id(p) for group in other.param_groups for p in group["params"]}
    assert owned == {id(p) for p in fresh.parameters()}
    for each, its in ((model, optimizer), (fresh, other)):
        _train(each, its, 3)
    assert used(fresh) == used(model)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_what_the_target_and_its_optimizer_had_before_does_not_matter(path: Path) -> None:
    model, target = grown(), network()
    for layer in kasmina_layers(target).values():
        graft(layer, [1, 2, 3], "mlp", 0.7)
    optimizer, other = _adam(model), _adam(target)
    _train(model, optimizer, 3)
    _train(target, other, 1)
    graft(kasmina_layers(target)["0"], 0, "mlp", 0.7)
    checkpoint.save(model, path, optimizer=optimizer)
    checkpoint.load(target, path, optimizer=other)
    for each, its in ((model, optimizer), (target, other)):
        _train(each, its, 3)
    assert used(target) == used(model)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
def test_banks_that_only_the_model_has_stay_in_their_group(path: Path, kind: Any) -> None:
    source, target = network(), network(reserve=2)
    optimizer, other = (
        kind([{"params": model[0].parameters()}, {"params": model[3].parameters()}])
        for model in (source, target)
    )
    before = [{id(p) for p in group["params"]} for group in other.param_groups]
    _train(source, optimizer, 1)
    checkpoint.save(source, path, optimizer=optimizer)
    checkpoint.load(target, path, optimizer=other)
    assert [{id(p) for p in group["params"]} for group in other.param_groups] == before
    for each, its in ((source, optimizer), (target, other)):
        graft(kasmina_layers(each)["0"], 1, "affine", 0.7)
        _train(each, its, 2)
    assert used(target) == used(source)
    graft(kasmina_layers(target)["0"], 2, "mlp", 0.7)
    _train(target, other, 2)


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)])
def test_names_in_the_groups_follow_the_parameters(path: Path, named: tuple[bool, bool]) -> None:
    models = [grown(), network()]
    optimizers = [
        torch.optim.SGD(m.named_parameters() if n else m.parameters(), momentum=0.9)
        for m, n in zip(models, named, strict=True)
    ]
    _train(models[0], optimizers[0], 1)
    checkpoint.save(models[0], path, optimizer=optimizers[0])
    checkpoint.load(models[1], path, optimizer=optimizers[1])
    (group,) = optimizers[1].param_groups
    parameters = dict(models[1].named_parameters())
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        assert parameters[name] is parameter
    for each, its in zip(models, optimizers, strict=True):
        _train(each, its, 2)
    assert used(models[0]) == used(models[1])


def test_a_model_alone_is_taken_from_a_file_with_an_optimizer(path: Path) -> None:
    model, fresh = grown(), network()
    checkpoint.save(model, path, optimizer=_adam(model))
    checkpoint.load(fresh, path)
    assert used(fresh) == used(model)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters())


def _host_only(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for n, p in model.named_parameters() if n in ("0.weight", "0.bias")])


def _other_way_round(model: nn.Module) -> torch.optim.Optimizer:
    """The stacks of the first layer in the second layer's group."""
    stacks = [p for n, p in model.named_parameters() if n.startswith("0.kasmina")]
    moved = {id(p) for p in stacks}
    first = [p for n, p in model.named_parameters() if n[0] == "0" and id(p) not in moved]
    rest = [p for n, p in model.named_parameters() if n[0] != "0"]
    return torch.optim.Adam([{"params": first}, {"params": rest + stacks}])


def _stranger(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([*model.parameters(), nn.Parameter(torch.zeros(1))])


def _packed(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def changed(contents: dict[str, Any]) -> None:
        change(contents["optimizer"])

    return changed


#: How the file is edited, the optimizer that loads it, and what the refusal says.
OTHER_OPTIMIZERS: dict[str, tuple[Callable[[dict[str, Any]], None], Any, str]] = {
    "none": (lambda c: c.update(optimizer=None), _adam, "holds no optimizer"),
    "another class": (lambda c: None, _sgd, "holds a Adam .*the optimizer is a SGD"),
    "another number of groups": (lambda c: None, lambda m: _adam(m, 1), "2 parameter groups"),
    "fewer parameters": (
        _packed(lambda o: o.update(names=o["names"][1:], state=_one_group(o["state"]))),
        _host_only,
        r"other parameters: \['0.bias'",
    ),
    "other groups": (lambda c: None, _other_way_round, "in another group"),
    "a bank that no layer has": (
        _packed(lambda o: o["names"][0].__setitem__(-1, "0.kasmina.banks.nope.x")),
        lambda m: _adam(m, 2),
        "other parameters",
    ),
    "a parameter of no model": (lambda c: None, _stranger, "1 of the optimizer's"),
    "no names": (_packed(lambda o: o.pop("names")), lambda m: _adam(m, 2), "malformed"),
    "names that don't match": (
        _packed(lambda o: o["names"][0].pop()),
        lambda m: _adam(m, 2),
        "don't match",
    ),
    "no state": (
        _packed(lambda o: o["state"].update(state=None)),
        lambda m: _adam(m, 2),
        "don't match",
    ),
}


def _in_state(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def changed(contents: dict[str, Any]) -> None:
        state = next(iter(contents["optimizer"]["state"]["state"].values()))
        state[name] = change(state[name])

    return changed


def _in_group(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda contents: change(contents["optimizer"]["state"]["param_groups"][0])


def _of_two(m: Any) -> Any:
    return _adam(m, 2)


OTHER_OPTIMIZERS |= {
    "no step": (_in_state("step", lambda t: None), _of_two, "step=None: a number"),
    "a step that is NaN": (_in_state("step", lambda t: t * torch.nan), _of_two, "step=.*nan"),
    "a step below 0": (_in_state("step", lambda t: -1), _of_two, "step=-1"),
    "moments of another shape": (
        _in_state("exp_avg", lambda t: t[:1]), _of_two, r"exp_avg is \(.*; its parameter is"
    ),
    "moments of another kind": (_in_state("exp_avg", lambda t: 3.0), _of_two, "exp_avg is float"),
    "sparse moments": (
        _in_state("exp_avg", lambda t: t.to_sparse()), _of_two, "no dense tensor|weights_only"
    ),
    "no learning rate": (_in_group(lambda g: g.pop("lr")), _of_two, "group 0: it lacks 'lr'"),
    "a learning rate of another kind": (
        _in_group(lambda g: g.update(lr="fast")), _of_two, "lr='fast'; the optimizer has"
    ),
    "a learning rate that is NaN": (
        _in_group(lambda g: g.update(lr=float("nan"))), _of_two, "lr=nan is not finite"
    ),
    "one beta": (_in_group(lambda g: g.update(betas=(0.9,))), _of_two, "betas="),
    "state of no parameter": (
        _packed(lambda o: o["state"]["state"].update({99: {}})), _of_two, "state of 99"
    ),
}  # fmt: skip


def _one_group(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "param_groups": state["param_groups"][1:]}


@pytest.mark.parametrize(
    ("edit", "build", "match"), OTHER_OPTIMIZERS.values(), ids=OTHER_OPTIMIZERS
)
def test_an_optimizer_that_does_not_fit_is_refused_and_nothing_changes(
    path: Path, edit: Callable[[dict[str, Any]], None], build: Any, match: str
) -> None:
    source, model = grown(), grown()
    optimizer = _adam(source, 2)
    _train(source, optimizer, 1)
    checkpoint.save(source, path, optimizer=optimizer)
    contents = contents_of(path)
    edit(contents)
    forge(path, contents)
    other = build(model)
    _train(model, other, 1)
    before = everything(model, other)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.load(model, path, optimizer=other)
    assert everything(model, other) == before


def test_an_optimizer_of_another_model_is_not_saved(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"2 of the optimizer's 2 .*optim.sync"):
        checkpoint.save(nn.Linear(2, 2), path, optimizer=_adam(nn.Linear(2, 2)))
    assert list(path.parent.iterdir()) == []


def test_a_save_while_another_threads_step_is_under_way_says_so(path: Path) -> None:
    model = grown()
    optimizer: Any = _sgd(model)
    _train(model, optimizer, 1)
    layer = kasmina_layers(model)["0"]
    said: list[BaseException] = []

    def control() -> None:
        layer.reserve(16, "mlp")
        try:
            checkpoint.save(model, path, optimizer=optimizer)
        except CheckpointError as error:
            said.append(error)

    def closure() -> torch.Tensor:
        thread = threading.Thread(target=control)
        thread.start()
        thread.join()
        return torch.zeros(())

    optimizer.step(closure)
    (error,) = said
    assert "in the middle of a step" in str(error)
    checkpoint.save(model, path, optimizer=optimizer)  # the step has taken the larger stacks
