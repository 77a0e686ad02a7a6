"""Writing a checkpoint: what is on the disk at every moment."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import grown, network
from torch import nn
from torch.optim import AdamW

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    checkpoint,
)
from kasmina_fx.checkpoint.sealed_file import Sealing
from kasmina_fx.testing import graft


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def test_permissions_are_those_of_the_old_file_or_of_any_new_one(path: Path) -> None:
    model = nn.Linear(1, 1)
    with _umask(0o027):
        checkpoint.save(model, path)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    checkpoint.save(model, path)
    assert path.stat().st_mode & 0o777 == 0o604


def test_a_link_stays_and_its_target_is_replaced(path: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target.pt"
    path.symlink_to(target)
    checkpoint.save(nn.Linear(1, 1), path)
    assert path.is_symlink()
    assert sorted(tmp_path.rglob("*.pt")) == [target, path]
    checkpoint.load(nn.Linear(1, 1), target)


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_after_an_exception_the_old_file_is_whole_and_no_other_is_left(
    path: Path, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(network(), path)
    before = path.read_bytes()

    def fail(*args: Any) -> Any:
        raise error

    owner: Any = Sealing if where == "write" else os
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises((type(error), RuntimeError)):
        checkpoint.save(grown(), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_data_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append(f"fsync {'folder' if name == str(path.parent) else 'file'}")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        seen.append(f"replace {source.parent == target.parent} {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint.save(network(), path)
    assert seen == ["fsync file", "replace True net.pt", "fsync folder"]


def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_nothing_else(path: Path) -> None:
    left, live = (path.with_name(f".net.pt.{digit * 16}.tmp") for digit in "ab")
    other, own = path.with_name(".other.pt.aaaaaaaaaaaaaaaa.tmp"), path.with_name(".net.pt.my.tmp")
    for file in (left, live, other, own):
        file.write_bytes(b"half")
    with open(live, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        checkpoint.save(network(), path)
    assert set(path.parent.iterdir()) == {path, live, other, own}


def test_a_new_file_that_another_process_removed_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def removed_before_it_was_locked(descriptor: int, flags: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            os.unlink(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", removed_before_it_was_locked)
    checkpoint.save(network(), path)
    checkpoint.load(network(), path)
    assert len(calls) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no locks")

    left = path.with_name(f".net.pt.{'a' * 16}.tmp")
    left.touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    checkpoint.save(network(), path)
    checkpoint.load(network(), path)
    assert set(path.parent.iterdir()) == {path, left}


#: Forks a writer that saves two models by turns, kills it, and checks the file; again and again.
KILLING = """
import glob, hashlib, json, os, random, signal, sys, time
import torch
from torch import nn
from torch.optim import AdamW
from kasmina_fx import checkpoint, kasmina_layers, kasminify
from kasmina_fx.testing import graft

path, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
random.seed(0)


def network():
    net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    return kasminify(net, num_seeds=8, compile=False)


def digest(model):
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        data = value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode()
        found.update(name.encode() + data)
    return found.hexdigest()


def write_for_ever(models, turn):
    while True:
        checkpoint.save(models[turn % 2], path, metadata={"turn": turn % 2})
        turn += 1


models = [network(), network()]
for seeds, model in zip(([0, 1, 2], [5]), models):
    for layer in kasmina_layers(model).values():
        graft(layer, seeds, "mlp", 0.5)
expected = [digest(model) for model in models]
target = network()
checkpoint.save(models[0], path, metadata={"turn": 0})
start = time.perf_counter()
checkpoint.save(models[0], path, metadata={"turn": 0})
once = time.perf_counter() - start
loaded, interrupted = [0, 0], 0
for turn in range(1, kills + 1):
    writer = os.fork()
    if writer == 0:
        try:
            write_for_ever(models, turn)
        finally:
            os._exit(1)
    time.sleep(random.uniform(0, 4 * once))
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    interrupted += bool(glob.glob(os.path.join(glob.escape(os.path.dirname(path)), ".*.tmp")))
    which = checkpoint.load(target, path)["turn"]
    assert digest(target) == expected[which]
    loaded[which] += 1
checkpoint.save(models[0], path)
print(json.dumps({"loaded": loaded, "interrupted": interrupted, "once": once}))
"""


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_file_whole(
    path: Path, kills: int
) -> None:
    command = [sys.executable, "-c", KILLING, str(path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["loaded"]) == kills
    assert found["interrupted"] >= kills // 5, found  # else the kills have missed the writing
    assert kills < 100 or min(found["loaded"]) > 0, found
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_beside_a_busy_controller_is_of_one_moment(tmp_path: Path) -> None:
    layer = KasminaLayer(nn.Linear(8, 64), 64, reserve=64)
    done = threading.Event()

    def control() -> None:
        while not done.is_set():
            with layer.transaction():
                layer.reset(range(64))
                layer.request_germination(range(64))
                layer.advance(range(64), SeedLifecycle.TRAINING)

    controller = threading.Thread(target=control)
    controller.start()
    try:
        for _ in range(40):
            checkpoint.save(layer, tmp_path / "model.ckpt")  # refuses a state that is torn
    finally:
        done.set()
        controller.join()
    checkpoint.load(layer, tmp_path / "model.ckpt")


@pytest.mark.parametrize("grows", [False, True], ids=["reuse", "growth"])
def test_a_command_while_the_file_is_written_is_not_in_it(
    path: Path, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def life() -> tuple[KasminaLayer, AdamW]:
        layer = KasminaLayer(nn.Linear(8, 64), 64)
        graft(layer, [0, 1])
        optimizer = AdamW(layer.parameters())
        layer(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        return layer, optimizer

    layer, optimizer = life()
    held = layer.bank_of(0)
    assert held is not None
    weights = {name: t.detach().clone() for name, t in held[0].slot_tensors(held[1]).items()}
    momentum = optimizer.state[next(layer.blueprint_parameters())]["exp_avg"][0].clone()
    write = torch.save

    def meanwhile(*args: Any) -> None:
        if not grows:
            layer.reset([0])
        graft(layer, [5])
        write(*args)

    monkeypatch.setattr(torch, "save", meanwhile)
    checkpoint.save(layer, path, optimizer=optimizer)
    fresh, other = life()
    checkpoint.load(fresh, path, optimizer=other)
    assert fresh.seeds[0].stage is SeedLifecycle.GRAFTING
    assert fresh.seeds[5].stage is SeedLifecycle.DORMANT
    found = fresh.bank_of(0)
    assert found is not None
    for name, value in found[0].slot_tensors(found[1]).items():
        assert torch.equal(value, weights[name])
    stack = next(fresh.blueprint_parameters())
    assert torch.equal(other.state[stack]["exp_avg"][0], momentum)
    fresh(torch.ones(2, 8)).sum().backward()
    other.step()
