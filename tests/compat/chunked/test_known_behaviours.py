"""Fifteen behaviours of the reference that were wrong or a trap: what holds here, a test each."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kasmina_fx
from kasmina_fx import UnknownBlueprint, reference
from kasmina_fx.compat.chunked import (
    ChunkedKasminaLayer,
    ChunkManager,
    HybridKasminaLayer,
    SeedLifecycle,
)
from kasmina_fx.seeds import health
from kasmina_fx.transactions.buffers import start_copy

S = SeedLifecycle


def layer_of(base: nn.Module | None = None, num_seeds: int = 4) -> ChunkedKasminaLayer:
    torch.manual_seed(0)
    return ChunkedKasminaLayer(base or nn.Linear(4, 8), num_seeds, "fc")


def active(layer: ChunkedKasminaLayer, seeds: list[int]) -> None:
    assert layer.request_germination(seeds, "mlp")
    layer.state_tensor.batch_set_lifecycle_state(seeds, S.ACTIVE)
    layer.state_tensor.update_alpha_blend(seeds, 1.0)


def test_row_1_a_fossilized_seed_keeps_its_frozen_blueprint_in_effect() -> None:
    layer, x = layer_of(), torch.randn(5, 4)
    active(layer, [1])
    before = layer(x)
    layer.state_tensor.set_lifecycle_state(1, S.FOSSILIZED)
    assert torch.equal(layer(x), before)
    assert not torch.allclose(before, layer.base_layer(x))
    layer(x).square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.blueprint_parameters())


def test_row_2_blueprints_are_parameters_that_are_saved_and_learn() -> None:
    layer, x = layer_of(), torch.randn(5, 4)
    active(layer, [0, 2])
    names = {name for name, _ in layer.named_parameters() if ".banks." in name}
    assert names
    assert names <= set(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before = [p.detach().clone() for p in layer.blueprint_parameters()]
    layer(x).square().sum().backward()
    optimizer.step()
    after = list(layer.blueprint_parameters())
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_row_3_the_state_is_in_the_state_dict_with_a_versioned_layout() -> None:
    layer = layer_of()
    active(layer, [3])
    saved = layer.state_dict()
    assert saved["kasmina.state.state_tensor"].shape == (4, 4)
    assert saved["kasmina.state.alpha"].tolist() == [0.0, 0.0, 0.0, 1.0]
    other, x = layer_of(), torch.randn(5, 4)
    other.load_state_dict(saved)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(kasmina_fx.LayoutMismatch):
        layer_of(num_seeds=2).load_state_dict(saved)
    assert b"version" in bytes(saved["kasmina._extra_state"].tolist())


def test_row_4_a_seed_that_loads_becomes_active_by_itself() -> None:
    layer = layer_of()
    layer.request_germination(0, "mlp")
    for epoch in range(1, 41):
        kasmina_fx.step_epoch(layer)
        state = layer.state_tensor.get_seed_state(0)
        assert state["lifecycle_state"] == (S.LOADING if epoch < 30 else S.ACTIVE)
        assert state["alpha_blend"] == pytest.approx(min(1.0, epoch / 30))


@pytest.mark.parametrize("training", [True, False])
def test_row_5_epochs_are_the_callers_and_no_forward_counts_any(training: bool) -> None:
    layer, x = layer_of().train(training), torch.randn(5, 4)
    layer.request_germination(0, "mlp")
    layer.step_epoch()
    for _ in range(3):
        layer(x)
    state = layer.state_tensor.get_seed_state(0)
    assert (state["epochs_in_state"], state["alpha_blend"]) == (1, pytest.approx(1 / 30))


def test_row_6_a_negative_seed_is_a_value_error() -> None:
    layer = layer_of()
    for bad in (-1, -4, -5):
        with pytest.raises(ValueError, match=f"seed {bad} does not exist"):
            layer.request_germination(bad, "mlp")
    assert layer.state_tensor.get_state_distribution()["DORMANT"] == 4


def test_row_7_an_unknown_blueprint_is_an_error() -> None:
    layer = layer_of()
    with pytest.raises(UnknownBlueprint, match="no blueprint has the id 7"):
        layer.request_germination(0, 7)
    assert layer.state_tensor.get_lifecycle_states().tolist() == [0] * 4


def test_row_8_more_seeds_than_features_are_refused_or_clamped_and_no_health_is_nan(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ValueError, match="num_chunks=9"):
        ChunkManager(8, 9)
    with caplog.at_level(logging.WARNING):
        layer = ChunkedKasminaLayer(nn.Linear(4, 8))  # 1,000 by default
    assert layer.num_seeds == 8
    assert "8 features have 8 seeds, not 1000" in caplog.text
    layer(torch.randn(5, 4))
    assert set(layer.chunks.sizes) == {1}
    assert bool(layer.state_tensor.health_scores.isfinite().all())


def test_row_9_a_convolution_is_cut_along_its_channels() -> None:
    layer, x = layer_of(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 6, 5)
    active(layer, [1])
    out, base = layer(x), layer.base_layer(x)
    torch.testing.assert_close(out, reference.forward(layer, x))
    changed = (out != base).flatten(2).any(2).any(0)
    assert changed.tolist() == [False, False, True, True, False, False, False, False]


class _Nan(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain / (x * 0.0)


class _Widens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


def test_row_10_a_blueprint_is_tried_when_registered_and_nan_puts_its_seed_out() -> None:
    layer, x = layer_of(), torch.randn(5, 4)
    with pytest.raises(kasmina_fx.InvalidBlueprint):
        layer.register_blueprint(_Widens())
    active(layer, [0])
    layer.state_tensor.set_blueprint(0, layer.register_blueprint(_Nan, name=None))
    for count in (1, 2, 3):
        assert torch.equal(layer(x), layer.base_layer(x))  # nothing of it reaches the output
        assert layer.state_tensor.get_seed_state(0)["error_count"] == count
        layer.step_epoch()
        state = layer.state_tensor.get_seed_state(0)["lifecycle_state"]
        assert state == (S.ACTIVE if count < 3 else S.ERROR_RECOVERY)


def test_row_11_nothing_is_moved_in_a_forward() -> None:
    layer = layer_of().to("meta")
    with pytest.raises(RuntimeError):
        layer(torch.randn(5, 4))


def hybrid_of() -> HybridKasminaLayer:
    torch.manual_seed(0)
    return HybridKasminaLayer(nn.Linear(4, 8), "fc", 4, force_implementation="legacy")


def test_row_12_both_implementations_have_one_weight() -> None:
    layer = hybrid_of()
    mine, base = list(layer.parameters()), list(layer.base_layer.parameters())
    assert [id(p) for p in mine] == [id(p) for p in base]
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    alone = layer_of().state_dict().values()
    assert held <= 1.02 * sum(t.numel() * t.element_size() for t in alone)
    x = torch.randn(5, 4)
    legacy = layer(x)
    layer.enable_chunked_mode()
    torch.testing.assert_close(layer(x), legacy, atol=1e-6, rtol=1e-6)


def test_row_13_the_state_dict_is_plain_and_strict_and_older_ones_load() -> None:
    layer = hybrid_of()
    layer.request_germination(1, "mlp")
    saved = layer.state_dict()
    assert all(isinstance(value, Tensor) for value in saved.values())
    assert saved.keys() == layer_of_same_seeds().state_dict().keys()
    with pytest.raises(RuntimeError, match="nobody"):
        hybrid_of().load_state_dict({**saved, "nobody": torch.zeros(1)})
    linear = nn.Linear(4, 8)
    older: dict[str, Any] = {
        "chunked_layer": {f"base_layer.{n}": t for n, t in linear.state_dict().items()},
        "legacy_layer": nn.Linear(4, 8).state_dict(),
        "_implementation_calls": {"legacy": 3},
        "_implementation_latency": {"legacy": 0.1},
    }
    given = dict(older)
    layer.load_state_dict(older)
    assert older == given  # the caller's dict is left alone
    assert torch.equal(layer.weight, linear.weight)


def layer_of_same_seeds() -> ChunkedKasminaLayer:
    layer = layer_of()
    layer.request_germination(1, "mlp")
    return layer


def test_row_14_statistics_are_of_the_layer_whichever_way_it_runs() -> None:
    layer, x = hybrid_of(), torch.randn(16, 4)
    layer.request_germination(2, "mlp")
    layer(x)
    legacy = layer.get_layer_stats()
    assert (legacy["implementation"], legacy["forward_count"]) == ("legacy", 1)
    assert (legacy["active_count"], legacy["num_blueprints"]) == (1, 1)
    assert legacy["avg_latency_ms"]["legacy"] > 0.0
    told = layer.get_health_report()
    assert (told["implementation"], len(told["seeds"])) == ("legacy", 4)
    other = hybrid_of()
    other.request_germination(2, "mlp")
    other.enable_chunked_mode()
    other(x)
    for ours, theirs in zip(told["telemetry"], other.get_health_report()["telemetry"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


class _Reads(TorchDispatchMode):
    """Counts operators that read one number of a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's, unannotated
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return func(*args, **(kwargs or {}))


def test_row_15_a_report_copies_once_however_many_seeds_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies: list[Tensor] = []

    def counted(source: Tensor) -> Any:
        copies.append(source)
        return start_copy(source)

    monkeypatch.setattr(health, "start_copy", counted)
    reads = []
    for seeds in (10, 1000):
        layer = layer_of(nn.Linear(4, 2000), seeds)
        layer(torch.randn(8, 4))
        copies.clear()
        with _Reads() as seen:
            report = layer.get_health_report()
        assert len(report["seeds"]) == len(report["telemetry"]) == seeds
        assert len(copies) == 1
        reads.append(seen.reads)
    assert reads[0] == reads[1] <= 4  # of the host's tensors, none of them a seed's
