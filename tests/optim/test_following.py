"""An optimizer follows a model for life, and one that misses stacks says so."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from torch import nn

from kasmina_fx import InvalidArgument, InvalidType, kasmina_layers, kasminify
from kasmina_fx.optim import follow
from kasmina_fx.testing import graft

X = torch.linspace(-1, 1, 8).view(2, 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return kasminify(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), num_seeds=2, compile=False)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[set[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    groups = optimizer.param_groups
    return [{names[id(p)].rpartition(".")[2] for p in g["params"]} for g in groups]


def test_one_call_for_the_life_of_both() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not follow(optimizer, model).added
    step(model, optimizer)
    for kind in ("affine", "mlp"):
        layer = kasmina_layers(model)["0"]
        graft(layer, [int(kind == "mlp")], kind)
        step(model, optimizer)
        held = layer.bank_of(int(kind == "mlp"))
        assert held is not None
        before = {name: t.clone() for name, t in held[0].slot_tensors(held[1]).items()}
        step(model, optimizer)
        for name, tensor in held[0].slot_tensors(held[1]).items():
            assert not torch.equal(tensor, before[name]), (kind, name)
    (held_names,) = names_in(optimizer, model)
    assert held_names >= {"scale", "shift", "up/weight", "down/bias"}


def test_biases_stay_out_of_weight_decay_unless_told_otherwise() -> None:
    model = net()
    weights = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups: list[Any] = [{"params": weights, "weight_decay": 0.1}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    follow(optimizer, model)
    graft(kasmina_layers(model)["0"], [0], "mlp")
    step(model, optimizer)
    assert names_in(optimizer, model) == [
        {"weight", "up/weight", "down/weight"},
        {"bias", "up/bias", "down/bias"},
    ]
    follow(optimizer, model, group=lambda name, stack: int("down" in name))
    graft(kasmina_layers(model)["1"], [0], "lora")
    step(model, optimizer)
    assert names_in(optimizer, model)[1] == {"bias", "up/bias", "down/bias", "down/weight"}


def test_what_is_no_group_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graft(kasmina_layers(model)["0"], [0], "mlp")
    with pytest.raises(InvalidType, match="group=1"):
        follow(optimizer, model, group=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="index that group gave=7"):
        follow(optimizer, model, group=lambda name, stack: 7)
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_a_model_that_is_gone_is_not_followed() -> None:
    model, other = net(), net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    follow(optimizer, model)
    follow(optimizer, other)
    del model
    gc.collect()
    graft(kasmina_layers(other)["0"], [0], "mlp")
    step(other, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 12


def test_a_forgotten_call_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    graft(kasmina_layers(model)["0"], [0], "mlp")
    with caplog.at_level(logging.WARNING, logger="kasmina_fx"):
        for _ in range(5):
            step(model, optimizer)
        graft(kasmina_layers(model)["0"], [1], "lora")
        for _ in range(5):
            step(model, optimizer)
    (record,) = caplog.records
    assert "the SGD steps the host" in record.message
    assert "optim.follow(optimizer, model)" in record.message


def test_two_optimizers_that_share_the_work_are_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    graft(kasmina_layers(model)["0"], [0], "mlp")
    hosts = [p for n, p in model.named_parameters() if "kasmina" not in n]
    stacks = [p for n, p in model.named_parameters() if "kasmina" in n]
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in (hosts, stacks)]
    with caplog.at_level(logging.WARNING, logger="kasmina_fx"):
        for _ in range(4):
            for optimizer in optimizers:
                step(model, optimizer)
    assert not caplog.records
