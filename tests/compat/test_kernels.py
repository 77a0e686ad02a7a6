"""Kernels of older layers: saved by one process, verified and loaded by another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifact_cases import AFFINE, edit, load, store
from torch import Tensor, nn

from kasmina_fx import KasminaError, SeedLifecycle, optim
from kasmina_fx.blueprints import register
from kasmina_fx.compat import (
    ArtifactError,
    KasminaLayer,
    LocalStore,
    Manifest,
    default_store,
    use_store,
)
from kasmina_fx.testing import graft

__all__ = ["store"]


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
