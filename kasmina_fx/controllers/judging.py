"""Which seeds a controller keeps: by what each is worth, or by how a metric went meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from kasmina_fx.counterfactuals import CounterfactualReport, SeedGroup, Worth, counterfactual
from kasmina_fx.errors import InvalidArgument, InvalidType, shown
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.model import kasmina_layers

#: A seed of a model: the layer's name, and the seed's id.
Seed: TypeAlias = tuple[str, int]
#: Validation batches and ``(model, batch) -> loss``, as :func:`kasmina_fx.counterfactual` takes
#: them; or ``(model, groups) -> report``, which calls it with batches of its choice.
Judge: TypeAlias = (
    tuple[Any, Callable[[nn.Module, Any], Any]]
    | Callable[[nn.Module, Mapping[str, SeedGroup]], CounterfactualReport]
)


def check_judge(judge: object) -> None:
    """Refuse what judges nothing; None is allowed.

    Raises:
        InvalidType: Says what is allowed.
    """
    pair = isinstance(judge, tuple) and len(judge) == 2 and callable(judge[1])
    if judge is not None and not pair and not callable(judge):
        raise InvalidType(
            f"judge={shown(judge)}: give (batches, loss_fn), a function (model, groups) -> report "
            "of kasmina_fx.counterfactual, or None"
        )


@dataclass(frozen=True)
class Waiting:
    """A seed that is blended in full, and waits for its judgement.

    Attributes:
        settled_at: Its epochs in its stage once it has settled, or since it was judged last.
        loss: The metric then; NaN where seeds are judged by what they are worth.
        epochs: Since then; below 0 before.
    """

    settled_at: int
    loss: float
    epochs: int = 0

    def since(self, known: Waiting | None) -> Waiting:
        """What is known of the seed now, if something was before."""
        if known is None:
            return self
        now = self.settled_at + self.epochs
        at = min(self.settled_at, known.settled_at)
        return Waiting(at, known.loss if now > at else self.loss, now - at)

    def again(self) -> Waiting:
        """From the next epoch on: behind all that have settled and were not judged yet."""
        return replace(self, settled_at=self.settled_at + self.epochs + 1, epochs=-1)

    def entry(self, seed: Seed) -> list[Any]:
        """Plain values for a file, that :meth:`of_entry` reads."""
        return [*seed, None if math.isnan(self.loss) else self.loss, self.settled_at]

    @staticmethod
    def of_entry(
        layer: str, seed: int, loss: float | None, settled_at: int = 0
    ) -> tuple[Seed, Waiting]:
        """Read what :meth:`entry` gave, or an older one: of a seed in EVALUATING, without epochs.

        Raises:
            TypeError, ValueError: It is none.
        """
        known = Waiting(int(settled_at), math.nan if loss is None else float(loss))
        return (str(layer), int(seed)), known


@dataclass(frozen=True)
class Verdict:
    """What becomes of a seed: kept or culled, or judged again (None); the figure that says so."""

    keep: bool | None
    figure: float


def all_waiting(
    model: nn.Module,
    alphas: Mapping[str, Tensor],
    settle: int,
    loss: float,
    known: Mapping[Seed, Waiting],
) -> dict[Seed, Waiting]:
    """Seeds of a model that wait: in GRAFTING with alpha 1, or put into EVALUATING by somebody.

    Args:
        model: Whose.
        alphas: Of each layer's seeds, float32 ``(S,)`` on the CPU.
        settle: Epochs at alpha 1 before a seed in GRAFTING has settled; one in EVALUATING has.
        loss: The metric now.
        known: Seeds that waited before.
    """
    found = {}
    for name, layer in kasmina_layers(model).items():
        stages, epochs = layer.state.stages, layer.state.epochs
        evaluating = stages == S.EVALUATING
        ramped = (stages == S.GRAFTING) & (alphas[name] >= 1)
        for seed in (evaluating | ramped).nonzero().flatten().tolist():
            rest = 0 if evaluating[seed] else int(epochs[seed]) + settle
            fresh = Waiting(rest, loss, int(epochs[seed]) - rest)
            found[name, seed] = fresh.since(known.get((name, seed)))
    return found


def still_waiting(
    waiting: Mapping[Seed, Waiting], verdicts: Mapping[Seed, Verdict]
) -> dict[Seed, Waiting]:
    """Those that were not judged, or are to be judged again."""
    undecided = {seed for seed, verdict in verdicts.items() if verdict.keep is None}
    left = {seed: known for seed, known in waiting.items() if seed not in verdicts}
    return left | {seed: waiting[seed].again() for seed in undecided}


def measured(metrics: Mapping[str, float], metric: str) -> float:
    """The metric that seeds are judged by.

    Raises:
        InvalidArgument: It is missing, no number, or NaN.
    """
    try:
        loss = float(metrics.get(metric, math.nan))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        loss = math.nan
    if math.isnan(loss):
        raise InvalidArgument(
            f"metrics are {shown(metrics)}; the controller judges by {shown(metric)}, a number "
            "that is not NaN"
        )
    return loss


def by_metric(
    waiting: Mapping[Seed, Waiting], loss: float, epochs: int, tolerance: float
) -> dict[Seed, Verdict]:
    """Keep seeds if the metric is about what it was when they had settled, some epochs ago."""
    verdicts = {}
    for seed, known in waiting.items():
        if known.epochs >= epochs:
            then = loss if math.isnan(known.loss) else known.loss
            good = math.isfinite(loss) and loss <= then + tolerance * abs(then)
            verdicts[seed] = Verdict(good, loss)
    return verdicts


def by_worth(
    waiting: Mapping[Seed, Waiting],
    judge: Judge,
    model: nn.Module,
    evaluations: int,
    most_culled: float,
) -> dict[Seed, Verdict]:
    """Keep seeds without which the validation loss is no lower.

    Args:
        waiting: Those that have settled are judged, the longest wait first.
        judge: Is not asked if there is none.
        model: Whose seeds.
        evaluations: Seeds judged at most.
        most_culled: Of all blended seeds of the model, rounded up; those that harm less are to be
            judged again, and so are those of whom nothing can be said.
    """
    settled = (seed for seed, known in waiting.items() if known.epochs >= 0)
    due = sorted(settled, key=lambda seed: -waiting[seed].epochs)[:evaluations]
    if not due:
        return {}
    worth = worths(judge, model, due)
    blended = sum(int(layer.state.blended.sum()) for layer in kasmina_layers(model).values())
    harmful = sorted((seed for seed in due if worth[seed] < 0), key=worth.__getitem__)
    culled = harmful[: math.ceil(most_culled * blended)]
    kept = {seed: True for seed in due if worth[seed] >= 0} | dict.fromkeys(culled, False)
    return {seed: Verdict(kept.get(seed), worth[seed]) for seed in due}


def worths(judge: Judge, model: nn.Module, seeds: Sequence[Seed]) -> dict[Seed, float]:
    """What the validation loss rises by without each seed; NaN where that can't be said.

    A group a seed. A loss that is not finite is worse than any other.

    Raises:
        InvalidArgument, InvalidType: What judges returned no report, or one without these groups.
    """
    names = {f"{layer}[{seed}]": (layer, seed) for layer, seed in seeds}
    groups: dict[str, SeedGroup] = {name: {layer: [i]} for name, (layer, i) in names.items()}
    report = judge(model, groups) if callable(judge) else counterfactual(model, *judge, groups)
    if not isinstance(report, CounterfactualReport):
        raise InvalidType(
            f"judge returned {shown(report)}; it has to return what kasmina_fx.counterfactual does"
        )
    found = {group.name: group for group in report.groups}
    missing = sorted(names.keys() - found)
    if missing:
        raise InvalidArgument(
            f"judge says nothing of {shown(missing)}: give its groups to kasmina_fx.counterfactual"
        )
    return {seed: _worth(found[name], report.loss) for name, seed in names.items()}


def _worth(group: Worth, on: float) -> float:
    if math.isfinite(group.worth):
        return group.worth
    without, now = (loss if math.isfinite(loss) else math.inf for loss in (group.loss, on))
    return without - now
