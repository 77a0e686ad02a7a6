"""Checkpoints: a model, and its optimizer, in one file that is whole or not there.

:func:`save` replaces a file in one step; :func:`load` checks all of it, then changes the model.

    >>> import tempfile
    >>> from kasmina_fx import kasmina_layers, kasminify
    >>> def network(reserve):
    ...     net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    ...     return kasminify(net, num_seeds=16, reserve=reserve, compile=False)
    >>> grown, fresh = network(reserve=0), network(reserve=4)
    >>> kasmina_layers(grown)["0"].request_germination([3, 7], "lora")
    True
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(grown, f"{folder}/net.pt", metadata={"step": 100})
    ...     load(fresh, f"{folder}/net.pt")
    {'step': 100}
    >>> kasmina_layers(fresh)["0"].state.get_state_distribution()
    {'DORMANT': 14, 'GERMINATED': 2}

A file is what ``torch.save`` writes and ``torch.load(weights_only=True)`` reads, which runs no
code, and behind it a hash: torch does not look at the checksums in its archives.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.serialization import get_unsafe_globals_in_checkpoint

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.checkpoint import optimizers
from kasmina_fx.checkpoint.optimizer_checks import not_dense
from kasmina_fx.checkpoint.sealed_file import Sealing, broken_seal, replacing
from kasmina_fx.errors import CheckpointError
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.model import threads_of
from kasmina_fx.seeds.entry_names import OWN, saved_prefix
from kasmina_fx.seeds.state_dict_checks import check as check_entries
from kasmina_fx.transactions.threads import ModelThreads

FORMAT: Final = "kasmina_fx.checkpoint"
#: Of the file; the entries of every layer have a version of their own.
VERSION: Final = 1


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint; at every moment ``path`` is the old file or the new one, whole.

    Args:
        model: Compiled or not; its whole ``state_dict()`` is saved.
        path: Of the file, in a folder that exists; a file that is replaced keeps its permissions.
        optimizer: Saved with the names of its parameters in the model.
        metadata: Of None, bool, int, float, str, and lists and dicts of these with str keys.

    Raises:
        CheckpointError: Metadata, an optimizer or a model that :func:`load` would refuse.
        LayoutMismatch: Seeds in a state that :func:`load` would refuse.
        OSError: The file could not be written.
    """
    model, given = uncompiled(model), {} if metadata is None else metadata
    _check_metadata(given, "metadata")
    threads = threads_of(model)
    with ModelThreads.command(*threads):  # one moment's, whatever other threads do to the seeds
        saved = _copied(model.state_dict(), _prefixes(model))
        packed = None if optimizer is None else optimizers.pack(optimizer, model)
    _check_layers(model, saved)
    contents = {"format": FORMAT, "version": VERSION, "metadata": given, "model": saved}
    contents["optimizer"] = packed
    with replacing(Path(path)) as file:
        sealing = Sealing(file)
        torch.save(contents, sealing)  # type: ignore[arg-type]  # write and flush are all it calls
        sealing.seal()
        _check_globals(file, path)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Read a checkpoint into a model of any capacity: all of it or, with an error, nothing.

    Args:
        model: Compiled or not, kasminified with the same number of seeds.
        path: Of a file that :func:`save` wrote.
        optimizer: Of this model, of the class that was saved. Parameters of banks that loading
            makes or replaces are put into the group that they were saved in.
        strict: Refuse names, other than those of the seeds, that model and file don't share.

    Returns:
        The metadata.

    Raises:
        CheckpointError: Not a checkpoint, one that was cut off or changed, one of another version,
            or not one of this model or optimizer.
        LayoutMismatch: Seeds of another layout, or in a state that no seeds of this model have.
        OSError: The file could not be read.
    """
    model, name = uncompiled(model), os.fspath(path)
    contents = _read(name)
    _check_layers(model, contents["model"], strict)
    _check_host(model, contents["model"], tuple(_prefixes(model)), strict, name)
    groups = [] if optimizer is None else optimizers.matched(optimizer, model, contents, name)
    threads = threads_of(model)
    with ModelThreads.command(*threads), ModelThreads.publication(*threads):
        model.load_state_dict(contents["model"], strict=strict)
    if optimizer is not None:
        optimizers.load(optimizer, model, contents["optimizer"]["state"], groups)
    metadata: dict[str, Any] = contents["metadata"]
    return metadata


def _check_globals(file: BinaryIO, path: str | os.PathLike[str]) -> None:
    file.seek(0)
    unsafe = get_unsafe_globals_in_checkpoint(file)
    if unsafe:
        raise CheckpointError(
            f"{path}: the model or optimizer holds objects of {', '.join(sorted(unsafe))}, and "
            "loading these could run code. Keep tensors and plain data in state dicts, or allow "
            "the classes with torch.serialization.add_safe_globals"
        )


def _read(path: str) -> dict[str, Any]:
    """What a file holds, on the CPU: ``load_state_dict`` copies it to the model's devices."""
    with open(path, "rb") as file:
        reason = broken_seal(file)
        if reason is not None:
            raise CheckpointError(
                f"{path}: {reason}. Load a file that kasmina_fx.checkpoint.save wrote; for a plain "
                "state dict, call model.load_state_dict"
            )
        file.seek(0)
        try:
            contents = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a forged file makes of the reader
            raise CheckpointError(
                f"{path}: torch.load with weights_only=True refuses it: {error}"
            ) from error
    return _checked(contents, path)


