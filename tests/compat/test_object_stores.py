"""Kernels in object stores, and who hears of them."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_cases import AFFINE, load, store

from kasmina_fx import KasminaError, SeedLifecycle
from kasmina_fx.compat import (
    ArtifactError,
    FsspecStore,
    KasminaLayer,
    LocalStore,
    default_store,
)
from kasmina_fx.testing import graft

__all__ = ["store"]


# Object stores.


@pytest.fixture(params=["memory", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> FsspecStore:
    pytest.importorskip("fsspec")
    place = f"/{tmp_path.name}/kernels" if request.param == "memory" else tmp_path / "remote"
    return FsspecStore(f"{request.param}://{place}")


def test_an_object_store_does_the_same(remote: FsspecStore) -> None:
    assert remote.ids() == []
    layer = KasminaLayer(8, 8)
    layer.kernel_cache.store = remote
    assert not load(layer, 0, "bend")
    remote.save("bend", "affine", 2, AFFINE)
    assert remote.ids() == ["bend"]
    assert load(layer, 0, "bend")
    assert [name for name, _ in layer.find_compatible_kernels()] == ["bend"]
    remote.save("bend", "affine", 2, {name: 2 * t for name, t in AFFINE.items()})
    again = FsspecStore(remote.url)  # as another process would
    assert torch.equal(again.load("bend").tensors["shift"], 2 * AFFINE["shift"])
    data = f"{again.manifest('bend').sha256}.safetensors"
    remote.write(data, remote.read(data)[:-1])
    with pytest.raises(ArtifactError, match="corrupt"):
        again.load("bend")
    assert remote.url in repr(remote)
    with pytest.raises(KasminaError, match="give a str"):
        FsspecStore(3)  # type: ignore[arg-type]  # the point


def test_a_write_that_fails_leaves_what_was_there(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save("bend", "affine", 2, AFFINE)
    before = sorted(store.names())

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        store.save("bend", "affine", 2, {name: 2 * t for name, t in AFFINE.items()})
    assert sorted(path.name for path in store.directory.iterdir()) == before
    assert torch.equal(store.load("bend").tensors["shift"], AFFINE["shift"])


@pytest.mark.parametrize("package", ["fsspec", "safetensors"])
def test_what_is_not_installed_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(KasminaError, match=r"pip install 'kasmina-fx\[stores\]'"):
        _ = (
            FsspecStore("memory://k")
            if package == "fsspec"
            else default_store().save("k", "affine", 2, AFFINE)
        )


class Bus:
    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    async def publish(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def test_the_message_bus_hears_of_kernels(caplog: pytest.LogCaptureFixture) -> None:
    bus = Bus()
    layer = KasminaLayer(8, 8, layer_name="heard", oona_client=bus)
    graft(layer, 0, "affine", stage=SeedLifecycle.GRAFTING)
    layer.save_kernel(0, "a")
    asyncio.run(layer.load_kernel(1, "a"))
    asyncio.run(layer.load_kernel(2, "gone"))
    asyncio.run(layer.unload_kernel(1))
    events = [(m["event"], m["seed_idx"], m["artifact_id"]) for m in bus.sent]
    assert events == [
        ("kernel_loaded", 1, "a"),
        ("kernel_load_failed", 2, "gone"),
        ("kernel_unloaded", 1, ""),
    ]
    assert bus.sent[0]["alpha"] == pytest.approx(0.3)
    layer.telemetry_enabled = False
    asyncio.run(layer.unload_kernel(1))
    assert len(bus.sent) == 3

    class Plain:
        def publish(self, message: dict[str, Any]) -> None:
            raise ConnectionError("no bus today")

    layer.telemetry_enabled, layer.oona_client = True, Plain()
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(layer.load_kernel(1, "a"))  # a client's failure is a warning
    assert "no bus today" in caplog.text
    assert layer.telemetry_enabled
