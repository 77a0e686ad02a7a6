"""Blended seeds whose blueprint is linear go into the weight of their host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.seeds.store import SeedStore

#: Blueprints that are linear in their chunk.
_LINEAR: Final = ("affine", "lora")


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
    if held is None or held[0].spec.kind not in _LINEAR:
        return f"only {' and '.join(_LINEAR)} blueprints fold into a weight"
    if stage is not SeedLifecycle.FOSSILIZED:
        return f"it is in {stage.name}, and only FOSSILIZED seeds fold"
    if not isinstance(host.base, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"a {type(host.base).__name__} has no weight to fold into"
    if is_parametrized(host.base):
        return "its base's weight is computed by a parametrization"
    if not isinstance(host.base._parameters.get("weight"), nn.Parameter):
        return "its base's weight is computed by a hook (of prune, spectral_norm, weight_norm)"
    if host.base._forward_hooks and not hasattr(host.base, "kasmina"):
        return "hooks of its base change what the seeds are given"
    if any(uses[id(p)] > 2 for p in host.parameters()):  # its module's and its layer's
        return "its base's weight is tied to another module's"
    if not all(bool(t.isfinite().all()) for t in held[0].slot_tensors(held[1]).values()):
        return "its blueprint holds NaN or Inf"
    return None


@torch.no_grad()
def fold_seeds(store: SeedStore) -> None:
    """Rows of the host's weight, and its bias, become what blended seeds make of them.

    A blueprint ``B(y) = M y + t`` blended by alpha is ``(I + alpha (M - I)) y + alpha t``.
    """
    host: Any = store.host.base  # a Linear or a convolution: why_not_folded lets no other through
    for chunk, change, shift in _linear_seeds(store):
        weight, bias = host.weight, host.bias
        if bias is None and shift is not None:
            bias = torch.zeros(store.chunks.layer_dim, dtype=weight.dtype, device=weight.device)
            host.bias = nn.Parameter(bias)
        rows = weight[chunk]
        weight[chunk] = change(rows.flatten(1)).view_as(rows)
        if bias is not None:
            host.bias[chunk] = change(bias[chunk].unsqueeze(1)).squeeze(1)
        if shift is not None:
            host.bias[chunk] += shift


def _linear_seeds(
    store: SeedStore,
) -> Iterator[tuple[slice, Callable[[Tensor], Tensor], Tensor | None]]:
    """The chunk of each blended seed, what happens to its columns ``(size, n)``, and what is added.

    Of ``affine``, M is diagonal; of ``lora``, it is the identity and a product of low rank.
    """
    for seed_id in store.state.blended.nonzero().flatten().tolist():
        held = store.bank_of(seed_id)
        if held is None:
            continue
        tensors, alpha = held[0].slot_tensors(held[1]), float(store.state.alphas[seed_id])
        chunk = store.chunks.chunk_slice(seed_id)
        if held[0].spec.kind == "affine":
            scale = (1 + alpha * (tensors["scale"] - 1)).unsqueeze(1)
            yield chunk, partial(torch.mul, scale), alpha * tensors["shift"]
        else:
            down, up = tensors["down.weight"], tensors["up.weight"]
            yield chunk, partial(_plus_low_rank, down, alpha * up), None


def _plus_low_rank(down: Tensor, up: Tensor, columns: Tensor) -> Tensor:
    return columns + up @ (down @ columns)
