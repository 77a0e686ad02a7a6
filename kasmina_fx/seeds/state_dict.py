"""State dicts: a layer by hand keeps its base's names, so that plain checkpoints go on loading.

A :class:`~kasmina_fx.KasminaLayer` at ``fc`` saves ``fc.weight`` (not ``fc.base.weight``) and its
seeds' tensors under ``fc.kasmina.``. Loading a plain checkpoint leaves the latter as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kasmina_fx.physical.layout import parse_banks
from kasmina_fx.seeds import pack_entries
from kasmina_fx.seeds.allocation import allocate
from kasmina_fx.seeds.entry_names import BASE, OWN
from kasmina_fx.seeds.extra_state import unpacked
from kasmina_fx.seeds.store import SeedStore


def attach(store: SeedStore) -> None:
    """The store of a layer prepares itself for a state dict, checked before, that is loaded."""
    module: nn.Module = store
    module.register_state_dict_post_hook(_add_packs)
    module.register_load_state_dict_pre_hook(_prepare)
    module.register_load_state_dict_post_hook(_after_load)


def attach_names(layer: nn.Module) -> None:
    """A layer around a base saves and loads the base's entries under its own name."""
    layer.register_state_dict_post_hook(_strip_base)
    layer.register_load_state_dict_pre_hook(_insert_base)


def _strip_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix + BASE)]:
        state_dict[prefix + key.removeprefix(prefix + BASE)] = state_dict.pop(key)


def _insert_base(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if not name.startswith(OWN):
            state_dict[prefix + BASE + name] = state_dict.pop(key)


def _add_packs(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    store: SeedStore = module  # type: ignore[assignment]  # what the hook was registered on
    state_dict.update((prefix + name, values) for name, values in pack_entries.tensors_of(store))


def _prepare(module: nn.Module, state_dict: dict[str, Any], own: str, *rest: Any) -> None:
    """Allocate the banks of a state dict, and keep what it lacks; ``own`` ends in ``kasmina.``."""
    store: SeedStore = module  # type: ignore[assignment]  # what the hook was registered on
    extra, reference = (
        state_dict.get(own + "_extra_state"),
        state_dict.get(own + "reference_weight"),
    )
    # Of a plain checkpoint's host no drift is known.
    store.reference_weight = (
        None if reference is None else torch.empty_like(reference, device=store.state.alpha.device)
    )
    for key, text in ({} if extra is None else unpacked(extra)["banks"]).items():
        if key not in store.banks:
            (spec,) = parse_banks(text)
            allocate(store, spec.kind, shared=spec.shared)
    packed = [name for name in state_dict if name.startswith(own + "packs.")]
    packs = {name.removeprefix(own): state_dict.pop(name) for name in packed}
    if extra is not None:
        store.packs = pack_entries.loaded(store, unpacked(extra).get("packs", {}), packs)
    # A plain checkpoint has none of these: they stay. One that has lacks the banks that only this
    # layer has: their slots are free from now on.
    if extra is None and store.misses_entries:
        return  # other layers of the model have theirs: torch says what is missing
    for name, value in store.state_dict().items():
        if name.startswith("packs."):
            continue
        gone = extra is not None and name.endswith(".slots")
        state_dict.setdefault(own + name, torch.zeros_like(value) if gone else value)


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    store: SeedStore = module  # type: ignore[assignment]  # what the hook was registered on
    store.misses_entries = False
    store.reload()
