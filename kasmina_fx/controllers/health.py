"""A controller by a few rules: grow where the network is sick, keep what does no harm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx.colony_control import health_report, step_epoch, transaction
from kasmina_fx.controllers.base import Controller, Decision
from kasmina_fx.errors import InvalidArgument, NoTargets
from kasmina_fx.kasminify import kasmina_layers
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle as S


@dataclass(frozen=True)
class _Rule:
    """Seeds in ``source`` for at least ``epochs`` go to ``target``."""

    source: S
    target: S
    epochs: int
    reason: str


class HealthController(Controller):
    """Germinates the sickest seeds, promotes what works, culls what does harm.

    At each :meth:`step`, after ``step_epoch`` of the model:

    1. GERMINATED seeds go to TRAINING at once, and from there to GRAFTING after ``train_epochs``.
    2. GRAFTING seeds whose ramp is done (alpha 1) go to STABILIZATION, after ``settle_epochs`` to
       EVALUATING; the model's loss is remembered then.
    3. EVALUATING seeds, after ``evaluate_epochs``: FINE_TUNING if the loss is at most
       ``1 + tolerance`` times the one remembered, else CULLED.
    4. FINE_TUNING seeds are FOSSILIZED after ``tune_epochs``.
    5. If fewer than ``budget`` seeds hold a blueprint, the DORMANT seeds with the lowest health
       germinate, at most ``pace`` a step over all layers.

    Args:
        model: Kasminified.
        budget: Seeds that may hold a blueprint at a time, FOSSILIZED ones included.
        blueprint: What they grow; a registered name.
        strategy: Of their ramps.
        pace: Germinations a step, at least 1.
        metric: The entry of ``metrics`` to judge by; smaller is better.
        tolerance: How much worse it may get, relative.
        train_epochs: In TRAINING; likewise ``settle_epochs`` in STABILIZATION, ``evaluate_epochs``
            in EVALUATING and ``tune_epochs`` in FINE_TUNING.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InvalidArgument: A negative budget or epochs, or a pace below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: int,
        blueprint: str | None = None,
        strategy: int | str = 0,
        pace: int = 8,
        metric: str = "loss",
        tolerance: float = 0.02,
        train_epochs: int = 2,
        settle_epochs: int = 1,
        evaluate_epochs: int = 2,
        tune_epochs: int = 2,
    ) -> None:
        counts = {"budget": budget, "train_epochs": train_epochs, "settle_epochs": settle_epochs}
        counts |= {"evaluate_epochs": evaluate_epochs, "tune_epochs": tune_epochs}
        wrong = [f"{name}={value!r}" for name, value in counts.items() if value < 0]
        if wrong or pace < 1:
            raise InvalidArgument(
                f"{', '.join(wrong) or f'pace={pace!r}'}: counts are 0 or more, the pace 1 or more"
            )
        if not kasmina_layers(model):
            raise NoTargets(f"{type(model).__name__} has no KasminaLayer: call kasminify first")
        self.model, self.budget, self.pace = model, budget, pace
        self.blueprint, self.strategy = blueprint, strategy
        self.metric, self.tolerance, self.evaluate_epochs = metric, tolerance, evaluate_epochs
        self._loss_at_evaluation: dict[tuple[str, int], float] = {}
        self._rules = (
            _Rule(S.FINE_TUNING, S.FOSSILIZED, tune_epochs, "it kept its place"),
            _Rule(S.STABILIZATION, S.EVALUATING, settle_epochs, "it has settled"),
            _Rule(S.TRAINING, S.GRAFTING, train_epochs, "it has trained"),
            _Rule(S.GERMINATED, S.TRAINING, 0, "it has a blueprint"),
        )

    def step(self, metrics: Mapping[str, float]) -> list[Decision]:
        """See the class; one device-to-host copy.

        Raises:
            InvalidArgument: ``metrics`` lacks the metric, or it is no number.
        """
        loss = float(metrics.get(self.metric, math.nan))
        if math.isnan(loss):
            raise InvalidArgument(
                f"metrics have {sorted(metrics)}; the controller judges by {self.metric!r}, a "
                "number that is not NaN"
            )
        step_epoch(self.model)
        report = health_report(self.model)
        with transaction(self.model):
            # What the seeds are now: another thread may have changed some since the report.
            layers = kasmina_layers(self.model)
            decisions = [
                decision
                for name, layer in layers.items()
                for decision in self._promote(name, layer, report[name]["alpha"], loss)
            ]
            decisions += self._germinate(layers, report)
        return decisions

    def _promote(
        self, name: str, layer: KasminaLayer, alpha: Tensor, loss: float
    ) -> Iterator[Decision]:
        stage, epochs = layer.state.stages.clone(), layer.state.epochs.clone()
        yield from self._judge(name, stage, epochs, loss)
        for rule in self._rules:
            ready = _ids((stage == rule.source) & (epochs >= rule.epochs))
            if rule.target is S.EVALUATING:
                self._loss_at_evaluation |= {(name, seed): loss for seed in ready}
            yield from self._advance(name, ready, rule.target, rule.reason)
        ramped = _ids((stage == S.GRAFTING) & (alpha >= 1))
        yield from self._advance(name, ramped, S.STABILIZATION, "its ramp is done")

    def _judge(self, name: str, stage: Tensor, epochs: Tensor, loss: float) -> Iterator[Decision]:
        due = _ids((stage == S.EVALUATING) & (epochs >= self.evaluate_epochs))
        then = {seed: self._loss_at_evaluation.pop((name, seed), loss) for seed in due}
        good = [seed for seed in due if loss <= then[seed] + self.tolerance * abs(then[seed])]
        yield from self._advance(name, good, S.FINE_TUNING, f"{self.metric} is {loss:.4g}")
        bad = [seed for seed in due if seed not in good]
        yield from self._advance(name, bad, S.CULLED, f"{self.metric} rose to {loss:.4g}")

    def _advance(self, name: str, seeds: list[int], stage: S, reason: str) -> Iterator[Decision]:
        if seeds:
            kasmina_layers(self.model)[name].advance(seeds, stage)
            yield Decision(name, tuple(seeds), stage, reason)

    def _germinate(
        self, layers: dict[str, KasminaLayer], report: Mapping[str, dict[str, Any]]
    ) -> Iterator[Decision]:
        holding = sum(int(layer.state.holding.sum()) for layer in layers.values())
        room = min(self.pace, self.budget - holding)
        sick = sorted(
            (float(figures["health"][seed]), name, seed)
            for name, figures in report.items()
            for seed in _ids((layers[name].state.stages == S.DORMANT) & ~figures["health"].isnan())
        )[: max(0, room)]
        for name in dict.fromkeys(name for _, name, _ in sick):
            seeds = [seed for _, owner, seed in sick if owner == name]
            if layers[name].request_germination(seeds, self.blueprint, self.strategy):
                worst = min(health for health, owner, _ in sick if owner == name)
                reason = f"the sickest: health from {worst:.3f}"
                yield Decision(name, tuple(seeds), S.GERMINATED, reason)


def _ids(mask: Tensor) -> list[int]:
    found: list[int] = torch.nonzero(mask).flatten().tolist()
    return found