def _checked(contents: Any, path: str) -> dict[str, Any]:
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path}: kasmina_fx.checkpoint.save did not write this file")
    if contents.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {contents.get('version')!r}; this release reads version "
            f"{VERSION}. Load it with the release that saved it"
        )
    model, optimizer = contents.get("model"), contents.get("optimizer")
    named = isinstance(model, dict) and all(isinstance(name, str) for name in model)
    if not named or not (optimizer is None or isinstance(optimizer, dict)):
        raise CheckpointError(f"{path}: a malformed file: 'model' or 'optimizer' is no state dict")
    for key, value in (model or {}).items():
        dense = not_dense(value)
        if dense is not None:
            raise CheckpointError(f"{path}: {key} {dense}")
    _check_metadata(contents.get("metadata"), f"{path}: metadata")
    return contents


def _check_metadata(value: Any, where: str, inside: tuple[int, ...] = ()) -> None:
    """Refuse all that does not come back as it is; exact types, since subclasses are pickled."""
    if inside and (value is None or type(value) in (bool, int, float, str)):
        return
    allowed = (dict, list) if inside else (dict,)
    if type(value) not in allowed or id(value) in inside:
        what = "itself again" if id(value) in inside else f"a {type(value).__name__}"
        raise CheckpointError(
            f"{where} is {what}; metadata is a dict of None, bool, int, float, str, and lists and "
            "dicts of these: convert it first"
        )
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and type(key) is not str:
            raise CheckpointError(f"{where} has the key {key!r}; give str keys")
        _check_metadata(item, f"{where}[{key!r}]", (*inside, id(value)))


# Models.


def _prefixes(model: nn.Module) -> dict[str, KasminaLayer]:
    """Every layer by the prefix of its seeds' entries; shared layers by each name."""
    return {
        saved_prefix(name) + OWN: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, KasminaLayer)
    }


def _copied(saved: dict[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """The same entries; those of seeds are copies, on which no later command has an effect."""
    own, copies = tuple(prefixes), {}
    for name, value in saved.items():
        if name.startswith(own) and isinstance(value, Tensor):
            key = (value.data_ptr(), value.shape, value.dtype)  # a layer may have several names
            if key not in copies:
                copies[key] = value.detach().clone()
            saved[name] = copies[key]
    return saved


def _check_layers(model: nn.Module, saved: dict[str, Any], strict: bool = False) -> None:
    layers = _prefixes(model)
    for prefix, layer in layers.items():
        check_entries(layer.kasmina, saved, prefix.removesuffix(OWN))
    have = {prefix: any(name.startswith(prefix) for name in saved) for prefix in layers}
    lacking = [p.removesuffix(f".{OWN}") for p, has in have.items() if not has]
    if strict and lacking and any(have.values()):
        raise CheckpointError(
            f"no entries of the seeds of {lacking[:4]}, unlike of other layers: it was cut off, or "
            "its model was kasminified in another way. strict=False leaves these as they are"
        )


def _check_host(
    model: nn.Module, saved: dict[str, Any], own: tuple[str, ...], strict: bool, path: str
) -> None:
    """Check all other entries: ``load_state_dict`` does so once it has loaded those that fit."""
    theirs = {k: v for k, v in saved.items() if not k.startswith(own)}
    ours = {k: v for k, v in model.state_dict().items() if not k.startswith(own)}
    missing, unknown = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if strict and (missing or unknown):
        raise CheckpointError(
            f"{path} was saved from another model: missing are {missing[:4] or 'none'}, unknown "
            f"{unknown[:4] or 'none'}. Build and kasminify the model in the same way"
        )
    for name in sorted(ours.keys() & theirs.keys()):
        mine, given = ours[name], theirs[name]
        if not isinstance(mine, Tensor) or is_lazy(mine):
            continue
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if found != tuple(mine.shape):
            raise CheckpointError(f"{path}: {name} is {found}; the model takes {tuple(mine.shape)}")
