"""Layers and stacks that would mix things up are refused."""

from __future__ import annotations

import pytest
from small_net_cases import X, layer_of, net
from torch import nn
from torch.nn.utils import parametrize

from kasmina_fx import (
    InvalidArgument,
    KasminaLayer,
)
from kasmina_fx.testing import graft


def test_a_stack_is_not_parametrized() -> None:
    model = net()
    graft(layer_of(model), [0], "mlp")
    (bank,) = layer_of(model).kasmina.bank_list()
    parametrize.register_parametrization(bank, "up/weight", nn.Identity())
    with pytest.raises(InvalidArgument, match=r"mlp_run0 lacks its parameters \['up/weight'\]"):
        model(X)


def test_a_layer_around_a_layer_is_refused() -> None:
    inner = KasminaLayer(nn.Linear(4, 6), 3)
    for base in (inner, nn.Sequential(inner)):
        with pytest.raises(InvalidArgument, match="has seeds already"):
            KasminaLayer(base, 3, chunk_sizes=[2, 2, 2], feature_dim=-1)
