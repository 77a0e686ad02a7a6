"""Initial values come from random numbers of the package's own."""

from __future__ import annotations

import torch
from small_net_cases import layer_of, net
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
)
from kasmina_fx.testing import graft


def test_a_germination_draws_nothing_from_the_users_generator() -> None:
    model = net()
    before = torch.get_rng_state()
    layer_of(model).request_germination([0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_values_follow_from_seed_layer_and_blueprint_id() -> None:
    def values(start: int = 7, seed: int = 0, name: str = "fc") -> Tensor:
        layer = KasminaLayer(nn.Linear(4, 6), 3, layer_id=name)
        torch.manual_seed(start)
        torch.rand(seed + 1)  # how many numbers the user drew does not matter
        graft(layer, [seed])
        held = layer.bank_of(seed)
        assert held is not None
        return held[0].slot_tensors(held[1])["up.weight"]

    assert torch.equal(values(), values())
    assert torch.equal(values(), values(seed=1))  # the first blueprint of its layer, too
    assert not torch.equal(values(), values(start=8))
    assert not torch.equal(values(), values(name="out"))
