"""Kernels of older layers: saved by one process, verified and loaded by another."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import KasminaError, SeedLifecycle, optim
from kasmina_fx.blueprints import register
from kasmina_fx.compat import (
    ArtifactError,
    BlueprintStore,
    FsspecStore,
    KasminaLayer,
    LocalStore,
    Manifest,
    SeedLifecycleState,
    default_store,
    use_store,
)
from kasmina_fx.testing import graft

AFFINE = {"scale": torch.tensor([1.0, 2.0]), "shift": torch.tensor([0.5, -0.5])}


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[LocalStore]:
    kept = LocalStore(tmp_path / "kernels")
    use_store(kept)
    yield kept
    use_store(None)


def test_the_default_store_is_a_directory(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_store() is store
    use_store(None)
    monkeypatch.delenv("KASMINA_FX_STORE", raising=False)
    first = default_store()
    assert isinstance(first, LocalStore)
    assert first.directory == Path.home() / ".cache" / "kasmina_fx" / "kernels"
    monkeypatch.setenv("KASMINA_FX_STORE", str(tmp_path / "named"))
    second = default_store()
    assert isinstance(second, LocalStore)
    assert second.directory == tmp_path / "named"
    assert (second.ids(), second.directory.exists()) == ([], False)
    with pytest.raises(KasminaError, match="give a BlueprintStore"):
        use_store("somewhere")  # type: ignore[arg-type]  # the point


def load(layer: KasminaLayer, seed: int, artifact_id: str) -> bool:
    return asyncio.run(layer.load_kernel(seed, artifact_id))


def test_a_loaded_kernel_is_what_was_saved(store: LocalStore) -> None:
    layer, x = KasminaLayer(8, 8), torch.randn(5, 8)
    store.save("bend", "affine", 2, AFFINE, confidence=0.7)
    assert load(layer, 1, "bend")
    assert layer.seeds[1].stage is SeedLifecycle.FINE_TUNING
    assert layer.seeds[1].alpha == pytest.approx(0.42)  # 0.6 * 0.7
    y = layer.default_transform(x)
    expected = y.clone()
    expected[:, 2:4] += 0.42 * (y[:, 2:4] * AFFINE["scale"] + AFFINE["shift"] - y[:, 2:4])
    torch.testing.assert_close(layer(x), expected)
    layout = layer.state_layout
    assert layout.get_active_seeds().tolist() == [False, True, False, False]
    assert int(layout.active_kernel_id[1]) == store.manifest("bend").kernel_id > 0


@pytest.mark.parametrize(("confidence", "alpha"), [(0.0, 0.0), (0.5, 0.3), (0.9, 0.5), (1.0, 0.5)])
def test_alpha_follows_confidence(store: LocalStore, confidence: float, alpha: float) -> None:
    layer = KasminaLayer(8, 8)
    store.save("bend", "affine", 2, AFFINE, confidence=confidence)
    assert load(layer, 0, "bend")
    assert layer.seeds[0].alpha == pytest.approx(alpha)


def test_unload_gives_the_host_back(store: LocalStore) -> None:
    layer, x = KasminaLayer(8, 8), torch.randn(5, 8)
    store.save("bend", "affine", 2, AFFINE)
    assert load(layer, 1, "bend")
    assert asyncio.run(layer.unload_kernel(1))
    assert torch.equal(layer(x), layer.default_transform(x))
    assert layer.seeds[1].alpha == 0
    assert int(layer.state_layout.active_kernel_id[1]) == 0
    assert asyncio.run(layer.unload_kernel(1))  # twice is once


def test_another_kernel_takes_the_place_of_the_first_in_one_moment(store: LocalStore) -> None:
    layer, x = KasminaLayer(8, 8), torch.randn(5, 8)
    store.save("bend", "affine", 2, AFFINE)
    store.save("back", "affine", 2, {name: -t for name, t in AFFINE.items()})
    assert load(layer, 1, "bend")
    first = layer(x)
    assert load(layer, 1, "back")
    assert not torch.allclose(layer(x), first)
    assert load(layer, 1, "bend")
    torch.testing.assert_close(layer(x), first)


@pytest.mark.untraced
def test_an_artifact_of_one_process_loads_in_another(store: LocalStore) -> None:
    code = """
import sys, torch
from kasmina_fx.compat import KasminaLayer, LocalStore
from kasmina_fx.testing import graft
layer = KasminaLayer(8, 8)
layer.kernel_cache.store = LocalStore(sys.argv[1])
graft(layer, 0, "lora")
for p in layer.blueprint_parameters():
    p.data.fill_(0.25)
