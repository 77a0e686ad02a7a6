"""Layers whose seeds are in GRAFTING, and the signals that their strategies see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx import GraftingStrategy, KasminaLayer, SeedLifecycle
from kasmina_fx.config import SeedConfig
from kasmina_fx.grafting import (
    GraftingConfig,
    RampSignals,
    strategies,
)

S, G = SeedLifecycle, GraftingStrategy
S, G = SeedLifecycle, GraftingStrategy
NAN, INF = float("nan"), float("inf")
#: Every strategy that comes with the package, at its number.
ALL = dict(enumerate(strategies()))


def grafting_layer(
    strategy: int | str = G.FIXED_RAMP,
    seeds: Sequence[int] = (0,),
    *,
    ramp_every: str = "epoch",
    **grafting: Any,
) -> KasminaLayer:
    """A layer whose seeds have just entered GRAFTING."""
    config = SeedConfig(grafting=GraftingConfig(**grafting), ramp_every=ramp_every)
    layer = KasminaLayer(nn.Linear(4, 6), 3, layer_id="fc", config=config)
    graft(layer, strategy, seeds)
    return layer


def graft(layer: KasminaLayer, strategy: int | str, seeds: Sequence[int]) -> None:
    with layer.transaction():
        assert layer.request_germination(seeds, "affine", strategy)
        layer.advance(seeds, S.TRAINING)
        layer.advance(seeds, S.GRAFTING)


def alpha(layer: KasminaLayer, seed: int = 0) -> float:
    assert layer.state.alpha.tolist() == layer.state.alphas.tolist()
    assert layer.kasmina.shown.layer[0] is layer.state.alpha  # what forward reads
    return float(layer.state.alpha[seed])


def signals_at(alpha: Tensor, config: GraftingConfig | None = None, **changed: Any) -> RampSignals:
    zeros = torch.zeros_like(alpha)
    known: dict[str, Any] = {
        "loss": zeros,
        "previous_loss": zeros,
        "drift": zeros[0],
        "grad_norm": torch.tensor(NAN),
    }
    return RampSignals(alpha=alpha, config=config or GraftingConfig(), **(known | changed))


def set_weight_gradient(layer: KasminaLayer, norm: float) -> None:
    weight = layer.base.get_parameter("weight")
    weight.grad = torch.zeros_like(weight)
    weight.grad[1, 2] = norm
