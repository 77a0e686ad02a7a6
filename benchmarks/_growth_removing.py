"""Experiment of `growth.py`: grown seeds removed by what they are worth, or at random."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from _growth_adapting import LR, grow, learn, seeded
from _growth_data import Digits, Scale, accuracy, adamw, generator, train, wide_host
from torch import Tensor, nn
from torch.nn import functional as F

import kasmina_fx
from kasmina_fx import SeedLifecycle, kasmina_layers

Scores = dict[str, dict[str, float]]

SEEDS, VALIDATION, TUNING = 8, 200, 60


def removing(replicate: int, scale: Scale) -> Scores:
    """16 grown seeds, some of them removed; then all arms take the same 60 steps."""
    data = Digits.of(replicate).shifted("rotated")
    kept_x, kept_y = data.train_x[-VALIDATION:], data.train_y[-VALIDATION:]
    data = replace(data, train_x=data.train_x[:-VALIDATION], train_y=data.train_y[:-VALIDATION])
    model = seeded(wide_host(replicate, scale), SEEDS)
    grow(model)
    learn(model, data, scale, replicate)
    batches = list(zip(kept_x.split(50), kept_y.split(50), strict=True))
    report = kasmina_fx.counterfactual(model, batches, loss, kasmina_fx.groups_by_seed(model))
    least = [group.name for group in reversed(report.groups)]
    order = torch.randperm(len(least), generator=generator(replicate)).tolist()
    random = [least[i] for i in order]

    def after(names: list[str]) -> float:
        left = copy.deepcopy(model)
        for name in names:
            layer, _, seed = name.rstrip("]").partition("[")
            kasmina_layers(left)[layer].advance([int(seed)], SeedLifecycle.CULLED)
        optimizer = adamw([p for p in left.parameters() if p.requires_grad], LR)
        train(left, optimizer, data, scale.steps(TUNING), replicate + 1000)
        return accuracy(left, data)

    found: Scores = {"16 seeds": {"none removed": after([])}}
    for share, count in {"25 %": len(least) // 4, "50 %": len(least) // 2}.items():
        found[f"{share} removed"] = {
            "by worth": after(least[:count]),
            "at random": after(random[:count]),
        }
        for how, score in found[f"{share} removed"].items():
            found["16 seeds"][f"{share} removed {how}"] = score
    return found


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
