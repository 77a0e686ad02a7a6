"""What reads state and writes it back does so at one moment, whatever other threads do."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import InvalidArgument, KasminaLayer, SeedConfig
from kasmina_fx.grafting import GraftingConfig, RampSignals, Strategy, register_strategy
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.physical.statistics import REJECTED
from kasmina_fx.seeds import epochs, health
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.testing import graft


def layer(seeds: int = 8, **config: object) -> KasminaLayer:
    return KasminaLayer(nn.Linear(4, 2 * seeds), seeds, config=SeedConfig(**config))  # type: ignore[arg-type]  # by name


def beside(loop: Callable[[], object]) -> Callable[[], None]:
    """Run something over and over in another thread; returns what ends it."""
    done, errors = threading.Event(), []

    def run() -> None:
        try:
            while not done.is_set():
                loop()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> None:
        done.set()
        thread.join()
        assert not errors

    return end


@pytest.mark.parametrize("ramp", [epochs.step_epoch, epochs.step_ramp], ids=["epoch", "step"])
def test_a_ramp_loses_no_alpha_that_another_thread_sets(
    ramp: Callable[[SeedStore], None],
) -> None:
    grown = layer(grafting=GraftingConfig(fixed_steps=10_000))
    graft(grown, [0, 1], "mlp", alpha=0.0)
    graft(grown, [2, 3], "mlp", alpha=0.0, stage=S.FINE_TUNING)
    end = beside(lambda: ramp(grown.kasmina))
    try:
        for i in range(300):
            grown.set_alpha(2, i / 512)
            assert grown.seeds[2].alpha == i / 512
    finally:
        end()
    assert 0 < grown.seeds[0].alpha == grown.seeds[1].alpha


def test_a_seed_that_is_culled_beside_a_ramp_keeps_alpha_0() -> None:
    for _ in range(30):
        grown = layer(grafting=GraftingConfig(fixed_steps=10))
        graft(grown, range(8), "mlp", alpha=0.5)
        end = beside(grown.step_epoch)
        grown.advance(range(8), S.CULLED)
        end()
        assert not grown.state.alphas.any()


def test_a_report_shows_no_row_of_two_moments() -> None:
    grown = layer()

    def live() -> None:
        grown.request_germination(3, "mlp")
        grown.reset(3)

    end = beside(live)
    try:
        for _ in range(300):
            report = grown.get_health_report()
            assert (report["blueprint_id"][3] > 0) == (report["stage"][3] == S.GERMINATED)
            state = grown.seeds[3].get_state()
            assert (state.blueprint_id > 0) == (state.stage is S.GERMINATED)
    finally:
        end()


@pytest.mark.parametrize("call", ["get_health_report", "step_epoch"])
def test_a_seed_is_not_culled_for_its_predecessor(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = layer()
    graft(grown, [0, 1], "mlp", stage=S.TRAINING)
    grown.kasmina.telemetry.accumulated[REJECTED, :2] = 99
    fetch = health.fetch

    def meanwhile(layers: list[SeedStore]) -> list[health.Moment]:
        seen = fetch(layers)
        grown.reset(0)
        graft(grown, 0, "mlp", stage=S.TRAINING)
        return seen

    monkeypatch.setattr("kasmina_fx.seeds.health.fetch", meanwhile)
    monkeypatch.setattr("kasmina_fx.seeds.epochs.fetch", meanwhile)
    getattr(grown, call)()
    assert grown.seeds[0].stage is S.TRAINING
    assert grown.seeds[1].stage is S.CULLED


@pytest.mark.parametrize("embargo", [0, 1, 3])
def test_a_seed_that_an_epoch_culls_rests_its_whole_embargo(embargo: int) -> None:
    grown = layer(embargo_epochs=embargo)
    graft(grown, 0, "mlp", stage=S.TRAINING)
    grown.kasmina.telemetry.accumulated[REJECTED, 0] = 99
    for epoch in range(max(1, embargo)):
        grown.step_epoch()
        assert grown.seeds[0].stage is S.CULLED, epoch
    grown.step_epoch()
    assert grown.seeds[0].stage is S.DORMANT


@pytest.mark.parametrize("embargo", [-1, 2**15, True, 1.5])
def test_an_embargo_that_no_seed_outlives_is_refused(embargo: object) -> None:
    with pytest.raises(InvalidArgument, match="embargo_epochs"):
        layer(embargo_epochs=embargo)


class Faulty(Strategy):
    name = "FAULTY"
    answer: object = None

    def speed(self, signals: RampSignals) -> Tensor:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]  # what a user may do


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (1.0, InvalidArgument),
        (torch.ones(3), InvalidArgument),
        (None, InvalidArgument),
        (OSError("no"), OSError),
    ],
)
def test_a_strategy_that_fails_undoes_the_whole_epoch_and_harms_no_other_layer(
    answer: object, error: type[Exception]
) -> None:
    strategy = Faulty()
    strategy.answer = answer
    number = register_strategy(strategy)
    mine, other = layer(), layer()
    for each in (mine, other):
        graft(each, [0, 1], "mlp", alpha=0.25)
    mine.state.set_rows([1], grafting_strategy=number)
    rows, alphas = mine.state.rows.clone(), mine.state.alphas.clone()
    other.step_epoch()
    with pytest.raises(error):
        mine.step_epoch()
    assert torch.equal(mine.state.rows, rows)
    assert torch.equal(mine.state.alphas, alphas)
    assert other.seeds[0].epochs_in_state == 1
