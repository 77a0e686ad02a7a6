"""What blueprints add to a host, as a graph of torch's operators alone.

A host keeps its class and its names. It gets a child, ``grown``, and a forward hook that runs it on
what the host returned. ``grown`` is a ``torch.fx.GraphModule``, so that no class of this package is
in the model, and is written for any number of dims before and behind the features, so that nothing
of a batch is in it. Of one bank of built-in blueprints it is

    y --index_select--> chunks (..., n, size) --stacked blueprints--> (..., n, size)
      --where finite--> cat behind y --index_select--> y with the chunks in their places

A module of a user's is called once for each of its seeds: what it does with its dims is its own
matter. What comes out NaN or Inf, or does not fit the host's dtype, leaves that element y's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer

from kasmina_fx.banks.bank import Bank
from kasmina_fx.bases.outputs import replaced, watched
from kasmina_fx.blueprints import Blueprint, lookup
from kasmina_fx.blueprints.base import aside
from kasmina_fx.blueprints.builtin import BUILTINS
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.seeds.folding import blended_by
from kasmina_fx.seeds.store import SeedStore

#: The child of a host that holds what its seeds grew.
GROWN: Final = "grown"


def run_grown(module: nn.Module, args: Any, out: Any) -> Any:
    """The forward hook of a host: what its child ``grown`` makes of its output."""
    return replaced(out, module.get_submodule(GROWN)(watched(out)))


def attach(host: nn.Module, grown: GraphModule, *, first: bool) -> None:
    """Let a host run what its seeds grew, before all of its forward hooks or behind them.

    Raises:
        InvalidArgument: The host has an attribute of that name.
    """
    if hasattr(host, GROWN):
        raise InvalidArgument(
            f"a {type(host).__name__} has an attribute {GROWN!r} of its own, where finalize would "
            "put what its seeds grew: rename it"
        )
    host.add_module(GROWN, grown)
    host.register_forward_hook(run_grown, prepend=first)


def grown_by(store: SeedStore, kept: Tensor) -> GraphModule | None:
    """Make what some seeds of a layer do to its output; None: nothing.

    Args:
        store: The seeds of the layer.
        kept: Bool ``(S,)`` on the CPU: blended seeds.

    Returns:
        A graph that takes the host's output, with copies of the blueprints' tensors. A seed with a
        parameter that is not finite does not run, as everywhere.
    """
    members = [
        member
        for bank, seeds, slots in blended_by(store, kept)
        for member in _members_of(store, bank, seeds, slots)
    ]
    if not members:
        return None
    root = _Layer(members, store.chunks.layer_dim, store.chunks.feature_dim)
    root.to(store.state.alpha.device)
    made = GraphModule(root, _Tracer().trace(root), "Grown")
    return made.requires_grad_(False).eval()


@dataclass(frozen=True)
class _Members:
    """Holds ``n`` seeds of one bank, all of whose blueprints are private, or one and the same.

    ``starts`` int64 ``(n,)`` are the first features of their chunks, ``alpha`` ``(n,)``; of private
    blueprints a tensor of ``params`` is ``(n, ...)``, of a shared one ``(1, ...)``.
    """

    name: str
    bank: Bank
    starts: Tensor
    alpha: Tensor
    params: Sequence[Tensor]

    @property
    def blueprint(self) -> Blueprint:
        """The registered one: a bank that was copied has a copy."""
        return lookup(self.bank.spec.kind)

    @property
    def features(self) -> Tensor:
        """The features of all chunks in a row, int64 ``(n * size,)``."""
        return (self.starts.unsqueeze(1) + torch.arange(self.bank.run.size, device="cpu")).flatten()


def _members_of(store: SeedStore, bank: Bank, seeds: Tensor, slots: Tensor) -> Iterator[_Members]:
    """Group the seeds ``(n,)`` of a bank's run by what they have in common."""
    stacks = [stack.detach() for stack in bank.tensors()]
    runs = [all(bool(stack[slot].isfinite().all()) for stack in stacks) for slot in slots.tolist()]
    seeds, slots = seeds[runs], slots[runs]
    wide = torch.float64 if any(s.dtype == torch.float64 for s in stacks) else torch.float32
    groups = slots.unique().tolist() if bank.spec.shared else [None] * bool(len(slots))
    for slot in groups:
        mine = torch.ones_like(slots, dtype=torch.bool) if slot is None else slots == slot
        taken = slots[mine] if slot is None else slots[mine][:1]
        yield _Members(
            bank.key if slot is None else f"{bank.key}_{slot}",
            bank,
            bank.run.offset + seeds[mine] * bank.run.size,
            store.state.alphas[bank.run.first_seed + seeds[mine]].to("cpu", wide),
            [stack[taken.to(stack.device)] for stack in stacks],
        )