print(layer.save_kernel(0, "from-there", metadata={"by": "another"}).kernel_id)
"""
    command = [sys.executable, "-c", code, str(store.directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    layer = KasminaLayer(8, 8)
    assert load(layer, 3, "from-there")
    held = layer.bank_of(3)
    assert held is not None
    for tensor in held[0].slot_tensors(held[1]).values():
        assert torch.equal(tensor, torch.full_like(tensor, 0.25))
    assert int(layer.state_layout.active_kernel_id[3]) == int(done.stdout)
    assert store.manifest("from-there").metadata == {"by": "another"}


def test_a_loaded_kernel_learns_with_an_optimizer_that_was_there_before(store: LocalStore) -> None:
    layer, x = KasminaLayer(8, 8), torch.randn(5, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    optim.follow(optimizer, layer)
    store.save("bend", "affine", 2, AFFINE)
    assert load(layer, 1, "bend")
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    held = layer.bank_of(1)
    assert held is not None
    learnt = held[0].slot_tensors(held[1])
    assert all(not torch.allclose(learnt[name], AFFINE[name]) for name in AFFINE)
    layer.save_kernel(1, "learnt")
    assert torch.equal(store.load("learnt").tensors["scale"], learnt["scale"])


def test_dtype_and_device_are_the_layer_s(store: LocalStore) -> None:
    layer = KasminaLayer(8, 8).double()
    store.save("bend", "affine", 2, AFFINE)
    assert load(layer, 0, "bend")
    assert {p.dtype for p in layer.blueprint_parameters()} == {torch.float64}


# What fails gives False, leaves the seed DORMANT, and is told.


def edit(path: Path, **changes: Any) -> None:
    whole = json.loads(path.read_text())
    whole.update(changes)
    path.write_text(json.dumps(whole))


def missing(store: LocalStore) -> None:
    pass


def no_data(store: LocalStore) -> None:
    manifest = store.save("k", "affine", 2, AFFINE)
    (store.directory / f"{manifest.sha256}.safetensors").unlink()


def flipped(store: LocalStore) -> None:
    manifest = store.save("k", "affine", 2, AFFINE)
    path = store.directory / f"{manifest.sha256}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(store: LocalStore) -> None:
    store.save("k", "affine", 2, AFFINE)
    path = store.directory / "k.json"
    path.write_text(path.read_text()[:40])


def other_version(store: LocalStore) -> None:
    store.save("k", "affine", 2, AFFINE)
    edit(store.directory / "k.json", version=99)


def other_format(store: LocalStore) -> None:
    store.save("k", "affine", 2, AFFINE)
    edit(store.directory / "k.json", format="something")


def bad_hash(store: LocalStore) -> None:
    store.save("k", "affine", 2, AFFINE)
    edit(store.directory / "k.json", sha256="../../../etc/passwd")


def unknown_blueprint(store: LocalStore) -> None:
    store.save("k", "affine", 2, AFFINE)
    edit(store.directory / "k.json", blueprint="os.system")


def other_shapes(store: LocalStore) -> None:
    store.save("k", "affine", 2, AFFINE)
    edit(store.directory / "k.json", shapes={"scale": [2]})


def other_blueprint(store: LocalStore) -> None:
    store.save("k", "affine", 2, AFFINE)
    edit(store.directory / "k.json", blueprint="mlp")


def wrong_size(store: LocalStore) -> None:
    store.save("k", "affine", 3, {name: torch.ones(3) for name in AFFINE})


def bad_confidence(store: LocalStore) -> None:
    store.save("k", "affine", 2, AFFINE)
    edit(store.directory / "k.json", confidence=7)


def no_safetensors(store: LocalStore) -> None:
    manifest = store.save("k", "affine", 2, AFFINE)
    import hashlib

    data = b"not at all"
    digest = hashlib.sha256(data).hexdigest()
    (store.directory / f"{digest}.safetensors").write_bytes(data)
    edit(store.directory / "k.json", sha256=digest, nbytes=manifest.nbytes)


def from_safetensors(store: LocalStore, tensors: dict[str, Tensor]) -> None:
    import hashlib

    from safetensors.torch import save

    store.save("k", "affine", 2, AFFINE)
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    (store.directory / f"{digest}.safetensors").write_bytes(data)
    edit(store.directory / "k.json", sha256=digest)


def with_nan(store: LocalStore) -> None:
    from_safetensors(store, AFFINE | {"shift": torch.tensor([0.0, torch.nan])})


def with_ints(store: LocalStore) -> None:
    from_safetensors(store, {name: t.long() for name, t in AFFINE.items()})


FAILURES = {
    missing: "has no artifact",
    no_data: "its data is gone",
    flipped: "its data is corrupt: SHA-256",
    cut: "its manifest can't be read",
    other_version: "version 99; this release reads 1",
    other_format: "something else than",
    bad_hash: "64 hexadecimal digits",
    unknown_blueprint: "no blueprint is named 'os.system'",
    other_shapes: "its data holds",
    other_blueprint: "'mlp' has",
    wrong_size: "for chunks of 3 features; that of seed 1 has 2",
    bad_confidence: "a number from 0 to 1",
    no_safetensors: "is no safetensors",
    with_nan: "NaN or Inf",
    with_ints: "floating point is needed",
}


@pytest.mark.parametrize("prepare", FAILURES, ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("was", [SeedLifecycleState.DORMANT, SeedLifecycleState.ACTIVE])
def test_what_can_t_be_loaded_leaves_the_seed_dormant_and_says_why(
    prepare: Any, was: SeedLifecycleState, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = KasminaLayer(8, 8, layer_name="fc"), torch.randn(5, 8)
    layer.state_layout.transition_seed_state(1, was)
    prepare(store)
    with caplog.at_level(logging.WARNING):
        assert not load(layer, 1, "k")
    assert layer.seeds[1].stage is SeedLifecycle.DORMANT
    assert layer.seeds[1].alpha == 0
    assert layer.state_layout.get_stats()["dormant_seeds"] == 4
    assert torch.equal(layer(x), layer.default_transform(x))
    assert "fc[1]: k not loaded: " in caplog.text
    assert FAILURES[prepare] in caplog.text
    (error,) = layer.get_layer_stats()["error_recovery_stats"]["recent_errors"]
    assert FAILURES[prepare] in error["reason"]
    assert (error["seed_idx"], error["artifact_id"]) == (1, "k")


@pytest.mark.parametrize("bad", ["../k", "/etc/passwd", "", ".hidden", "a/b", 3, None, "k" * 201])
def test_an_id_names_no_other_file(store: LocalStore, bad: Any) -> None:
    layer = KasminaLayer(8, 8)
    assert not load(layer, 0, bad)
    assert layer.error_recovery.get_recovery_stats()["errors_by_kind"] == {"ArtifactError": 1}
    with pytest.raises(KasminaError, match="an id is up to 200"):
        store.save(bad, "affine", 2, AFFINE)
    assert store.ids() == []


def test_an_id_does_not_lead_out_of_the_store(store: LocalStore) -> None:
    LocalStore(store.directory.parent).save("k", "affine", 2, AFFINE)
    store.save("inside", "affine", 2, AFFINE)  # the same data
    assert not load(KasminaLayer(8, 8), 0, "../k")
    assert load(KasminaLayer(8, 8), 0, "inside")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensors": {"scale": torch.ones(2)}}, "it is incompatible"),
        ({"tensors": AFFINE | {"scale": torch.tensor([1.0, torch.inf])}}, "NaN or Inf"),
        ({"blueprint": "nothing"}, "no blueprint is named 'nothing'"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"confidence": 1.5}, "from 0 to 1"),
        ({"confidence": float("nan")}, "confidence=nan"),
        ({"metadata": {"x": object()}}, "JSON can't hold it"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    store: LocalStore, given: dict[str, Any], message: str
) -> None:
    whole: dict[str, Any] = {"blueprint": "affine", "chunk_size": 2, "tensors": AFFINE} | given
    with pytest.raises(KasminaError, match=message):
        store.save("k", **whole)
    assert store.ids() == []


class Unreachable(BlueprintStore):
    def read(self, name: str) -> bytes:
        raise ConnectionError("no route")

    def write(self, name: str, content: bytes) -> None:
        raise ConnectionError("no route")

    def names(self) -> list[str]:
        return ["k.json"]


def test_the_third_error_that_is_not_the_artifact_s_is_error_recovery() -> None:
    layer = KasminaLayer(8, 8)
    layer.kernel_cache.store = Unreachable()
    for state in (SeedLifecycleState.DORMANT,) * 2 + (SeedLifecycleState.ERROR_RECOVERY,):
        assert not load(layer, 2, "k")
        assert int(layer.state_layout.lifecycle_states[2]) == state
    stats = layer.error_recovery.get_recovery_stats()
    assert (stats["total_errors"], stats["errors_by_kind"]) == (3, {"ConnectionError": 3})
    assert bool(layer.state_layout.fallback_active[2])
    with pytest.raises(ConnectionError):
        layer.find_compatible_kernels()


def test_a_seed_in_error_recovery_takes_a_good_kernel(store: LocalStore) -> None:
    layer = KasminaLayer(8, 8)
    layer.state_layout.transition_seed_state(2, SeedLifecycleState.ERROR_RECOVERY)
    layer.state_layout.error_count[2] = 3
    store.save("bend", "affine", 2, AFFINE)
    assert load(layer, 2, "bend")
    assert int(layer.state_layout.error_count[2]) == 0


class Slow(LocalStore):
    """Waits before it answers; says when it was asked."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.asked, self.go = threading.Event(), threading.Event()

    def read(self, name: str) -> bytes:
        self.asked.set()
        assert self.go.wait(60)
        return super().read(name)


