"""Hybrid layers that hold the mixes of seeds of layer_cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from layer_cases import (
    Case,
    perturb,
)
from torch import nn

from kasmina_fx import (
    FeatureFlagManager,
    HybridKasminaLayer,
    KasminaLayer,
)

FEATURE = "chunked_architecture"


def flags_in_memory() -> FeatureFlagManager:
    return FeatureFlagManager("no_such_file.json")


def hybrid(case: Case, mix: Callable[[KasminaLayer], None], **kwargs: Any) -> HybridKasminaLayer:
    layer = HybridKasminaLayer(
        case.base(),
        "fc",
        case.num_seeds,
        chunk_sizes=case.chunk_sizes,
        feature_flags=flags_in_memory(),
        **kwargs,
    )
    mix(layer)
    perturb(layer)
    return layer


def inputs_of(case: Case) -> tuple[torch.Tensor, ...]:
    return tuple(x.float() if x.is_floating_point() else x for x in case.inputs())


def small(**kwargs: Any) -> HybridKasminaLayer:
    kwargs.setdefault("feature_flags", flags_in_memory())
    return HybridKasminaLayer(nn.Linear(4, 6), "fc", 3, **kwargs)


MODES = ("legacy", "chunked")


def ran(layer: HybridKasminaLayer) -> str:
    before = layer.get_implementation_stats()["calls"]
    layer(torch.ones(2, 4))
    after = layer.get_implementation_stats()["calls"]
    (name,) = (name for name in MODES if after[name] > before[name])
    return name
