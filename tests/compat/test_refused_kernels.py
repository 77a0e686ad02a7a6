"""Kernels that can not be loaded leave the seed DORMANT, and it is told why."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_cases import AFFINE, edit, load, store
from torch import Tensor

from kasmina_fx import KasminaError, SeedLifecycle
from kasmina_fx.compat import (
    BlueprintStore,
    KasminaLayer,
    LocalStore,
    SeedLifecycleState,
)

__all__ = ["store"]


# What fails gives False, leaves the seed DORMANT, and is told.


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
