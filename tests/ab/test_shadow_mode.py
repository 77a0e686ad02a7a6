"""Shadow mode compares some calls, and nobody can tell from the model that it did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hybrid_cases import flags_in_memory
from layer_cases import assert_bitwise, perturb
from torch import nn

from kasmina_fx import ChunkedKasminaLayer, HybridKasminaLayer, NoTargets, reference
from kasmina_fx.ab import ShadowMode
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.testing import graft

MODES = ("legacy", "chunked")


class Noisy(nn.Module):
    """A base with everything that a second run could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.BatchNorm1d(12))
        self.out_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out


def net_of(mode: str) -> nn.Sequential:
    torch.manual_seed(0)
    layer = HybridKasminaLayer(
        Noisy(),
        "fc",
        4,
        force_implementation=mode,
        feature_flags=flags_in_memory(),
        feature_dim=-1,
        chunk_sizes=[3, 3, 3, 3],
    )
    graft(layer, [0, 3], "mlp", 0.5)
    perturb(layer)
    return nn.Sequential(layer, nn.Linear(12, 2))


def hybrid_of(net: nn.Sequential) -> HybridKasminaLayer:
    layer = net[0]
    assert isinstance(layer, HybridKasminaLayer)
    return layer


@pytest.mark.parametrize("mode", MODES)
def test_answers_gradients_state_and_random_numbers_are_as_without_it(mode: str) -> None:
    plain, watched = net_of(mode), net_of(mode)
    shadow, found = ShadowMode(watched, share=1.0), {}
    shadow.attach()
    for net in (plain, watched):
        torch.manual_seed(1)
        outs = []
        for _ in range(3):
            out = net(torch.randn(16, 6))
            out.square().mean().backward()
            outs.append(out)
        found[net] = outs, torch.rand(1)
    for a, b in zip(*(found[net][0] for net in (plain, watched)), strict=True):
        assert_bitwise(a, b)
    assert torch.equal(found[plain][1], found[watched][1])
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad)
    report = shadow.report()
    seen = report["layers"]["fc"]
    assert (seen["compared"], seen["failed"], seen["error"]) == (3, 0, None)
    assert 0.0 <= seen["mean_difference"] <= seen["max_difference"] < 1e-5
    assert report["parity"] is True
    assert sum(hybrid_of(watched).get_implementation_stats()["calls"].values()) == 3


def test_it_looks_at_a_share_and_detaches() -> None:
    net, x = net_of("chunked"), torch.randn(4, 6)
    shadow = ShadowMode(net, share=0.3, seed=3)
    assert shadow.report() == {"share": 0.3, "bound": 1e-5, "layers": {}, "parity": None}
    with shadow:
        for _ in range(100):
            net(x)
        assert copy.deepcopy(net)[0].shadow is None
    seen = shadow.report()["layers"]["fc"]["compared"]
    assert 15 <= seen <= 45
    net(x)
    assert shadow.report()["layers"]["fc"]["compared"] == seen
    nobody = ShadowMode(net, share=0.0)
    with nobody, ShadowMode(net, share=1.0) as later:
        nobody.detach()  # of what it is not attached to any more
        net(x)
    assert nobody.report()["layers"] == {}
    assert later.report()["layers"]["fc"]["compared"] == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_difference_is_seen_and_not_answered(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = net_of(mode).eval(), torch.randn(4, 6)
    expected = net(x)
    right = reference.seeds_on
    if mode == "chunked":  # the other one is wrong
        monkeypatch.setattr(reference, "seeds_on", lambda layer, out: right(layer, out) + 0.5)
    else:
        monkeypatch.setattr(
            HybridKasminaLayer, "_other", lambda self, *a: right(self, self.base(x)) - 1
        )
    with ShadowMode(net, share=1.0) as shadow:
        assert_bitwise(net(x), expected)
    seen = shadow.report()
    assert seen["parity"] is False
    assert seen["layers"]["fc"]["max_difference"] >= 0.5 - 1e-6


def test_what_the_other_one_raises_is_counted_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net, x = net_of("chunked").eval(), torch.randn(4, 6)
    expected = net(x)

    def broken(layer: Any, out: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(reference, "seeds_on", broken)
    with ShadowMode(net, share=1.0) as shadow:
        for _ in range(3):
            assert_bitwise(net(x), expected)
    seen = shadow.report()
    assert seen["parity"] is False
    assert seen["layers"]["fc"]["failed"] == 3
    assert seen["layers"]["fc"]["error"] == "RuntimeError: no such thing"
    assert len(caplog.records) == 1
    assert hybrid_of(net).get_implementation_stats()["switched_off"] == {}


def test_an_empty_batch_differs_by_nothing() -> None:
    net = net_of("chunked").eval()
    with ShadowMode(net, share=1.0) as shadow:
        net(torch.randn(0, 6))
    assert shadow.report()["layers"]["fc"]["max_difference"] == 0.0


def test_bad_arguments_are_refused() -> None:
    net = net_of("chunked")
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(InvalidArgument, match="share"):
            ShadowMode(net, share=share)
    with pytest.raises(InvalidArgument, match="bound"):
        ShadowMode(net, bound=-1)
    with pytest.raises(NoTargets, match="KasminaLayer"):
        ShadowMode(nn.Linear(2, 2))
    with pytest.raises(NoTargets, match="HybridKasminaLayer"):
        ShadowMode(ChunkedKasminaLayer(nn.Linear(4, 6), 3))
