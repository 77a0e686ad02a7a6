"""Two hundred seeds live through every stage while a compiled model trains: nothing recompiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

import kasmina_fx
from kasmina_fx import KasminaLayer, SeedConfig, kasmina_layers, kasminify
from kasmina_fx.grafting import GraftingConfig
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles

# Coverage doubles the time that torch takes to compile; the files beside this one cover the lines.
pytestmark = pytest.mark.untraced

SEEDS = 200
WAVES = [range(2), range(2, 40), range(40, 200)]  # each outgrows the banks of the last
RAMP = 4


class Training:
    """A training loop that knows nothing of seeds."""

    def __init__(
        self,
        compiler: str,
        device: str = "cpu",
        *,
        pad: bool | None = None,
        reserve: int = 0,
        **kwargs: Any,
    ) -> None:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(8, SEEDS), nn.GELU(), nn.Linear(SEEDS, 4)).to(device)
        config = SeedConfig(GraftingConfig(fixed_steps=RAMP), embargo_epochs=1, pad=pad)
        self.model = kasminify(
            host, num_seeds=SEEDS, filter_fn=lambda m, name: name == "0", config=config,
            compile=compiler == "kasmina", **kwargs,
        )  # fmt: skip
        self.layer: KasminaLayer = kasmina_layers(self.model)["0"]
        if reserve:
            self.layer.reserve(reserve, "mlp")
        self.backend = RecordingBackend(compiler) if compiler != "kasmina" else None
        self.run: Any = self.model
        if self.backend is not None:
            self.run = torch.compile(self.model, backend=self.backend, fullgraph=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.batches = torch.Generator(device).manual_seed(1)
        self.losses: list[Tensor] = []

    def step(self) -> None:
        device = self.layer.state.alpha.device
        x = torch.randn(16, 8, generator=self.batches, device=device)
        self.optimizer.zero_grad()
        loss = (self.run(x) - x[:, :4].sin()).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach().clone())


def live(training: Training, *, reports: contextlib.AbstractContextManager[Any]) -> Iterator[S]:
    """Every transition there is, with steps between; yields what has just been entered."""
    layer, model = training.layer, training.model
    for wave in WAVES:
        seeds = list(wave)
        assert layer.request_germination(seeds, "mlp")
        training.step()
        yield S.GERMINATED
        half = len(seeds) // 2
        layer.advance(seeds, S.TRAINING)
        training.step()
        yield S.TRAINING
        if half > 4:  # some leave early, by each of the ways out
            with reports:
                snapshot = layer.snapshot(seeds[-4:])
            assert layer.cancel_germination(seeds[-1])
            layer.advance(seeds[-2], S.CULLED)
            layer.seeds[seeds[-3]].rollback(snapshot)
            training.step()
            yield S.CANCELLED
            yield S.CULLED
            yield S.ROLLED_BACK
            layer.advance(seeds[-1], S.DORMANT)
            layer.reset(seeds[-3])
            layer.rollback(snapshot)  # all four are in TRAINING again
            assert {layer.seeds[s].stage for s in seeds[-4:]} == {S.TRAINING}
        with kasmina_fx.transaction(model):
            layer.advance(seeds[:half], S.GRAFTING)
            layer.advance(seeds[half:], S.GRAFTING)
        for _ in range(RAMP):
            training.step()
            kasmina_fx.step_epoch(model)
        yield S.GRAFTING
        for stage in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
            layer.advance(seeds, stage)
            training.step()
            yield stage
        layer.advance(seeds[half:], S.FOSSILIZED)
        training.step()
        yield S.FOSSILIZED
        with reports:
            assert kasmina_fx.health_report(model)["0"]["alpha"][seeds].tolist() == [1.0] * len(
                seeds
            )
    culled = [seed for wave in WAVES for seed in wave[: len(wave) // 2]]
    layer.advance(culled, S.CULLED)
    training.step()
    kasmina_fx.step_epoch(model)
    training.step()
    assert int((layer.state.stages == S.DORMANT).sum()) == len(culled)
    yield S.DORMANT
    layer.reset(range(SEEDS))
    training.step()


@pytest.mark.parametrize("pad", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("kasmina", marks=pytest.mark.slow)])
def test_a_life_through_all_stages_compiles_nothing_but_the_growing_graph(
    compiler: str, pad: bool
) -> None:
    training = Training(compiler, pad=pad)
    training.step()
    life = live(training, reports=contextlib.nullcontext())
    next(life)  # the first germination: the growing graph
    with assert_no_recompiles():
        seen = {S.GERMINATED, *life}
    assert seen == set(S)
    assert bool(torch.stack(training.losses).isfinite().all())
    assert training.layer.state.get_state_distribution() == {"DORMANT": SEEDS}


class MayWait(contextlib.AbstractContextManager[None]):
    """Inside, the host may wait for the device."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("error")


@pytest.mark.gpu
def test_a_life_on_cuda_waits_for_the_device_in_reports_alone() -> None:
    training = Training("kasmina", "cuda")
    training.step()
    life = live(training, reports=MayWait())
    next(life)
    with assert_no_recompiles():
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert {S.GERMINATED, *life} == set(S)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_numbers() -> None:
    found = []
    counters.clear()
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        training = Training("kasmina", "cuda", reserve=256, mode=mode)
        for _ in live(training, reports=contextlib.nullcontext()):
            pass
        found.append(torch.stack(training.losses).cpu())
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)
    assert not counters["inductor"]["cudagraph_skips"]
    recorded = get_manager(0, create_if_none_exists=False)
    assert recorded is not None
    assert any(recorded.roots.values())
