"""Try a blueprint on a chunk before it may enter a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx.bases.features import Features, example_chunk
from kasmina_fx.blueprints.base import Blueprint, aside
from kasmina_fx.blueprints.builtin import BUILTINS
from kasmina_fx.blueprints.from_module import ModuleBlueprint
from kasmina_fx.blueprints.registry import lookup, register
from kasmina_fx.errors import InvalidArgument, InvalidBlueprint, InvalidType, shown

_TRIED: dict[tuple[Any, ...], str | None] = {}


def why_unfit(
    blueprint: Blueprint, size: int, features: Features, like: Tensor | None
) -> str | None:
    """Say why a blueprint can't serve chunks of ``size`` features; return None if it can."""
    if not blueprint.accepts(size):
        return f"it does not accept chunks of {size} features"
    if blueprint in BUILTINS:
        return None
    key = (blueprint, size, features, None if like is None else (like.dtype, like.device))
    if key not in _TRIED:
        reasons = (_try(blueprint, size, shaped, like) for shaped in _shapes(features))
        usual = next(reasons)
        fits = usual is None or any(reason is None for reason in reasons)
        _TRIED[key] = None if fits else usual
    return _TRIED[key]


def require_fit(
    blueprint: Blueprint, sizes: Iterable[int], features: Features, like: Tensor | None
) -> None:
    """Check every chunk size that a blueprint may meet; a single module need only fit one of them.

    Raises:
        InvalidBlueprint: Says which size, and what went wrong there.
    """
    reasons = {size: why_unfit(blueprint, size, features, like) for size in sizes}
    bad = {size: reason for size, reason in reasons.items() if reason is not None}
    one_will_do = isinstance(blueprint, ModuleBlueprint) and isinstance(
        blueprint.factory, nn.Module
    )
    if bad and not (one_will_do and len(bad) < len(reasons)):
        size, reason = next(iter(bad.items()))
        raise InvalidBlueprint(
            f"blueprint {blueprint.kind!r} on a chunk of {size} features: {reason}. Supported are "
            "modules that keep a chunk's shape and dtype, with parameters and with buffers that "
            "forward only reads"
        )


def register_for(
    blueprint: str | Blueprint | Callable[[int], nn.Module] | nn.Module,
    name: str | None,
    sizes: Iterable[int],
    features: Features,
    like: Tensor | None,
) -> str:
    """Check a blueprint against a layer's chunks, then register it and return its name.

    Raises:
        InvalidBlueprint, UnknownBlueprint, InvalidType: Nothing was registered.
    """
    if name is not None and not isinstance(name, str):
        raise InvalidType(f"name={shown(name)}: give a string")
    if isinstance(blueprint, str):
        candidate = lookup(blueprint)
        if name not in (None, candidate.kind):
            raise InvalidArgument(
                f"name={shown(name)}: {shown(blueprint)} is registered, and keeps its name"
            )
        require_fit(candidate, sizes, features, like)
        return candidate.kind
    if not callable(blueprint) and not isinstance(blueprint, Blueprint):
        raise InvalidType(
            "a blueprint is a registered name, a factory chunk_size -> nn.Module, a Blueprint or "
            f"a module; got {type(blueprint).__name__}"
        )
    if isinstance(blueprint, Blueprint):
        candidate = blueprint
    else:
        candidate = ModuleBlueprint(name or "candidate", blueprint)
    require_fit(candidate, sizes, features, like)
    return register(blueprint, name=name)


def _shapes(features: Features) -> Iterator[Features]:
    """The output's usual rank, and others that it may have: a Linear's is what its input's is."""
    yield features
    if features.dim == -1:
        yield from (replace(features, rank=rank) for rank in (2, 3, 4, 1) if rank != features.rank)


def _try(blueprint: Blueprint, size: int, features: Features, like: Tensor | None) -> str | None:
    with aside():
        chunk = example_chunk(features, size, like)
    try:
        with torch.no_grad(), aside():
            module = blueprint.module(size)
            if not isinstance(module, nn.Module):
                return f"its factory returned {type(module).__name__}, not an nn.Module"
            module.to(chunk.device, chunk.dtype).train()
            before = {name: b.clone() for name, b in module.named_buffers()}
            out = module(chunk.clone())
            stacks = [torch.stack([t, t]) for t in (*module.parameters(), *module.buffers())]
            changed = [n for n, b in module.named_buffers() if not torch.equal(b, before[n])]
            if changed:
                return f"a forward in train mode writes to its buffer {shown(changed[0])}"
            pair = torch.stack([chunk, chunk]).unsqueeze(1)
            made = blueprint.stacked(stacks, pair, features.dim - chunk.dim() * (features.dim >= 0))
    except Exception as error:  # whatever a user's module raises is the reason
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if not isinstance(out, Tensor):
        return f"it returns {type(out).__name__}, not a tensor"
    if out.shape != chunk.shape:
        return f"it turns shape {tuple(chunk.shape)} into {tuple(out.shape)}"
    if out.dtype != chunk.dtype:
        return f"it turns {chunk.dtype} into {out.dtype}"
    if (made.shape, made.dtype) != (pair.shape, pair.dtype):
        return (
            f"its stacked() turns {pair.dtype} {tuple(pair.shape)} into {made.dtype} "
            f"{tuple(made.shape)}"
        )
    return None
