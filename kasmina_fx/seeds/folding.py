"""Blended seeds whose blueprint is affine go into the weight of their host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.seeds.store import SeedStore


def why_not_folded(store: SeedStore, seed_id: int, uses: Mapping[int, int]) -> str | None:
    """The reason why a blended seed can't go into its host's weight; None if it can.

    Args:
        store: The seeds of the layer.
        seed_id: One of them.
        uses: How many modules of the model hold a parameter and how many layers watch it, by its
            ``id``.
    """
    held, host = store.bank_of(seed_id), store.host
    stage = SeedLifecycle(int(store.state.stages[seed_id]))
    if held is None or held[0].spec.kind != "affine":
        return "only affine blueprints fold into a weight"
    if stage is not SeedLifecycle.FOSSILIZED:
        return f"it is in {stage.name}, and only FOSSILIZED seeds fold"
    if not isinstance(host.base, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"a {type(host.base).__name__} has no weight to fold into"
    if is_parametrized(host.base):
        return "its base's weight is computed by a parametrization"
    if any(uses[id(p)] > 2 for p in host.parameters()):  # its module's and its layer's
        return "its base's weight is tied to another module's"
    if not all(bool(t.isfinite().all()) for t in held[0].slot_tensors(held[1]).values()):
        return "its blueprint holds NaN or Inf"
    return None


@torch.no_grad()
def fold_seeds(store: SeedStore) -> None:
    """Rows of the host's weight are scaled and its bias is shifted by what blended seeds do.

    ``y + alpha (s y + t - y)`` is ``(1 + alpha (s - 1)) y + alpha t``.
    """
    host: Any = store.host.base  # a Linear or a convolution: why_not_folded lets no other through
    for chunk, scale, shift in _affine_seeds(store):
        weight, bias = host.weight, host.bias
        if bias is None:
            bias = torch.zeros(store.chunks.layer_dim, dtype=weight.dtype, device=weight.device)
            host.bias = nn.Parameter(bias)
        weight[chunk] *= scale.view(-1, *[1] * (weight.dim() - 1))
        host.bias[chunk] = bias[chunk] * scale + shift


def _affine_seeds(store: SeedStore) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for seed_id in store.state.blended.nonzero().flatten().tolist():
        held = store.bank_of(seed_id)
        if held is not None:
            tensors, alpha = held[0].slot_tensors(held[1]), float(store.state.alphas[seed_id])
            scale, shift = tensors["scale"], tensors["shift"]
            yield store.chunks.chunk_slice(seed_id), 1 + alpha * (scale - 1), alpha * shift
