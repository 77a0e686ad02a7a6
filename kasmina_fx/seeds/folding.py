"""Blended seeds whose blueprint is linear go into the weight of their host.

A blueprint ``B(y) = M y + t`` blended by alpha is ``A y + alpha t``, where ``A = I + alpha (M -
I)``. Of a host ``y = W x + b`` that makes the weight ``A W`` and the bias ``A b + alpha t``. It is
computed in float64 and rounded once, to the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from kasmina_fx.banks.bank import Bank
from kasmina_fx.bases.host import Host
from kasmina_fx.bases.linear import spans_groups, why_not_linear
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.physical.rows import finite_rows
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.buffers import to_device

#: Numbers of a weight that are changed at a time: so many in float64 stay in a CPU's cache, and are
#: few launches elsewhere.
_BLOCK: Final = (1 << 18, 1 << 22)


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
    if held is None or held[0].spec.kind not in LINEAR:
        return _ONLY
    bank, slot = held
    if stage is not SeedLifecycle.FOSSILIZED:
        return f"it is in {stage.name}, and only FOSSILIZED seeds fold"
    local = torch.tensor([seed_id - bank.run.first_seed], device="cpu")
    why = why_no_host(store) or why_no_weight(host) or why_no_chunks(bank, host, local)
    if why is not None:
        return why
    if host.base._forward_hooks and not hasattr(host.base, "kasmina"):
        return "hooks of its base change what the seeds are given"
    if any(uses[id(p)] > 2 for p in host.parameters()):  # its module's and its layer's
        return "its base's weight is tied to another module's"
    if not all(bool(t.isfinite().all()) for t in bank.slot_tensors(slot).values()):
        return "its blueprint holds NaN or Inf"
    return None


def why_no_host(store: SeedStore) -> str | None:
    """Say why no seed of a layer folds into its host, whatever that holds; None: some may."""
    return why_not_linear(store.host, store.chunks.feature_dim)


def why_no_weight(host: Host) -> str | None:
    """Say why nothing folds into what a host holds now; None: something may."""
    if is_parametrized(host.base):
        return "its base's weight is computed by a parametrization"
    if not isinstance(host.base._parameters.get("weight"), nn.Parameter):
        return "its base's weight is computed by a hook (of prune, spectral_norm, weight_norm)"
    return None


def why_no_chunks(bank: Bank, host: Host, seeds: Tensor) -> str | None:
    """Say why blueprints of a bank do not fold at the chunks of its seeds ``(n,)``, or None."""
    if bank.spec.kind not in LINEAR:
        return _ONLY
    starts = bank.run.offset + seeds * bank.run.size
    if bank.spec.kind != "affine" and bool(spans_groups(host, starts, bank.run.size).any()):
        return "a chunk lies in several groups of its convolution, which see different inputs"
    return None


@torch.no_grad()
def fold_seeds(store: SeedStore, blended: Tensor) -> None:
    """Rows of the host's weight, and its bias, become what some seeds make of them.

    ``blended``, bool ``(S,)`` on the CPU, says which: such as :func:`why_not_folded` lets through.
    """
    if not bool(blended.any()):
        return
    host: Any = store.host.base  # linear in its weight: why_not_folded lets no other through
    weight, bias = folded_tensors(store, blended)
    host.weight.copy_(weight)
    if host.bias is not None:
        host.bias.copy_(bias)
    elif bias is not None:
        host.bias = nn.Parameter(bias)


@torch.no_grad()
def folded_tensors(
    store: SeedStore, blended: Tensor, *, always_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return copies of the host's weight and bias with blended seeds in them; nothing waits.

    A seed with a parameter that is not finite does not run, as everywhere: its rows would not be
    finite, and such rows stay as they are.

    Args:
        store: The layer's, whose host is linear; so are the blueprints of all blended seeds.
        blended: Bool ``(S,)`` on the CPU.
        always_bias: Return a bias in any case; else only if there is one, or a seed adds something.
    """
    host: Any = store.host.base
    weight, bias = host.weight.detach().clone(), host.bias  # in its memory format
    changes = blended_by(store, blended)
    if bias is not None:
        bias = bias.detach().clone()
    elif always_bias or any(bank.spec.kind == "affine" for bank, *_ in changes):
        bias = no_bias(store.host)
    for bank, seeds, slots in changes:
        many = max(1, _BLOCK[not weight.is_cpu] // (bank.run.size * weight[0].numel()))
        for block in zip(seeds.split(many), slots.split(many), strict=True):
            _change(weight, bias, bank, *block, store.shown.layer[0])
    return weight, bias


def no_bias(host: Host) -> Tensor:
    """Return a bias ``(D,)`` that adds nothing, to the bit: that is -0."""
    weight: Any = host.base.weight
    return torch.full_like(weight.detach().flatten(1)[:, 0], -0.0)


def blended_by(store: SeedStore, blended: Tensor) -> list[tuple[Bank, Tensor, Tensor]]:
    """Banks with blended seeds; which of the run's these are, and their slots, on the CPU.

    ``blended`` is bool ``(S,)``, the others int64 ``(n,)``.
    """
    found = []
    for bank in store.bank_list():
        run = bank.run.seeds
        slots = bank.slot_of(torch.where(blended[run], store.ids[run], 0))
        seeds = (slots >= 0).nonzero().flatten()
        if len(seeds):
            found.append((bank, seeds, slots[seeds]))
    return found


def _change(
    weight: Tensor, bias: Tensor | None, bank: Bank, seeds: Tensor, slots: Tensor, alpha: Tensor
) -> None:
    """Change the rows of some seeds ``(n,)`` of a bank's run, in place."""
    run, device, wide = bank.run, weight.device, torch.float64
    inside = torch.arange(run.size, device="cpu")
    features = to_device((run.offset + seeds.unsqueeze(1) * run.size + inside).flatten(), device)
    where = to_device(slots, device)
    params = [stack.detach().index_select(0, where) for stack in bank.tensors()]
    factor = alpha.index_select(0, to_device(run.first_seed + seeds, device)).to(wide)
    before = weight.index_select(0, features)
    rows = before.reshape(len(seeds), run.size, -1)
    mixed, added = LINEAR[bank.spec.kind]([p.to(wide) for p in params], factor.view(-1, 1, 1))
    grown = mixed(rows.to(wide)).to(weight.dtype)
    runs = finite_rows(grown)  # and so are its parameters, each of which is a factor
    if bias is not None:
        offset = bias.index_select(0, features).view(len(seeds), run.size, 1)
        moved = mixed(offset.to(wide))
        moved = (moved if added is None else moved + added).to(bias.dtype)
        runs = runs & finite_rows(moved)
        offset = torch.where(runs.view(-1, 1, 1), moved, offset)
        bias.index_copy_(0, features, offset.flatten())
    rows = torch.where(runs.view(-1, 1, 1), grown, rows)
    weight.index_copy_(0, features, rows.view_as(before))


_Mixing = tuple[Callable[[Tensor], Tensor], "Tensor | None"]


def _affine(params: Sequence[Tensor], alpha: Tensor) -> _Mixing:
    scale, shift = (p.unsqueeze(2) for p in params)
    by = 1 + alpha * (scale - 1)
    return lambda rows: by * rows, alpha * shift


def _lora(params: Sequence[Tensor], alpha: Tensor) -> _Mixing:
    down, up = params
    return lambda rows: rows + alpha * (up @ (down @ rows)), None


#: Blueprints that are linear in their chunk: what ``A`` does to ``(n, size, ...)`` rows, and what
#: is added, ``(n, size, 1)``, of parameters ``(n, ...)`` and alphas ``(n, 1, 1)``.
LINEAR: Final[dict[str, Callable[[Sequence[Tensor], Tensor], _Mixing]]] = {
    "affine": _affine,
    "lora": _lora,
}
_ONLY: Final = f"only {' and '.join(LINEAR)} blueprints fold into a weight"