class _Tracer(Tracer):
    """Keeps users' modules as calls, and looks into all else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, (_Layer, _Stacked, _OneByOne))


class _Layer(nn.Module):
    """Puts what groups of seeds make of their chunks into the places of these. To be traced."""

    def __init__(self, members: Sequence[_Members], width: int, dim: int) -> None:
        super().__init__()
        self.dim, self.parts = dim, [member.name for member in members]
        for member in members:
            kind = _Stacked if member.blueprint in BUILTINS else _OneByOne
            self.add_module(member.name, kind(member, dim))
        order = torch.arange(width, device="cpu")
        new = torch.cat([member.features for member in members])
        order[new] = width + torch.arange(len(new), device="cpu")
        self.register_buffer("order", order)

    def forward(self, y: Tensor) -> Tensor:
        made = [self.get_submodule(name)(y) for name in self.parts]
        return torch.cat([y, *made], self.dim).index_select(self.dim, self.order)  # type: ignore[arg-type]


class _Stacked(nn.Module):
    """Runs built-in blueprints, stacked, features last. To be traced."""

    features: Tensor
    alpha: Tensor

    def __init__(self, members: _Members, dim: int) -> None:
        super().__init__()
        self.dim, self.blueprint, self.size = dim, members.blueprint, members.bank.run.size
        self.count, self.full = len(members.starts), bool((members.alpha == 1).all())
        self.stack_dim = 0 if members.bank.spec.shared else 1
        self.register_buffer("features", members.features)
        self.register_buffer("alpha", members.alpha.unsqueeze(1))
        self.names = [spec.name.replace(".", "_") for spec in members.bank.tensor_specs]
        for name, values in zip(self.names, members.params, strict=True):
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))

    def forward(self, y: Tensor) -> Tensor:
        taken = y.index_select(self.dim, self.features)
        taken = taken if self.dim == -1 else taken.movedim(self.dim, -1)
        chunks = taken.unflatten(-1, (self.count, self.size))
        rows = chunks.movedim(-2, 0).unsqueeze(self.stack_dim)
        params = [getattr(self, name) for name in self.names]
        made = self.blueprint.stacked(params, rows, -1).squeeze(self.stack_dim).movedim(0, -2)
        out = _blended(chunks, made, None if self.full else self.alpha).flatten(-2)
        return out if self.dim == -1 else out.movedim(-1, self.dim)


class _OneByOne(nn.Module):
    """Calls a user's module on each of its chunks, as the host lays these out. To be traced."""

    alpha: Tensor

    def __init__(self, members: _Members, dim: int) -> None:
        super().__init__()
        self.dim, self.starts, self.size = dim, members.starts.tolist(), members.bank.run.size
        self.full = bool((members.alpha == 1).all())
        self.register_buffer("alpha", members.alpha)
        slots = [[p[slot] for p in members.params] for slot in range(_length(members))]
        self.blueprints = nn.ModuleList(_module_of(members, own) for own in slots)

    def forward(self, y: Tensor) -> Tensor:
        parts = []
        for place, start in enumerate(self.starts):
            chunk = y.narrow(self.dim, start, self.size)
            blueprint = self.blueprints[min(place, len(self.blueprints) - 1)]
            made = blueprint(chunk.clone())  # it may write to its input
            parts.append(_blended(chunk, made, None if self.full else self.alpha[place]))
        return torch.cat(parts, self.dim)


def _length(members: _Members) -> int:
    """Say how many modules there are: one a seed, or one for all."""
    return 1 if members.bank.spec.shared else len(members.starts)


def _module_of(members: _Members, values: Sequence[Tensor]) -> nn.Module:
    """Make a blueprint's plain module with such values."""
    with aside():  # its own don't matter
        module = members.blueprint.module(members.bank.run.size)
    named = chain(module.named_parameters(), module.named_buffers())
    with torch.no_grad():
        for (_, own), value in zip(list(named), values, strict=True):
            own.data = value.clone()
    return module


def _blended(chunk: Tensor, made: Tensor, alpha: Tensor | None) -> Tensor:
    """Compute ``chunk + alpha * (made - chunk)`` where that is finite; without alpha, it is 1."""
    fits = made.to(chunk.dtype)
    grown = fits
    if alpha is not None:
        exact = chunk.to(alpha.dtype)
        grown = (exact + alpha * (made.to(alpha.dtype) - exact)).to(chunk.dtype)
        return torch.where((grown.abs() < torch.inf) & (fits.abs() < torch.inf), grown, chunk)
    return torch.where(grown.abs() < torch.inf, grown, chunk)
