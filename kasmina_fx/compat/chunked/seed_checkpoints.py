"""Files that each hold one seed of a layer: its state, alpha and blueprint."""

from __future__ import annotations

import glob
import pickle
import re
import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kasmina_fx.checkpoint.sealed_file import Sealing, broken_seal, replacing
from kasmina_fx.compat.chunked.older_calls import OlderCalls
from kasmina_fx.errors import CheckpointError, InvalidArgument, shown
from kasmina_fx.seeds.allocation import start_growing
from kasmina_fx.seeds.snapshots import Snapshot
from kasmina_fx.seeds.store import SeedStore

#: Those of a lower priority go first where a seed has too many.
PRIORITIES: Final = ("low", "normal", "high", "critical")
_KEPT: Final = 5
_FORMAT: Final = "kasmina_fx seed 1"
_ID: Final = re.compile(r"[\w-]+\.\d+\.\d{20}\.(low|normal|high|critical)")


class SeedCheckpoints:
    """The files of one folder; the folder is made when the first is written.

    Of each seed the five newest are kept, those of a higher priority first. A file is whole or not
    there, is verified when it is read, and nothing in it is executed.

    Args:
        checkpoint_dir: The folder.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)

    def list_checkpoints(self, layer_id: str, seed_id: int | None = None) -> list[str]:
        """Ids of a layer's checkpoints, or of one of its seeds, the oldest first."""
        seed = "*" if seed_id is None else str(seed_id)
        names = self.checkpoint_dir.glob(f"{glob.escape(_slug(layer_id))}.{seed}.*.pt")
        ids = [path.stem for path in names if _ID.fullmatch(path.stem)]
        return sorted(ids, key=lambda name: name.split(".")[2])

    def save(self, layer: OlderCalls, seed_id: int, priority: str) -> str:
        """Write a seed to a file of its own; return its id.

        Raises:
            InvalidArgument: No such priority.
            SeedIndexError: No such seed.
            OSError: The file could not be written.
        """
        if priority not in PRIORITIES:
            raise InvalidArgument(f"priority={shown(priority)}: give one of {PRIORITIES}")
        taken = layer.snapshot(seed_id)
        (seed,) = taken.seeds.tolist()
        bank, held = "", taken.blueprints.get(seed)
        if held is not None:
            bank = str(layer.kasmina.banks[held[0]].spec)
        contents = {
            "format": _FORMAT,
            "layout": taken.layout,
            "seed": seed,
            "row": taken.rows[0],
            "alpha": taken.alpha,
            "bank": bank,
            "tensors": [] if held is None else list(held[1]),
        }
        name = f"{_slug(layer.layer_id)}.{seed}.{time.time_ns():020d}.{priority}"
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        with replacing(self.checkpoint_dir / f"{name}.pt") as file:
            sealing = Sealing(file)
            torch.save(contents, sealing)  # type: ignore[arg-type]  # write and flush are all it calls
            sealing.seal()
        self._prune(layer.layer_id, seed)
        return name

    def _prune(self, layer_id: str, seed_id: int) -> None:
        there = self.list_checkpoints(layer_id, seed_id)
        ranked = sorted(there, key=lambda name: PRIORITIES.index(name.rsplit(".", 1)[1]))
        for name in ranked[: max(0, len(ranked) - _KEPT)]:
            (self.checkpoint_dir / f"{name}.pt").unlink(missing_ok=True)

    def restore(self, layer: OlderCalls, seed_id: int, checkpoint_id: str) -> None:
        """Put a seed back to what a file holds.

        Raises:
            CheckpointError, InvalidArgument: It is missing, broken, of another seed or layout, or
                of a blueprint that is not registered; the seed is as it was.
        """
        saved = self._read(checkpoint_id)
        if saved["seed"] != seed_id:
            raise CheckpointError(f"{checkpoint_id} is of seed {saved['seed']}, not {seed_id}")
        blueprints: dict[int, tuple[str, tuple[Tensor, ...]]] = {}
        if saved["bank"]:
            key = _grown(layer.kasmina, saved["bank"], int(saved["row"][1]), checkpoint_id)
            blueprints[seed_id] = (key, tuple(saved["tensors"]))
        ids, rows = torch.tensor([seed_id], device="cpu"), saved["row"][None]
        taken = Snapshot(layer.layer_id, saved["layout"], ids, rows, saved["alpha"], blueprints)
        layer.rollback(taken, seed_id, mark=False)

    def _read(self, checkpoint_id: str) -> dict[str, Any]:
        if not _ID.fullmatch(str(checkpoint_id)):
            raise CheckpointError(f"{shown(checkpoint_id)} is no checkpoint's id")
        path = self.checkpoint_dir / f"{checkpoint_id}.pt"
        try:
            with path.open("rb") as file:
                broken = broken_seal(file)
                if broken is not None:
                    raise CheckpointError(f"{path}: {broken}")
                file.seek(0)
                saved = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise CheckpointError(f"{path} holds no seed")
        return saved


def _grown(store: SeedStore, bank: str, blueprint_id: int, where: str) -> str:
    """Return the key of the bank for a blueprint, which is made if there is none."""
    kind, _, flags = bank.partition("@")[0].partition(":")
    shared = bool(flags)
    if shared and store.blueprints.get(blueprint_id) != kind:
        raise CheckpointError(
            f"{where}: its blueprint {blueprint_id} ({kind}) is not registered with {store.name}"
        )
    start_growing(store, kind, shared)
    found = [b.key for b in store.bank_list() if str(b.spec) == bank]
    if not found:
        raise CheckpointError(f"{where}: {store.name} has no room for {bank}")
    return found[0]


def _slug(layer_id: str) -> str:
    return re.sub(r"[^\w-]", "-", layer_id)
