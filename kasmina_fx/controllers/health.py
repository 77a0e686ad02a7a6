"""A controller by a few rules: grow where the network is sick, keep what does no harm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import check_count, check_instance, check_number
from kasmina_fx.blueprints.registry import DEFAULT, lookup
from kasmina_fx.controllers.base import Controller, Decision
from kasmina_fx.errors import InvalidArgument, NoTargets, shown
from kasmina_fx.grafting.registry import strategy_number
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.model import kasmina_layers, step_epoch, transaction
from kasmina_fx.reports.health_report import health_report


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
    3. EVALUATING seeds, after ``evaluate_epochs``: FINE_TUNING if the loss is finite and at most
       ``1 + tolerance`` times the one remembered, else CULLED. Of a seed that another controller
       brought there no loss is remembered: it is compared with the loss now.
    4. FINE_TUNING seeds are FOSSILIZED after ``tune_epochs``.
    5. If fewer than ``budget`` seeds hold a blueprint, the DORMANT seeds with the lowest health
       germinate, at most ``pace`` a step over all layers. Seeds without health, since telemetry is
       off or saw nothing finite, and chunks that the blueprint does not fit are left out.

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
        InvalidArgument: A budget, pace, tolerance or epochs that are none, an unknown strategy.
        UnknownBlueprint: Not a registered name.
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
        check_count("budget", budget)
        check_count("pace", pace, least=1)
        check_count("train_epochs", train_epochs)
        check_count("settle_epochs", settle_epochs)
        check_count("evaluate_epochs", evaluate_epochs)
        check_count("tune_epochs", tune_epochs)
        check_number("tolerance", tolerance, least=0)
        if not kasmina_layers(model):
            raise NoTargets(f"{type(model).__name__} has no KasminaLayer: call kasminify first")
        lookup(DEFAULT if blueprint is None else blueprint)
        strategy_number(strategy, type(self).__name__)
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

    def step(self, metrics: Mapping[str, float], *, advance_epoch: bool = True) -> list[Decision]:
        """See the class; one device-to-host copy.

        ``advance_epoch``: False where the training loop calls ``step_epoch(model)`` itself.

        Raises:
            InvalidArgument: ``metrics`` lacks the metric, or it is no number.
        """
        loss = self._judged_by(metrics)
        check_instance("advance_epoch", advance_epoch, bool)
        if advance_epoch:
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
            then = self._remembered(decisions, loss)
        self._loss_at_evaluation = then
        return decisions

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, plain data: the losses at which seeds in EVALUATING got there."""
        losses = self._loss_at_evaluation.items()
        return {"losses": [[layer, seed, loss] for (layer, seed), loss in losses]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what another one did, of a model with the same layers.

        Raises:
            InvalidArgument: Not from :meth:`state_dict`; nothing has changed.
        """
        try:
            losses = {(str(layer), int(seed)): float(loss) for layer, seed, loss in state["losses"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"no state of a controller: {shown(error)}") from error
        self._loss_at_evaluation = losses

    def _judged_by(self, metrics: Mapping[str, float]) -> float:
        try:
            loss = float(metrics.get(self.metric, math.nan))
        except (AttributeError, TypeError, ValueError, RuntimeError):
            loss = math.nan
        if math.isnan(loss):
            raise InvalidArgument(
                f"metrics are {shown(metrics)}; the controller judges by {shown(self.metric)}, a "
                "number that is not NaN"
            )
        return loss

    def _remembered(
        self, decisions: Sequence[Decision], loss: float
    ) -> dict[tuple[str, int], float]:
        """The loss when each seed in EVALUATING got there: once all has been decided."""
        entered = {(d.layer, s) for d in decisions if d.stage is S.EVALUATING for s in d.seeds}
        left = {
            (d.layer, s) for d in decisions if d.stage in (S.FINE_TUNING, S.CULLED) for s in d.seeds
        }
        kept = {k: v for k, v in self._loss_at_evaluation.items() if k not in left}
        return kept | dict.fromkeys(entered, loss)

    def _promote(
        self, name: str, layer: KasminaLayer, alpha: Tensor, loss: float
    ) -> Iterator[Decision]:
        stage, epochs = layer.state.stages.clone(), layer.state.epochs.clone()
        yield from self._judge(name, stage, epochs, loss)
        for rule in self._rules:
            ready = _ids((stage == rule.source) & (epochs >= rule.epochs))
            yield from self._advance(name, ready, rule.target, rule.reason)
        ramped = _ids((stage == S.GRAFTING) & (alpha >= 1))
        yield from self._advance(name, ramped, S.STABILIZATION, "its ramp is done")

    def _judge(self, name: str, stage: Tensor, epochs: Tensor, loss: float) -> Iterator[Decision]:
        due = _ids((stage == S.EVALUATING) & (epochs >= self.evaluate_epochs))
        then = {seed: self._loss_at_evaluation.get((name, seed), loss) for seed in due}
        good = [
            seed
            for seed in due
            if math.isfinite(loss) and loss <= then[seed] + self.tolerance * abs(then[seed])
        ]
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
            if layers[name].accepts(seed, self.blueprint)
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