def test_a_seed_is_loading_while_its_kernel_is_read_and_the_last_word_counts(
    store: LocalStore,
) -> None:
    store.save("bend", "affine", 2, AFFINE)
    layer = KasminaLayer(8, 8)
    slow = layer.kernel_cache.store = Slow(store.directory)

    async def unload_meanwhile() -> bool:
        task = asyncio.create_task(layer.load_kernel(1, "bend"))
        await asyncio.to_thread(slow.asked.wait, 60)
        assert int(layer.state_layout.lifecycle_states[1]) == SeedLifecycleState.LOADING
        assert layer.state_layout.get_stats()["loading_seeds"] == 1
        await layer.unload_kernel(1)
        slow.go.set()
        return await task

    assert not asyncio.run(unload_meanwhile())
    assert layer.state_layout.get_stats()["dormant_seeds"] == 4
    assert layer.error_recovery.get_recovery_stats()["total_errors"] == 0
    assert load(layer, 1, "bend")


def test_find_compatible_kernels_looks_at_chunks_blueprints_and_size(store: LocalStore) -> None:
    layer = KasminaLayer(8, 10)  # chunks of 3, 3, 2 and 2
    assert layer.find_compatible_kernels() == []
    store.save("two", "affine", 2, AFFINE)
    store.save("three", "affine", 3, {name: torch.ones(3) for name in AFFINE})
    store.save("four", "affine", 4, {name: torch.ones(4) for name in AFFINE})
    store.save("other", "affine", 2, AFFINE)
    edit(store.directory / "other.json", blueprint="not-here")
    (store.directory / "broken.json").write_text("{")
    found = layer.find_compatible_kernels()
    assert [name for name, _ in found] == ["two", "three"]
    assert all(isinstance(manifest, Manifest) for _, manifest in found)
    assert found[0][1].memory_footprint_mb == 16 / 2**20
    assert [name for name, _ in layer.find_compatible_kernels(20 / 2**20)] == ["two"]
    assert layer.find_compatible_kernels(max_memory_mb=0.0) == []


