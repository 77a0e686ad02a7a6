"""Epochs of a stage, and the rest of a culled seed."""

from __future__ import annotations

import pytest
import torch
from life_cases import NO_EMBARGO, S, bring, small_layer

from kasmina_fx import (
    IllegalTransition,
)
from kasmina_fx.config import SeedConfig

# Epochs.


def test_epochs_count_in_step_epoch_alone() -> None:
    layer = small_layer()
    bring(layer, [0], S.GRAFTING)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        layer.get_health_report()
        layer.set_alpha(0, 0.25)
    assert layer.state.epochs.tolist() == [0, 0, 0]
    layer.step_epoch()
    layer.step_epoch()
    assert layer.state.state_tensor[:, 2].tolist() == [2, 0, 0]
    layer.advance(0, S.STABILIZATION)
    assert layer.state.epochs.tolist() == [0, 0, 0]


def test_epochs_stop_at_what_int16_holds() -> None:
    layer = small_layer()
    bring(layer, [1, 2], S.TRAINING)
    layer.state.set_rows(2, epochs_in_state=32_766)
    for expected in ([0, 1, 32_767], [0, 2, 32_767], [0, 3, 32_767]):
        layer.step_epoch()
        assert layer.state.state_tensor[:, 2].tolist() == expected


# The embargo.


@pytest.mark.parametrize("embargo", [None, 1, 3])
def test_a_culled_seed_rests_and_becomes_dormant_by_itself(embargo: int | None) -> None:
    layer = (
        small_layer() if embargo is None else small_layer(config=SeedConfig(embargo_epochs=embargo))
    )
    bring(layer, [0], S.CULLED)
    layer.step_epoch()
    bring(layer, [2], S.CULLED)  # an epoch later
    left = (5 if embargo is None else embargo) - 1
    while left:
        with pytest.raises(IllegalTransition, match=f"none; its embargo lasts {left} epochs") as e:
            layer.advance(0, S.DORMANT)
        assert (e.value.seed, e.value.legal) == (0, ())
        assert not layer.request_germination(0, "affine")
        assert layer.seeds[0].stage is S.CULLED
        layer.step_epoch()
        left -= 1
    assert layer.state.rows[0].tolist() == [0, 0, 0, 0]
    assert layer.seeds[2].stage is S.CULLED
    layer.step_epoch()
    assert layer.state.rows.tolist() == [[0] * 4] * 3
    assert layer.request_germination([0, 2], "affine")


def test_without_an_embargo_a_culled_seed_may_become_dormant_at_once() -> None:
    layer = small_layer(config=NO_EMBARGO)
    bring(layer, [0], S.CULLED)
    layer.advance(0, S.DORMANT)
    assert layer.request_germination(0, "affine")


def test_without_an_embargo_a_culled_seed_becomes_dormant_at_the_next_epoch() -> None:
    layer = small_layer(config=NO_EMBARGO)
    bring(layer, [0], S.CULLED)
    layer.step_epoch()
    assert layer.seeds[0].stage is S.DORMANT


def test_a_state_dict_from_a_longer_embargo_leaves_no_seed_culled_for_good() -> None:
    patient, hasty = (small_layer(config=SeedConfig(embargo_epochs=n)) for n in (9, 2))
    bring(patient, [0], S.CULLED)
    for _ in range(4):
        patient.step_epoch()
    hasty.load_state_dict(patient.state_dict())
    hasty.step_epoch()
    assert hasty.seeds[0].stage is S.DORMANT


def test_only_culled_seeds_rest() -> None:
    layer = small_layer()
    bring(layer, [0], S.CANCELLED)
    layer.step_epoch()
    assert layer.seeds[0].stage is S.CANCELLED  # the controller decides
    layer.advance(0, S.DORMANT)
    assert layer.request_germination(0, "affine")
