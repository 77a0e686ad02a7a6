"""One seed on one chunk, by the definition, in plain PyTorch.

The reference is made of this, and every other path is judged by the reference. So nothing here is
shared with what graphs compute: the blueprint is its plain module, and the check for NaN and Inf
asks each number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from kasmina_fx.bases.features import require_features
from kasmina_fx.blueprints.base import aside
from kasmina_fx.blueprints.builtin import PerFeature
from kasmina_fx.lifecycle import LEARNS_TASK, RECONSTRUCTS, RUNS, SeedLifecycle
from kasmina_fx.seeds.store import SeedStore


def process_chunk(store: SeedStore, seed_id: int, chunk: Tensor) -> Tensor:
    """What a seed makes of its chunk; see :meth:`kasmina_fx.LogicalSeed.process_chunk`."""
    require_features(chunk, store.chunks.feature_dim, store.chunks.sizes[seed_id])
    stage = SeedLifecycle(int(store.state.stages[seed_id]))
    if store.bank_of(seed_id) is None or stage not in RUNS:
        return chunk
    if stage in RECONSTRUCTS:
        made = _apply_blueprint(store, seed_id, chunk.detach())
        error = _wide(made, chunk) - _wide(chunk, made).detach()
        if not bool(error.isfinite().all()):
            return chunk
        loss = error.square().mean()
        out: Tensor = WithLoss.apply(chunk, loss, store.scale())  # type: ignore[no-untyped-call]  # torch's, unannotated
        return out
    made = _apply_blueprint(store, seed_id, chunk)
    if not _can_be_blended(made.detach(), chunk.detach()):
        return chunk
    exact, alpha = _wide(chunk, made), float(store.state.alphas[seed_id])
    return (exact + alpha * (_wide(made, chunk) - exact)).to(chunk.dtype)


def _wide(values: Tensor, other: Tensor) -> Tensor:
    """Convert to a dtype that holds both, float32 or more."""
    wide = torch.promote_types(values.dtype, other.dtype)
    return values.to(torch.promote_types(wide, torch.float32))


def _can_be_blended(made: Tensor, chunk: Tensor) -> bool:
    """All of it fits the host's dtype, and so does any blend of the two."""
    difference = _wide(made, chunk) - _wide(chunk, made)
    fits = made.to(chunk.dtype).isfinite() & made.isfinite() & chunk.isfinite()
    return bool((fits & difference.isfinite()).all())


def _apply_blueprint(store: SeedStore, seed_id: int, chunk: Tensor) -> Tensor:
    held = store.bank_of(seed_id)
    assert held is not None  # asked for by process_chunk alone
    bank, slot = held
    with aside():  # its values don't matter
        module: Any = bank.blueprint.module(bank.run.size)
    module.to(chunk.device)
    module.train(store.training)
    if isinstance(module, PerFeature):  # acts on features wherever they are
        module.dim = store.chunks.feature_dim
    tensors = bank.slot_tensors(slot)
    if SeedLifecycle(int(store.state.stages[seed_id])) not in LEARNS_TASK | RECONSTRUCTS:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    out: Tensor = functional_call(module, tensors, chunk.clone())  # it may write to its input
    return out


class WithLoss(torch.autograd.Function):
    """Hands a tensor on; backward also starts from a loss that nobody added to the model's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        """Hand ``x`` on."""
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradient of ``x``, and the loss's weight."""
        (scale,) = ctx.saved_tensors
        return grad, scale.to(ctx.loss_dtype), None
