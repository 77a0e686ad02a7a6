"""Entries of a state dict that could not be a layer's are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kasmina_fx.banks.bank import Bank, bank_key, registered_name
from kasmina_fx.banks.placement import SMALLEST
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.blueprints.trial import why_unfit
from kasmina_fx.errors import LayoutMismatch, UnknownBlueprint
from kasmina_fx.physical.layout import ChunkLayout, parse_banks
from kasmina_fx.seeds.entry_names import (
    ALPHA,
    BANKS,
    EXTRA,
    OWN,
    PACKS,
    REFERENCE,
    SEAL,
    STATE,
    TELEMETRY,
)
from kasmina_fx.seeds.extra_state import unpacked
from kasmina_fx.seeds.pack_entries import check_packs
from kasmina_fx.seeds.registered import seal
from kasmina_fx.seeds.slot_checks import LAST_ID, check_rows, check_slots
from kasmina_fx.seeds.store import LAYOUT_VERSION, SeedStore
from kasmina_fx.seeds.telemetry import check_statistics


def check(store: SeedStore, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse entries that could not be this layer's; changes nothing.

    A state dict with no entry of the layer's seeds is a plain checkpoint, which fits.

    Args:
        store: Whose entries they are to be.
        state_dict: Of a whole model, or of a part of it.
        prefix: Of the layer in it.

    Raises:
        LayoutMismatch: Says which entry, what it holds and what this layer takes.
    """
    name, own = store.name, prefix + OWN
    entries = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(own)}
    if not entries:
        return
    packed = {key: entries.pop(key) for key in list(entries) if key.startswith(PACKS)}
    try:
        extra = _checked_extra(store, entries)
        for key, value in (entries | packed).items():
            if key != EXTRA and not isinstance(value, Tensor):
                raise TypeError(f"{key} is a {type(value).__name__}; this layer takes a tensor")
        banks = [_bank_of(store, key, text, entries) for key, text in extra["banks"].items()]
        _check_tensors(store, banks, entries)
        store.state.check_values(entries[STATE], entries[ALPHA])
        check_statistics(
            *(entries[TELEMETRY + n] for n in ("accumulated", "faults", "previous_loss"))
        )
        check_slots(extra["blueprints"], banks, entries)
        check_rows(banks, entries)
        _check_seal(banks, entries)
        check_packs(store, extra, banks, packed)
    except UnknownBlueprint as error:
        raise LayoutMismatch(
            f"{name}: the state dict needs a blueprint that is not registered here: {error}"
        ) from error
    except KeyError as error:
        raise LayoutMismatch(
            f"{name}: the state dict lacks {error}: it was cut off or edited; give it whole"
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise LayoutMismatch(f"{name}: a malformed state dict: {error}") from error


def _checked_extra(store: SeedStore, entries: Mapping[str, Any]) -> dict[str, Any]:
    extra, name = unpacked(entries[EXTRA]), store.name
    if extra.get("version") != LAYOUT_VERSION:
        raise LayoutMismatch(
            f"{name}: the state dict's kasmina entries have version {extra.get('version')!r}; "
            f"this release reads version {LAYOUT_VERSION}"
        )
    if extra["layout"] != str(store.layout):
        raise LayoutMismatch(
            f"{name}: the state dict was written for chunks [{extra['layout']}]; this "
            f"layer has [{store.layout}]. Give kasminify the same num_seeds"
        )
    highest = extra["highest_id"]
    if type(highest) is not int or not 0 <= highest <= LAST_ID:
        raise ValueError(f"{EXTRA}: highest_id {highest!r}; allowed are 0 to {LAST_ID}")
    for number, kind in extra["blueprints"].items():
        if type(number) is not int or not 0 < number <= LAST_ID:
            raise ValueError(f"{EXTRA}: blueprint id {number!r}; allowed are 1 to {LAST_ID}")
        lookup(kind)
    return extra


def _bank_of(store: SeedStore, key: str, text: str, entries: Mapping[str, Any]) -> Bank:
    """The bank whose entries are under ``key``: the layer's, or one without data."""
    layout, prefix = store.layout, f"{BANKS}{key}."
    _check_bank(key, text, layout, entries, prefix)
    (spec,) = parse_banks(text)
    run, capacity = layout.runs[spec.run], len(entries[prefix + "slots"])
    least = 1 if spec.shared else SMALLEST
    if capacity < least:
        raise ValueError(f"{prefix}slots has {capacity} rows; this layer takes {least} or more")
    if not spec.training:
        raise ValueError(f"{EXTRA}: {text} is a bank as evaluation runs it, not as it is held")
    for bank in store.bank_list():
        if bank.key == key and bank.capacity == capacity:
            return bank
    reason = why_unfit(lookup(spec.kind), run.size, store.host.features, store.host.like)
    if reason is not None:
        raise ValueError(f"{EXTRA}: {text} in chunks of {run.size} features: {reason}")
    return Bank(
        spec.kind,
        spec.run,
        run,
        shared=spec.shared,
        capacity=capacity,
        dtype=torch.get_default_dtype(),
        device=torch.device("meta"),
    )


def _check_bank(
    key: str, text: str, layout: ChunkLayout, entries: Mapping[str, Any], prefix: str
) -> None:
    """Refuse entries of a state dict, under ``prefix``, that could not be a bank of a layer.

    Raises:
        ValueError, KeyError, UnknownBlueprint: Says what does not fit.
    """
    (spec,) = parse_banks(text)
    blueprint = lookup(spec.kind)
    if spec.run >= len(layout.runs):
        raise ValueError(f"{text} names run {spec.run}; the layer has {len(layout.runs)}")
    slots, tensors = entries[prefix + "slots"], blueprint.specs(layout.runs[spec.run].size)
    if key != bank_key(spec) or spec.num_params != len(tensors):
        raise ValueError(f"{text} under {key!r}, of a blueprint with {len(tensors)} tensors")
    for tensor in tensors:
        shape = tuple(entries[prefix + registered_name(tensor.name)].shape)
        if shape != (len(slots), *tensor.shape):
            raise ValueError(f"{prefix}{tensor.name} has shape {shape}, {len(slots)} slots")


def _check_tensors(store: SeedStore, banks: Sequence[Bank], entries: Mapping[str, Any]) -> None:
    """Names, shapes and dtypes; what follows the host's dtype may have any floating one."""
    own = store.state_dict(prefix=OWN)
    wanted = {k: v for k, v in own.items() if k != EXTRA and not k.startswith((BANKS, PACKS))}
    for bank in banks:
        wanted |= bank.state_dict(prefix=f"{BANKS}{bank.key}.")
    wanted.pop(REFERENCE, None)
    if SEAL not in entries:  # saved before there was one
        wanted.pop(SEAL)
    weight = store.host.weight
    if REFERENCE in entries and weight is not None:  # while a ramp follows the host's drift
        wanted[REFERENCE] = weight
    unknown = sorted(entries.keys() - wanted.keys() - {EXTRA})
    if unknown:
        raise ValueError(f"the layer has no {', '.join(unknown)}")
    for name, like in wanted.items():
        given = entries[name]
        follows_host = name.startswith((BANKS, REFERENCE)) and like.is_floating_point()
        fits = given.is_floating_point() if follows_host else given.dtype == like.dtype
        if not fits or given.shape != like.shape:
            raise ValueError(
                f"{name} is {given.dtype} {tuple(given.shape)}; this layer takes {like.dtype} "
                f"{tuple(like.shape)}"
            )


def _check_seal(banks: Sequence[Bank], entries: Mapping[str, Any]) -> None:
    """State and slots are those of one moment, and no average of two."""
    slots = {bank.key: entries[f"{BANKS}{bank.key}.slots"].cpu() for bank in banks}
    if SEAL in entries and int(entries[SEAL]) != seal(entries[STATE].cpu(), slots):
        raise ValueError(
            f"{SEAL} is not that of {STATE} and the banks' slots: these are of two layers or two "
            "moments, or averages; average parameters alone"
        )
