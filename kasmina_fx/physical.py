"""The physical view: a layer's seeds as a handful of tensor operations, however many it has.

These functions are the meaning of the markers. Eager execution calls them; the passes trace them
once per layout and splice the graph in place of the marker.

    y --narrow, unflatten--> chunks (n, ..., size, ...) --gather--> (K, M, ..., size, ...)
      --stacked blueprints--> --pull--> chunks + alpha * (blueprint(chunks) - chunks)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kasmina_fx._torch_compat import in_functorch, known_empty
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.layout import BankSpec, ChunkLayout, Run, parse_banks
from kasmina_fx.telemetry import merge_statistics

_Move: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def blend(
    y: Tensor,
    seeds: Sequence[Tensor],
    positions: Sequence[Tensor],
    alphas: Sequence[Tensor],
    params: Sequence[Tensor],
    chunks: str,
    banks: str,
) -> tuple[Tensor, Tensor]:
    """``kasmina::blend``; shapes in :mod:`kasmina_fx.ops`."""
    layout, specs = ChunkLayout.parse(chunks), parse_banks(banks)
    if not specs or known_empty(y):
        return y.clone(), y.new_zeros(layout.num_seeds, dtype=torch.int32)
    dim = layout.feature_dim % y.dim() - y.dim()
    parts, rejected, first = [], [], 0
    tensors = []
    for spec in specs:
        tensors.append(params[first : first + spec.num_params])
        first += spec.num_params
    for index, run in enumerate(layout.runs):
        part = chunks_of(y, run, dim)
        flags = y.new_zeros(run.count, dtype=torch.int32)
        mine = [i for i, spec in enumerate(specs) if spec.run == index]
        host = part
        for i in mine:
            part, bad = _blend_bank(
                part, host, specs[i], seeds[i], positions[i], alphas[i], tensors[i], dim
            )
            flags = flags + bad
        parts.append(part.movedim(0, dim - 1).flatten(dim - 1, dim))
        rejected.append(flags)
    return (torch.cat(parts, dim), torch.cat(rejected)) if len(parts) > 1 else (parts[0], flags)


def chunks_of(y: Tensor, run: Run, dim: int) -> Tensor:
    """View ``(count, ..., size, ...)`` of a run's chunks; ``dim`` is the feature dim, negative."""
    view = y.narrow(dim, run.offset, run.width)
    chunks: Tensor = view.unflatten(dim, (run.count, run.size))
    return chunks.movedim(dim - 1, 0)


def finite_slots(values: Tensor) -> Tensor:
    """Bool ``(K,)``: are all values of ``values[k]`` finite? ``values`` is ``(K, ...)``."""
    # The largest magnitude is finite exactly if all are (amax hands NaN on): one reduction,
    # vectorised.
    return values.detach().abs().flatten(1).amax(1).isfinite()


def take(f: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``out[i] = f[index[i]]``, 0 where ``index[i]`` is -1: what both moving operators compute.

    The zeros matter for gradients: without them a seed without a slot, or a slot without a seed,
    would receive row 0's gradient.
    """
    taken = f.index_select(0, index.clamp_min(0))
    return taken.masked_fill((index < 0).view(-1, *[1] * (f.dim() - 1)), 0.0)


def _moves() -> tuple[_Move, _Move]:
    """``kasmina::gather`` and ``kasmina::pull``."""
    # torch.func does not take operators with a registered backward (torch 2.13); there, plain
    # indexing has the same values and gradients, but for the guard against NaN in gradients.
    if in_functorch():
        return take, take
    return torch.ops.kasmina.gather.default, torch.ops.kasmina.pull.default


def _blend_bank(
    part: Tensor,
    host: Tensor,
    spec: BankSpec,
    seeds: Tensor,
    positions: Tensor,
    alphas: Tensor,
    params: Sequence[Tensor],
    dim: int,
) -> tuple[Tensor, Tensor]:
    """Blend one bank into ``part`` ``(n, ..., size, ...)``; say which of its n seeds it rejected.

    ``host`` is the run before any bank, what blueprints read: a seed has one blueprint, so that for
    the seeds of this bank ``part`` still equals it.
    """
    slots, members = seeds.shape
    index = seeds.view(-1)
    gather, pull = _moves()
    rows = gather(host, index, positions)
    stacked = (
        lookup(spec.kind)
        .in_mode(spec.training)
        .stacked([p[:slots] for p in params], rows.unflatten(0, (slots, members)), dim)
    )
    outcome = stacked.flatten(0, 1)
    # One number a slot: alpha, or -1 where the blueprint yielded NaN or Inf.
    weights = alphas.view(-1).masked_fill(~finite_slots(outcome), -1.0)
    weight = pull(weights, positions, index)
    mine = positions >= 0
    blended = (mine & (weight >= 0)).view(column := (-1, *[1] * (part.dim() - 1)))
    pulled = pull(outcome, positions, index)
    # float32 for half types: the difference of two close values has few correct bits in them.
    wide = torch.promote_types(torch.promote_types(part.dtype, pulled.dtype), torch.float32)
    exact = part.to(wide)
    grown = exact + weight.view(column).to(wide) * (pulled.to(wide) - exact)
    # A where, not a product with 0: an unblended chunk keeps its bits, NaN, Inf and -0 included.
    out = torch.where(blended, grown.to(part.dtype), part)
    return out, (mine & (weight < 0)).to(torch.int32)


def observe(y: Tensor, rejected: Tensor | None, telemetry: Tensor, chunks: str) -> None:
    """``kasmina::observe``; shapes in :mod:`kasmina_fx.ops`."""
    if known_empty(y):
        return
    layout = ChunkLayout.parse(chunks)
    with torch.no_grad():
        telemetry.copy_(merge_statistics(y.detach(), rejected, telemetry, layout))
