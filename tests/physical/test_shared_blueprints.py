"""Seeds that share a blueprint and are in different stages: who trains it, who is blamed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import KasminaLayer, SeedLifecycle, reference
from kasmina_fx.lifecycle import Mode
from kasmina_fx.physical.operators import GUARD
from kasmina_fx.testing import graft

S = SeedLifecycle


def gradients(layer: KasminaLayer, by_reference: bool, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    out = reference.forward(layer, x) if by_reference else layer(x)
    out.square().sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]


@pytest.mark.parametrize("other", [S.STABILIZATION, S.GRAFTING, S.FOSSILIZED, S.TRAINING])
def test_a_seed_in_training_trains_the_blueprint_that_it_shares(other: S) -> None:
    layer = KasminaLayer(nn.Linear(4, 12).double(), 4)
    shared = layer.register_blueprint("mlp")
    graft(layer, [0], shared, stage=S.TRAINING)
    graft(layer, [1], shared, stage=other)
    x = torch.randn(5, 4, dtype=torch.float64)
    own, expected = gradients(layer, False, x), gradients(layer, True, x)
    for mine, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(bool(g.any()) for g in own[2:6])  # the blueprint's four tensors


@pytest.mark.parametrize("stages", [(S.STABILIZATION, S.EVALUATING), (S.FOSSILIZED, S.EVALUATING)])
def test_a_shared_blueprint_that_nobody_trains_gets_no_gradient(stages: tuple[S, S]) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    shared = layer.register_blueprint("mlp")
    for seed, stage in enumerate(stages):
        graft(layer, [seed], shared, stage=stage)
    layer(torch.randn(5, 4)).square().sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in layer.blueprint_parameters())


@pytest.mark.parametrize(("blames", "counted"), [((1, 1), 1.0), ((1, 0), 0.0), ((0, 0), 0.0)])
def test_a_slot_is_blamed_only_if_all_of_its_places_are(
    blames: tuple[int, int], counted: float
) -> None:
    rows = torch.ones(1, 2, 3, requires_grad=True)
    weight = torch.ones(1, 3, requires_grad=True)
    modes, positions = torch.full((1, 2), int(Mode.LEARNS)), torch.tensor([0, 1])
    faults = torch.zeros(2, requires_grad=True)
    guarded, weights, *_ = GUARD(
        [rows, weight], modes, positions, faults, torch.tensor([blames], dtype=torch.bool)
    )
    (guarded * weights.unsqueeze(1) * torch.tensor(torch.inf)).sum().backward()
    assert faults.grad is not None
    assert faults.grad.tolist() == [counted, counted]
    assert rows.grad is not None
    assert not rows.grad.any()


def test_a_slot_learns_alone_only_if_no_place_of_it_learns_from_the_models_loss() -> None:
    modes = torch.tensor(
        [
            [Mode.LEARNS, Mode.RECONSTRUCTS],
            [Mode.RECONSTRUCTS, Mode.FROZEN],
            [Mode.LEARNS, Mode.LEARNS],
        ]
    )
    *_, alone, _ = GUARD(
        [torch.zeros(3, 2, 1)],
        modes,
        torch.arange(6),
        torch.zeros(6, requires_grad=True),
        torch.ones(3, 2, dtype=torch.bool),
    )
    assert alone.tolist() == [0.0, 1.0, 0.0]


def test_seeds_of_every_bank_of_a_run_report_their_own_loss() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    for seed, kind in enumerate(["mlp", "affine", "lora"]):
        graft(layer, [seed], kind)
        with torch.no_grad():
            held = layer.bank_of(seed)
            assert held is not None
            for tensor in held[0].slot_tensors(held[1]).values():
                tensor.add_(0.5 * (seed + 1))
    x = torch.randn(5, 4)
    y, expected = layer.base(x), []
    layer.set_alpha([0, 1, 2], 1.0)
    for seed in range(3):
        chunk = y[:, layer.seeds[seed].chunk]
        expected.append((layer.seeds[seed].process_chunk(chunk) - chunk).square().mean())
    layer(x)
    report = layer.get_health_report()
    torch.testing.assert_close(report["reconstruction_loss"][:3], torch.stack(expected).detach())
    assert bool(report["reconstruction_loss"][3].isnan())
