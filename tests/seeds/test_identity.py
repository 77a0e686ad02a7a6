"""Blueprints that start as the identity: which do, and that their seeds may skip TRAINING."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kasmina_fx import IllegalTransition, KasminaLayer, SeedLifecycle
from kasmina_fx.blueprints import lookup, names
from kasmina_fx.lifecycle import LEGAL_FOR_IDENTITY

STATED = ("residual_mlp", "lora", "affine", "bottleneck")
S = SeedLifecycle


def test_the_built_ins_that_state_it() -> None:
    builtin = {name for name in names() if type(lookup(name)).__module__.endswith("builtin")}
    assert {name for name in builtin if lookup(name).starts_as_identity} == set(STATED)
    assert LEGAL_FOR_IDENTITY == {S.GERMINATED: S.GRAFTING}


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("kind", STATED)
def test_what_states_it_starts_as_the_identity_to_the_bit(kind: str, size: int) -> None:
    blueprint, chunks = lookup(kind), torch.randn(2, 1, 7, size)
    assert torch.equal(blueprint.module(size)(chunks[0, 0]), chunks[0, 0])
    assert torch.equal(blueprint.stacked(blueprint.initial(size, 2), chunks, -1), chunks)


@pytest.mark.parametrize("kind", STATED)
def test_its_seeds_go_from_germinated_to_grafting(kind: str) -> None:
    layer, x = KasminaLayer(nn.Linear(4, 12), 4), torch.randn(5, 4)
    plain = layer(x)
    layer.request_germination([0, 2], kind)
    layer.advance([0, 2], S.GRAFTING)
    layer.set_alpha([0, 2], 1.0)
    assert layer.state.get_state_distribution() == {"DORMANT": 2, "GRAFTING": 2}
    assert torch.allclose(layer(x), plain, atol=1e-6)


def test_others_may_not_and_one_of_them_holds_back_all() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination([0, 1], "residual_mlp")
    layer.request_germination(2, "mlp")
    with pytest.raises(IllegalTransition, match="seed 2 can't go from GERMINATED to GRAFTING") as e:
        layer.advance([0, 1, 2], "GRAFTING")
    assert "this one, if its own blueprint starts as the identity" in str(e.value)
    assert layer.state.get_state_distribution() == {"DORMANT": 1, "GERMINATED": 3}


def test_a_shared_blueprint_may_have_learnt_already() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination(1, layer.register_blueprint("affine"))
    with pytest.raises(IllegalTransition):
        layer.advance(1, S.GRAFTING)


def test_the_state_by_itself_knows_no_blueprint() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination(1, "affine")
    with pytest.raises(IllegalTransition, match="legal from GERMINATED: TRAINING, CANCELLED"):
        layer.state.advance(1, S.GRAFTING)


def test_other_steps_stay_illegal() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination(1, "affine")
    for stage in (S.STABILIZATION, S.FOSSILIZED, S.DORMANT):
        with pytest.raises(IllegalTransition) as e:
            layer.advance(1, stage)
        assert "identity" not in str(e.value)
