"""Files that are not what checkpoint.save wrote are refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import everything, forge, network, refused, saved_bytes, saved_contents
from torch import nn

from kasmina_fx import (
    checkpoint,
)
from kasmina_fx.checkpoint.sealed_file import Sealing
from kasmina_fx.errors import CheckpointError


@pytest.mark.parametrize("left", [0, 1, 20, 5000, -5000, -51, -50, -32, -1])
def test_a_file_that_was_cut_off_is_refused(path: Path, left: int) -> None:
    assert len(saved_bytes()) > 10_000
    path.write_bytes(saved_bytes()[:left])
    refused(path, "cut off")


def test_every_changed_byte_is_noticed(path: Path) -> None:
    checkpoint.save(nn.Linear(2, 2), path)
    data, model = path.read_bytes(), nn.Linear(2, 2)
    before = everything(model)
    for position in [*range(0, len(data), 7), *range(len(data) - 60, len(data))]:
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"SHA-256|cut off"):
            checkpoint.load(model, path)
    path.write_bytes(data + b"\n")
    with pytest.raises(CheckpointError, match="cut off"):
        checkpoint.load(model, path)
    assert everything(model) == before
    path.write_bytes(data)
    checkpoint.load(model, path)


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_code_in_a_file_is_not_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forge(path, {"format": checkpoint.FORMAT, "version": 1, "model": _Evil()})
    refused(path, "weights_only")
    with open(path, "wb") as file:
        sealing = Sealing(file)
        sealing.write(pickle.dumps(_Evil()))
        sealing.seal()
    refused(path, "weights_only")
    assert not Path("ran").exists()


OTHER_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a tensor": (lambda c: torch.zeros(1), "did not write"),
    "another dict": (lambda c: c["model"], "did not write"),
    "another format": (lambda c: {**c, "format": "other"}, "did not write"),
    "a newer version": (lambda c: {**c, "version": 2}, "version 2; this release reads version 1"),
    "no version": (lambda c: {"format": c["format"]}, "version None"),
    "no model": (lambda c: {**c, "model": None}, "malformed"),
    "a model without names": (lambda c: {**c, "model": {1: torch.zeros(1)}}, "malformed"),
    "an optimizer of another kind": (lambda c: {**c, "optimizer": 1}, "malformed"),
    "no metadata": (lambda c: {**c, "metadata": None}, "metadata is a NoneType"),
    "other metadata": (lambda c: {**c, "metadata": {"a": (1,)}}, "tuple"),
}


@pytest.mark.parametrize(("change", "match"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_sealed_file_of_another_kind_is_refused(
    path: Path, change: Callable[[dict[str, Any]], Any], match: str
) -> None:
    forge(path, change(saved_contents()))
    refused(path, match)


def test_a_plain_state_dict_is_refused_with_what_to_call(path: Path) -> None:
    torch.save(network().state_dict(), path)
    refused(path, "model.load_state_dict")


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(network(), path)
    with pytest.raises(FileNotFoundError):
        checkpoint.save(network(), path / "folder" / "net.pt")
