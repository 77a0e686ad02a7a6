"""Layers whose seeds are in any stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pytest
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
)
from kasmina_fx.config import SeedConfig

S = SeedLifecycle


#: From DORMANT to each stage, by legal steps.
WAY: Final = (
    S.GERMINATED,
    S.TRAINING,
    S.GRAFTING,
    S.STABILIZATION,
    S.EVALUATING,
    S.FINE_TUNING,
    S.FOSSILIZED,
)


PATHS: Final = {S.DORMANT: WAY[:0]} | {stage: WAY[: i + 1] for i, stage in enumerate(WAY)}


PATHS[S.CULLED], PATHS[S.CANCELLED] = (*WAY[:3], S.CULLED), (S.GERMINATED, S.CANCELLED)


PATHS[S.ROLLED_BACK] = (*WAY[:3], S.ROLLED_BACK)


NO_EMBARGO: Final = SeedConfig(embargo_epochs=0)


def stage_name(stage: SeedLifecycle) -> str:
    return stage.name


stages = pytest.mark.parametrize("stage", SeedLifecycle, ids=stage_name)


# Times 11 in a loop, for speed.
nows = pytest.mark.parametrize("now", SeedLifecycle, ids=stage_name)


def small_layer(**kwargs: Any) -> KasminaLayer:
    return KasminaLayer(nn.Linear(4, 6), 3, layer_id="fc", **kwargs)


def bring(layer: KasminaLayer, seeds: Sequence[int], stage: SeedLifecycle) -> None:
    """Dormant seeds to a stage, by legal steps."""
    for step in PATHS[stage]:
        if step is S.GERMINATED:
            assert layer.request_germination(seeds, "mlp", 1)
        else:
            layer.advance(seeds, step)
    layer.set_alpha(seeds, 0.0 if stage in (S.DORMANT, S.CULLED, S.CANCELLED) else 0.5)


def everything_of(layer: KasminaLayer) -> list[Any]:
    """Everything that a refused change must leave alone."""
    state, published = layer.state, layer.kasmina.shown
    tensors = [*layer.state_dict().values(), state.rows, state.alphas]
    tensors += [*published.layer, *published.seeds, *published.positions, *published.modes]
    held = [bank.held.tolist() for bank in layer.kasmina.bank_list()]
    return [t.tolist() for t in tensors if isinstance(t, Tensor)] + held
