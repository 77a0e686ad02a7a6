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
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.lifecycle import LEARNS_TASK, RECONSTRUCTS, RUNS, SeedLifecycle
from kasmina_fx.seeds.store import SeedStore


def process_chunk(store: SeedStore, seed_id: int, chunk: Tensor) -> Tensor:
    """What a seed makes of its chunk; see :meth:`kasmina_fx.LogicalSeed.process_chunk`."""
    require_features(chunk, store.chunks.feature_dim, store.chunks.sizes[seed_id])
    if store.packs.mixed is not None:
        raise InvalidArgument(
            f"{store.name}: seed by seed, all samples go through one pack: activate one by its name"
        )
    stage = SeedLifecycle(int(store.state.stages[seed_id]))
    if store.bank_of(seed_id) is None or stage not in RUNS or seed_id in store.off:
        return chunk
    tensors = _parameters(store, seed_id, trains=stage in LEARNS_TASK | RECONSTRUCTS)
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        return chunk
    if stage in RECONSTRUCTS:
        made = _apply_blueprint(store, seed_id, tensors, chunk.detach())
        error = _wide(made, chunk) - _wide(chunk, made).detach()
        fits = made.detach().to(chunk.dtype).isfinite() & error.detach().isfinite()
        loss = torch.where(fits, error, 0.0).square().mean()
        out: Tensor = WithLoss.apply(chunk, loss, store.scale())  # type: ignore[no-untyped-call]  # torch's, unannotated
        return out
    made = _apply_blueprint(store, seed_id, tensors, chunk)
    exact, alpha = _wide(chunk, made), float(store.state.alphas[seed_id])
    blend = (exact + alpha * (_wide(made, chunk) - exact)).to(chunk.dtype)
    fits = made.detach().to(chunk.dtype).isfinite() & blend.detach().isfinite()
    return torch.where(fits, blend, chunk)


def _wide(values: Tensor, other: Tensor) -> Tensor:
    """Convert to a dtype that holds both, float32 or more."""
    wide = torch.promote_types(values.dtype, other.dtype)
    return values.to(torch.promote_types(wide, torch.float32))


def _parameters(store: SeedStore, seed_id: int, *, trains: bool) -> dict[str, Tensor]:
    """The blueprint's tensors, named as in its module; detached where nothing may train them."""
    held = store.bank_of(seed_id)
    assert held is not None  # asked for by process_chunk alone
    bank, slot = held
    tensors = bank.slot_tensors(slot)
    return tensors if trains else {name: tensor.detach() for name, tensor in tensors.items()}


def _apply_blueprint(
    store: SeedStore, seed_id: int, tensors: dict[str, Tensor], chunk: Tensor
) -> Tensor:
    held = store.bank_of(seed_id)
    assert held is not None  # asked for by process_chunk alone
    bank, _ = held
    with aside():  # its values don't matter
        module: Any = bank.blueprint.module(bank.run.size)
    module.to(chunk.device)
    module.train(store.training)
    if isinstance(module, PerFeature):  # acts on features wherever they are
        module.dim = store.chunks.feature_dim
    # What is not finite goes no further: at the end each element, at the start each element of the
    # chunk, and the parameters' gradients together.
    names = list(tensors)
    chunk, *guarded = OnlyFinite.apply(chunk, *tensors.values())  # type: ignore[no-untyped-call]  # torch's, unannotated
    own = dict(zip(names, guarded, strict=True))
    out: Tensor = functional_call(module, own, chunk.clone())  # it may write to its input
    (out,) = OnlyFinite.apply(out)  # type: ignore[no-untyped-call]  # torch's, unannotated
    return out


class OnlyFinite(torch.autograd.Function):
    """Hands tensors on; backward drops what is not finite.

    Of the first tensor's gradient that is each element for itself; those of the others are dropped
    together.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Hand them on."""
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Hand on what is finite."""
        first, *others = grads
        kept = torch.where(first.isfinite(), first, 0.0)
        if all(bool(grad.isfinite().all()) for grad in others):
            return (kept, *others)
        return (kept, *(torch.zeros_like(grad) for grad in others))


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
