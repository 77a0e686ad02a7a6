"""A slot that several seeds share trains as long as one of them may."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from kasmina_fx import KasminaLayer, SeedLifecycle
from kasmina_fx.testing import graft

S = SeedLifecycle


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize(
    ("stages", "trains"),
    [
        ([S.GRAFTING], True),
        ([S.GRAFTING, S.STABILIZATION], True),
        ([S.STABILIZATION, S.TRAINING, S.FOSSILIZED], True),
        ([S.STABILIZATION], False),
        ([S.STABILIZATION, S.FOSSILIZED], False),
    ],
)
def test_an_optimizer_moves_it_exactly_then(
    stages: list[S], trains: bool, kind: type[torch.optim.Optimizer]
) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    shared = layer.register_blueprint("mlp")
    for seed, stage in enumerate(stages):
        graft(layer, [seed], shared, stage=stage)
    stacks = list(layer.blueprint_parameters())
    before = [stack.detach().clone() for stack in stacks]
    optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.1)  # type: ignore[call-arg]  # both take them
    for _ in range(2):
        layer(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    same = [torch.equal(a, b) for a, b in zip(stacks, before, strict=True)]
    assert same == [not trains] * len(stacks)
