"""Packs of a layer in its state dict: tensors under ``packs.<number>.``, the rest as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kasmina_fx.banks.bank import Bank, registered_name
from kasmina_fx.seeds.entry_names import ALPHA, BANKS, PACKS, STATE
from kasmina_fx.seeds.packs import KeptBank, KeptPack, KeptStack, LayerPacks
from kasmina_fx.seeds.slot_checks import check_rows, check_slots
from kasmina_fx.seeds.store import SeedStore


def tensors_of(store: SeedStore) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are put away, with their names below the store."""
    for number, pack in enumerate(store.packs.kept.values()):
        for key, bank in ({} if pack is None else pack.banks).items():
            stacks = zip(names_in(store.banks[key]), bank.stacks, strict=True)  # type: ignore[arg-type]  # a bank
            yield from ((f"packs.{number}.{key}.{name}", own.values) for name, own in stacks)


def names_in(bank: Bank) -> list[str]:
    """Names of a bank's stacks, in order."""
    return [registered_name(spec.name) for spec in bank.tensor_specs]


def loaded(store: SeedStore, given: Mapping[str, Any], entries: Mapping[str, Tensor]) -> LayerPacks:
    """Packs from what was saved, which :func:`check_packs` has seen.

    Args:
        store: Whose, with banks for all of them.
        given: As :meth:`LayerPacks.described` made it; empty: none were saved.
        entries: Tensors by the names of :func:`tensors_of`.
    """
    packs = LayerPacks(active=given.get("active"))
    for number, saved in enumerate(given.get("kept", ())):
        packs.kept[saved["name"]] = (
            None
            if "rows" not in saved
            else KeptPack(
                _ints(saved["seeds"], torch.int64),
                _ints(saved["rows"], torch.int32).reshape(-1, 4),
                torch.tensor(saved["alpha"], dtype=torch.float32, device="cpu"),
                {
                    key: _bank(store.banks[key], held, entries, f"packs.{number}.{key}.")  # type: ignore[arg-type]  # a bank
                    for key, held in saved["banks"].items()
                },
            )
        )
    return packs


def _bank(bank: Bank, held: list[int], entries: Mapping[str, Tensor], prefix: str) -> KeptBank:
    stacks = [
        KeptStack(entries[prefix + name].detach().to(stack.device, stack.dtype, copy=True))
        for name, stack in zip(names_in(bank), bank.tensors(), strict=True)
    ]
    return KeptBank(_ints(held, torch.int64), stacks)


def check_packs(
    store: SeedStore, extra: Mapping[str, Any], banks: Sequence[Bank], entries: Mapping[str, Any]
) -> None:
    """Refuse packs of a state dict that could not be the layer's.

    Args:
        store: The layer's seeds.
        extra: Its extra state in the state dict.
        banks: Those of the state dict.
        entries: Its entries below :data:`PACKS`.

    Raises:
        AttributeError, KasminaError, KeyError, TypeError, ValueError: Says what does not fit.
    """
    given, unknown = extra.get("packs", {"active": None, "kept": []}), set(entries)
    names, found = [saved["name"] for saved in given["kept"]], {bank.key: bank for bank in banks}
    if not all(isinstance(name, str) and name for name in names) or len({*names}) < len(names):
        raise ValueError(f"packs are called {names}: each has a name of its own")
    in_use = [saved["name"] for saved in given["kept"] if "rows" not in saved]
    if in_use != [name for name in (given["active"],) if name is not None]:
        raise ValueError(f"the pack in use is {given['active']!r}; not put away are {in_use}")
    for number, saved in enumerate(given["kept"]):
        if "rows" in saved:
            try:
                known = _check_pack(store, extra, found, saved, entries, f"{PACKS}{number}.")
            except ValueError as error:
                raise ValueError(f"the pack {saved['name']!r}: {error}") from error
            unknown.difference_update(known)
    if unknown:
        raise ValueError(f"no pack has {sorted(unknown)[:4]}")


def _check_pack(
    store: SeedStore,
    extra: Mapping[str, Any],
    banks: Mapping[str, Bank],
    saved: Mapping[str, Any],
    entries: Mapping[str, Any],
    prefix: str,
) -> Iterable[str]:
    """Check one pack as if it were in use; returns the names of its tensors."""
    seeds = _ints(saved["seeds"], torch.int64)
    if not seeds.equal(seeds.unique()) or bool(((seeds < 0) | (seeds >= store.num_seeds)).any()):
        raise ValueError(f"seeds {seeds.tolist()[:8]}; the layer has {store.num_seeds}")
    rows = torch.zeros(store.num_seeds, 4, dtype=torch.int32, device="cpu")
    alpha = torch.zeros(store.num_seeds, dtype=torch.float32, device="cpu")
    rows[seeds] = _ints(saved["rows"], torch.int32).reshape(-1, 4)
    alpha[seeds] = torch.tensor(saved["alpha"], dtype=torch.float32, device="cpu").reshape(-1)
    store.state.check_values(rows, alpha)
    as_used, names = {STATE: rows, ALPHA: alpha}, []
    for key, bank in banks.items():
        held = _ints(saved["banks"].get(key, []), torch.int64)
        as_used[f"{BANKS}{key}.slots"] = held if len(held) else held.new_zeros(1)
        for spec in bank.tensor_specs if len(held) else ():
            names.append(f"{prefix}{key}.{registered_name(spec.name)}")
            tensor, shape = entries[names[-1]], (int((held > 0).sum()), *spec.shape)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{names[-1]} is {tuple(tensor.shape)}; {shape} is needed")
    unknown = set(saved["banks"]).difference(banks)
    if unknown:
        raise ValueError(f"the layer has no banks {sorted(unknown)}")
    check_slots(extra["blueprints"], list(banks.values()), as_used)
    check_rows(list(banks.values()), as_used)
    return names


def _ints(values: Any, dtype: torch.dtype) -> Tensor:
    """A list of ints, or of lists of them, as a tensor on the CPU."""
    found = torch.tensor(values, device="cpu")
    if len(values) and (found.is_floating_point() or found.dtype == torch.bool):
        raise ValueError(f"{values[:4]} are no ints")
    return found.to(dtype)
