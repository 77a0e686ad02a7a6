"""A controller by a few rules: layers before chunks, learn on, keep by what seeds are worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import check_count, check_instance, check_number
from kasmina_fx.blueprints.registry import DEFAULT, lookup
from kasmina_fx.controllers.base import Controller, Decision
from kasmina_fx.controllers.judging import (
    Judge,
    Seed,
    Verdict,
    Waiting,
    all_waiting,
    by_metric,
    by_worth,
    check_judge,
    measured,
    still_waiting,
)
from kasmina_fx.controllers.places import by_health, by_layer, check_places, free_in
from kasmina_fx.errors import InvalidArgument, NoTargets, shown
from kasmina_fx.grafting.registry import strategy_number
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.model import kasmina_layers, step_epoch, transaction
from kasmina_fx.reports.health_report import health_report
from kasmina_fx.seeds.allocation import identities


class HealthController(Controller):
    """Spreads seeds over layers, lets them learn as long as the host trains, culls what harms.

    At each :meth:`step`, after ``step_epoch`` of the model:

    1. GERMINATED seeds go to GRAFTING at once if their blueprint starts as the identity, else to
       TRAINING and from there to GRAFTING after ``train_epochs``.
    2. GRAFTING seeds whose ramp is done (alpha 1) stay there, which keeps them learning, for
       ``settle_epochs``. Then they are judged:

       - With a ``judge``: by the validation loss with each of them off, at most every
         ``judge_every`` steps and at most ``evaluations`` seeds, those that wait longest first.
         Seeds without which the loss is lower are CULLED, the most harmful first and at most
         ``most_culled`` of all blended seeds at a time; harmful ones beyond that learn on and are
         judged again. The others are kept.
       - Without one, which is the weaker rule since it can't tell seeds from each other or from the
         host's own progress: ``evaluate_epochs`` later all of them are kept if the metric is finite
         and at most ``1 + tolerance`` times what it was, else CULLED.
    3. Seeds that are kept pass through STABILIZATION and EVALUATING to FINE_TUNING in one
       transaction: no epoch and no optimizer step finds them frozen. There they learn until
       :meth:`finish`, or for ``tune_epochs``, and are FOSSILIZED.
    4. If fewer than ``budget`` seeds hold a blueprint, DORMANT ones germinate, at most ``pace`` a
       step over all layers: each in the layer that has fewest for its share, in a chunk by chance
       (``choose="layers"``), or in the chunk of the lowest health (``choose="health"``, which
       leaves out seeds without health). Chunks that the blueprint does not fit are left out.

    Seeds that somebody else put into STABILIZATION are EVALUATING after ``settle_epochs``; in
    EVALUATING they are judged like the others.

    What was measured, by ``benchmarks/growth.py`` (classifiers of the digits; points of accuracy,
    mean and 95 % interval of paired replicates; docs/growth.md has all of it):

    - freezing seeds after the ramp while the host trains on costs ``mlp`` 0.53 +- 0.51; the 0.47 +-
      0.56 of ``residual_mlp`` was not shown: so they learn on;
    - TRAINING ``mlp`` before a ramp of 200 steps: no benefit found (-1.09 +- 1.40 to the plain
      host, without it +0.09 +- 0.73); ``residual_mlp``, which skips it, gains 1.31 +- 0.88;
    - removing 25 % of the grown seeds by validation loss, then 60 steps: no loss shown (0.78 +-
      0.99); at random 3.51 +- 1.41 worse than that: a judge, and a quarter;
    - of two layers, one alone costs 1.93 +- 0.86, the other 17.6 +- 1.8: so layers come first. Not
      shown to be better than chunks by chance: those of the lowest health, which finds dead or
      constant ones (+3.5 +- 11.8), and those of the largest gradient (+6.2 +- 10.3).

    Args:
        model: Kasminified.
        budget: Seeds that may hold a blueprint at a time, FOSSILIZED ones included.
        blueprint: What they grow; a registered name.
        strategy: Of their ramps.
        pace: Germinations a step, at least 1.
        judge: ``(batches, loss_fn)`` of :func:`kasmina_fx.counterfactual`, gone through at each
            judgement, so a list or a loader and no iterator; or a function ``(model, groups) ->
            report`` that calls it. Of several processes each must find the same losses.
        judge_every: Steps between two judgements, at least 1.
        evaluations: Seeds judged at a time, at least 1; each costs a forward of every batch.
        most_culled: Of all blended seeds, 0 to 1, rounded up: what a judgement may cull.
        choose: "layers" or "health".
        shares: Of the layers in ``choose="layers"``, by name and in any unit (the rms of the
            gradient of each one's output, say); layers without one get none. None: all the same.
        random_seed: Of the choice of chunks.
        metric: The entry of ``metrics`` to judge by without a judge; smaller is better.
        tolerance: How much worse it may get, relative.
        train_epochs: In TRAINING; likewise ``settle_epochs`` with alpha 1 before anything is
            judged, ``evaluate_epochs`` after that, by the metric, and ``tune_epochs`` in
            FINE_TUNING, None for all there are.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InvalidArgument, InvalidType: A setting that is none; says what is allowed.
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
        judge: Judge | None = None,
        judge_every: int = 1,
        evaluations: int = 16,
        most_culled: float = 0.25,
        choose: Literal["layers", "health"] = "layers",
        shares: Mapping[str, float] | None = None,
        random_seed: int = 0,
        metric: str = "loss",
        tolerance: float = 0.02,
        train_epochs: int = 2,
        settle_epochs: int = 1,
        evaluate_epochs: int = 2,
        tune_epochs: int | None = None,
    ) -> None:
        at_least_0 = {
            "budget": budget,
            "random_seed": random_seed,
            "train_epochs": train_epochs,
            "settle_epochs": settle_epochs,
            "evaluate_epochs": evaluate_epochs,
            "tune_epochs": 0 if tune_epochs is None else tune_epochs,
        }
        at_least_1 = {"pace": pace, "judge_every": judge_every, "evaluations": evaluations}
        for name, given in (at_least_0 | at_least_1).items():
            check_count(name, given, least=int(name in at_least_1))
        check_judge(judge)
        check_number("most_culled", most_culled, least=0, most=1)
        check_number("tolerance", tolerance, least=0)
        layers = kasmina_layers(model)
        if not layers:
            raise NoTargets(f"{type(model).__name__} has no KasminaLayer: call kasminify first")
        check_places(choose, shares, layers)
        lookup(DEFAULT if blueprint is None else blueprint)
        strategy_number(strategy, type(self).__name__)
        self.model, self.budget, self.pace = model, budget, pace
        self.blueprint, self.strategy = blueprint, strategy
        self.judge, self.judge_every, self.evaluations = judge, judge_every, evaluations
        self.most_culled, self.choose, self.shares = most_culled, choose, shares
        self.random_seed, self.metric, self.tolerance = random_seed, metric, tolerance
        self.train_epochs, self.settle_epochs = train_epochs, settle_epochs
        self.evaluate_epochs, self.tune_epochs = evaluate_epochs, tune_epochs
        self._waiting: dict[Seed, Waiting] = {}
        self._steps, self._judged_at = 0, -judge_every

    def step(self, metrics: Mapping[str, float], *, advance_epoch: bool = True) -> list[Decision]:
        """See the class; one device-to-host copy, and what a judge asks for.

        ``metrics`` may be empty if there is a judge. ``advance_epoch``: False where the training
        loop calls ``step_epoch(model)`` itself.

        Raises:
            InvalidArgument: Without a judge: ``metrics`` lacks the metric, or it is no number.
            Exception: What a judge raises; the epoch has passed then, and nothing was decided.
        """
        loss = measured(metrics, self.metric) if self.judge is None else math.nan
        check_instance("advance_epoch", advance_epoch, bool)
        if advance_epoch:
            step_epoch(self.model)
        report = health_report(self.model)
        alphas = {name: figures["alpha"] for name, figures in report.items()}
        waiting = all_waiting(self.model, alphas, self.settle_epochs, loss, self._waiting)
        verdicts = self._verdicts(waiting, loss)
        with transaction(self.model):
            # What the seeds are now: another thread may have changed some since the report.
            layers = kasmina_layers(self.model)
            decisions = [
                decision
                for name, layer in layers.items()
                for decision in self._promote(name, layer, verdicts)
            ]
            decisions += self._germinate(layers, report)
            entered = {(d.layer, s) for d in decisions if d.stage is S.EVALUATING for s in d.seeds}
            left = still_waiting(waiting, verdicts) | dict.fromkeys(entered, Waiting(0, loss))
        self._judged_at = self._steps if verdicts else self._judged_at
        self._waiting, self._steps = left, self._steps + 1
        return decisions

    def finish(self) -> list[Decision]:
        """Growth is over: FINE_TUNING seeds are FOSSILIZED, which freezes them for good."""
        made: list[Decision] = []
        with transaction(self.model):
            for name, layer in kasmina_layers(self.model).items():
                tuned = _ids(layer.state.stages == S.FINE_TUNING)
                made += self._advance(name, tuned, S.FOSSILIZED, "growth is over")
        return made

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, plain data: since when seeds wait for their judgement, and steps."""
        losses = [known.entry(seed) for seed, known in self._waiting.items()]
        return {"losses": losses, "steps": self._steps, "judged_at": self._judged_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what another one did, of a model with the same layers.

        Raises:
            InvalidArgument: Not from :meth:`state_dict`; nothing has changed.
        """
        try:
            waiting = dict(Waiting.of_entry(*entry) for entry in state["losses"])
            steps = int(state.get("steps", 0))  # older states have losses alone
            judged_at = int(state.get("judged_at", -self.judge_every))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"no state of a controller: {shown(error)}") from error
        self._waiting, self._steps, self._judged_at = waiting, steps, judged_at

    def _verdicts(self, waiting: Mapping[Seed, Waiting], loss: float) -> dict[Seed, Verdict]:
        if self.judge is None:
            return by_metric(waiting, loss, self.evaluate_epochs, self.tolerance)
        if self._steps - self._judged_at < self.judge_every:
            return {}
        return by_worth(waiting, self.judge, self.model, self.evaluations, self.most_culled)

    def _promote(
        self, name: str, layer: KasminaLayer, verdicts: Mapping[Seed, Verdict]
    ) -> Iterator[Decision]:
        stage, epochs = layer.state.stages.clone(), layer.state.epochs.clone()
        yield from self._judged(name, layer, stage, verdicts)
        if self.tune_epochs is not None:
            tuned = _ids((stage == S.FINE_TUNING) & (epochs >= self.tune_epochs))
            yield from self._advance(name, tuned, S.FOSSILIZED, "it kept its place")
        settled = _ids((stage == S.STABILIZATION) & (epochs >= self.settle_epochs))
        yield from self._advance(name, settled, S.EVALUATING, "it has settled")
        trained = _ids((stage == S.TRAINING) & (epochs >= self.train_epochs))
        yield from self._advance(name, trained, S.GRAFTING, "it has trained")
        germinated, own = stage == S.GERMINATED, identities(layer.kasmina)
        skips = _ids(germinated & own)
        yield from self._advance(name, skips, S.GRAFTING, "it starts as the identity")
        yield from self._advance(name, _ids(germinated & ~own), S.TRAINING, "it has a blueprint")

    def _judged(
        self, name: str, layer: KasminaLayer, stage: Tensor, verdicts: Mapping[Seed, Verdict]
    ) -> Iterator[Decision]:
        mine = {
            seed: verdict
            for (owner, seed), verdict in verdicts.items()
            if owner == name and int(stage[seed]) in (S.GRAFTING, S.EVALUATING)
        }
        kept = [seed for seed, verdict in mine.items() if verdict.keep]
        culled = [seed for seed, verdict in mine.items() if verdict.keep is False]
        passing = [seed for seed in kept if stage[seed] == S.GRAFTING]
        layer.advance(passing, S.STABILIZATION)
        layer.advance(passing, S.EVALUATING)
        what = self.metric if self.judge is None else "worth"
        for seeds, target in (kept, S.FINE_TUNING), (culled, S.CULLED):
            figures = sorted(mine[seed].figure for seed in seeds)
            reason = " to ".join(dict.fromkeys(f"{f:.4g}" for f in figures[:1] + figures[-1:]))
            yield from self._advance(name, seeds, target, f"{what} {reason}")

    def _advance(self, name: str, seeds: list[int], stage: S, reason: str) -> Iterator[Decision]:
        if seeds:
            kasmina_layers(self.model)[name].advance(seeds, stage)
            yield Decision(name, tuple(seeds), stage, reason)

    def _germinate(
        self, layers: dict[str, KasminaLayer], report: Mapping[str, dict[str, Any]]
    ) -> Iterator[Decision]:
        holding = {name: int(layer.state.holding.sum()) for name, layer in layers.items()}
        room = max(0, min(self.pace, self.budget - sum(holding.values())))
        if not room:
            return
        free = {name: _ids(free_in(layer, self.blueprint)) for name, layer in layers.items()}
        if self.choose == "health":
            places, reason = by_health(free, report), "the lowest health"
        else:
            chance = Random(f"{self.random_seed}/{self._steps}")
            places = by_layer(free, holding, self.shares, chance)
            reason = "the layer has fewest for its share"
        chosen = list(islice(places, room))
        for name in dict.fromkeys(name for name, _ in chosen):
            seeds = [seed for owner, seed in chosen if owner == name]
            if layers[name].request_germination(seeds, self.blueprint, self.strategy):
                yield Decision(name, tuple(seeds), S.GERMINATED, reason)


def _ids(mask: Tensor) -> list[int]:
    found: list[int] = torch.nonzero(mask).flatten().tolist()
    return found