def test_the_cache_keeps_what_was_read_and_misses_nothing_new(store: LocalStore) -> None:
    layer = KasminaLayer(8, 8, num_seeds=4)
    store.save("bend", "affine", 2, AFFINE)
    assert load(layer, 0, "bend")
    assert load(layer, 1, "bend")
    store.save("bend", "affine", 2, {name: 2 * t for name, t in AFFINE.items()})
    assert load(layer, 2, "bend")
    held = layer.bank_of(2)
    assert held is not None
    assert torch.equal(held[0].slot_tensors(held[1])["shift"], 2 * AFFINE["shift"])
    stats = layer.kernel_cache.get_cache_stats()
    assert (stats["hits"], stats["misses"], stats["entries"], stats["failures"]) == (1, 2, 2, 0)
    assert stats["hit_rate"] == pytest.approx(1 / 3)
    assert stats["total_size_mb"] == 32 / 2**20
    small = KasminaLayer(8, 8, cache_size_mb=0)
    assert load(small, 0, "bend")
    assert small.kernel_cache.get_cache_stats()["evictions"] == 1


def test_a_seed_without_a_blueprint_has_nothing_to_save() -> None:
    with pytest.raises(KasminaError, match="seed 0 holds no blueprint"):
        KasminaLayer(8, 8).save_kernel(0, "k")


class Counting(nn.Module):
    """Has a buffer of integers."""

    index: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.register_buffer("index", torch.arange(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.index


def test_a_user_s_blueprint_goes_by_its_name(store: LocalStore) -> None:
    register(Counting, name="counting")
    layer = KasminaLayer(8, 8)
    graft(layer, 0, "counting")
    layer.save_kernel(0, "own")
    assert load(layer, 1, "own")
    wrong = {"gain": torch.ones(2), "index": torch.ones(2)}
    with pytest.raises(ArtifactError, match=r"index is torch\.float32; torch\.int64 is needed"):
        store.save("wrong", "counting", 2, wrong)


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
