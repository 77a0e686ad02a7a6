"""Two models on the same batches: what each metric says of them, and which is better."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import check_count
from kasmina_fx.checkpoint.sealed_file import replacing
from kasmina_fx.compat.ab_tests.metrics import (
    LATENCY,
    SIMILARITY,
    ABTestMetric,
    AccuracyMetric,
    LatencyMetric,
    OutputSimilarityMetric,
)
from kasmina_fx.errors import InvalidArgument, shown

_LOG: Final = logging.getLogger(__name__)
#: A difference with a smaller p is one.
_SIGNIFICANT: Final = 0.05


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()


@dataclass
class ABTestResult:
    """What a test found.

    Attributes:
        test_id: Its name.
        variant_a, variant_b: Names of the models.
        metrics: By metric, and model: mean, std, p50, p95, p99 over batches; ``output_similarity``
            has mean, std and min.
        statistical_significance: By metric: p of a paired t-test; 1 where all pairs are equal.
        winner: The model that is better in more of the metrics that differ; None if neither is.
        confidence: Share of these metrics in which it is.
        sample_size: Samples.
        duration_sec: Seconds.
        timestamp: When it was over, in UTC.
    """

    test_id: str
    variant_a: str
    variant_b: str
    metrics: dict[str, dict[str, Any]]
    statistical_significance: dict[str, float]
    winner: str | None = None
    confidence: float = 0.0
    sample_size: int = 0
    duration_sec: float = 0.0
    timestamp: str = field(default_factory=_now)


class ABTestRunner:
    """Runs two models on the same batches.

    Needs numpy and scipy (``pip install kasmina-fx[ab]``).

    Args:
        metrics: By name; latency, accuracy and output_similarity unless given.
        output_dir: Where results are written, as ``<test_id>.json``; made when the first is.
    """

    def __init__(
        self,
        metrics: Mapping[str, ABTestMetric] | None = None,
        output_dir: str | Path = Path("benchmarks/ab_tests"),
    ) -> None:
        default: dict[str, ABTestMetric] = {
            LATENCY: LatencyMetric(),
            "accuracy": AccuracyMetric(),
            SIMILARITY: OutputSimilarityMetric(),
        }
        self.metrics = default if metrics is None else dict(metrics)
        self.output_dir = Path(output_dir)

    def run_test(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        test_data: Iterable[Any],
        test_id: str | None = None,
        variant_names: Sequence[str] = ("legacy", "new"),
        sample_size: int | None = None,
        measure_latency: bool = True,
    ) -> ABTestResult:
        """Compare two models in evaluation, without gradients; their modes are put back.

        The first batch is run once more beforehand, so that no time holds a compile; they take
        turns in who goes first.

        Args:
            model_a: The first one, on one device.
            model_b: The second one, on one device.
            test_data: Batches: a tensor, or a sequence of inputs and (for accuracy) targets.
            test_id: Name of the file; by the time unless given.
            variant_names: Names of both.
            sample_size: Stop after so many samples; None: take all.
            measure_latency: Time every forward; on CUDA that waits for it.

        Raises:
            InvalidArgument: No batch, two names that are one, or a name that is no file's.
        """
        names = tuple(variant_names)
        if len(names) != 2 or names[0] == names[1]:
            raise InvalidArgument(f"variant_names={shown(variant_names)}: give two names")
        name = f"ab_test_{time.time_ns()}" if test_id is None else test_id
        if not name or Path(name).name != name:
            raise InvalidArgument(f"test_id={shown(test_id)}: give the name of a file")
        if sample_size is not None:
            check_count("sample_size", sample_size, least=1)
        start = time.perf_counter()
        with ExitStack() as stack:
            for model in (model_a, model_b):
                stack.enter_context(_in_evaluation(model))
            stack.enter_context(torch.no_grad())
            batches = _until(test_data, sample_size)
            seen, samples = self._measured((model_a, model_b), batches, measure_latency)
        metrics, significance = self._summary(seen, names)
        winner, confidence = self._winner(metrics, significance, names)
        result = ABTestResult(
            name,
            *names,
            metrics,
            significance,
            winner,
            confidence,
            samples,
            time.perf_counter() - start,
        )
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with replacing(self.output_dir / f"{name}.json") as file:
            file.write((json.dumps(asdict(result), indent=2) + "\n").encode())
        _LOG.info("A/B test %s: %d samples, winner %s", name, samples, winner)
        return result

    def _measured(
        self, models: tuple[nn.Module, nn.Module], batches: Iterable[Any], timed: bool
    ) -> tuple[dict[str, list[tuple[float, float]]], int]:
        """Return pairs by metric, one a batch, and how many samples there were."""
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in self.metrics}
        samples = 0
        for number, batch in enumerate(batches):
            inputs, target = _parts(batch)
            if number == 0:
                for model in models:
                    _timed(model, inputs)
            outs: dict[int, tuple[Tensor, float]] = {}
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                outs[which] = _timed(models[which], inputs)
            (a, time_a), (b, time_b) = outs[0], outs[1]
            for name, metric in self.metrics.items():
                if name == LATENCY and timed:
                    seen[name].append((time_a, time_b))
                elif name == SIMILARITY:
                    value = metric.compute(a, b.to(a.device))
                    seen[name].append((value, value))
                elif name != LATENCY and target is not None:
                    both = (metric.compute(out, target.to(out.device)) for out in (a, b))
                    seen[name].append(tuple(both))  # type: ignore[arg-type]  # two
            samples += inputs.shape[0]
        if not samples:
            raise InvalidArgument("test_data holds no batch: give at least one")
        return seen, samples

    def _summary(
        self, seen: Mapping[str, list[tuple[float, float]]], names: tuple[str, ...]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
        import numpy as np  # an extra
        from scipy import stats  # an extra

        metrics: dict[str, dict[str, Any]] = {}
        significance = {}
        for name, pairs in seen.items():
            if not pairs:
                continue
            values = np.asarray(pairs, dtype=np.float64)
            if name == SIMILARITY:
                one = values[:, 0]
                metrics[name] = {k: float(getattr(one, k)()) for k in ("mean", "std", "min")}
                continue
            percentiles = np.percentile(values, [50, 95, 99], axis=0)
            metrics[name] = {
                model: {
                    "mean": float(values[:, which].mean()),
                    "std": float(values[:, which].std()),
                    **{f"p{p}": float(percentiles[i, which]) for i, p in enumerate((50, 95, 99))},
                }
                for which, model in enumerate(names)
            }
            differ = values[:, 0] - values[:, 1]
            if len(differ) < 2 or bool((differ == differ[0]).all()):
                significance[name] = 1.0 if len(differ) < 2 or differ[0] == 0 else 0.0
            else:
                significance[name] = float(stats.ttest_rel(values[:, 0], values[:, 1]).pvalue)
        return metrics, significance

    def _winner(
        self,
        metrics: Mapping[str, dict[str, Any]],
        significance: Mapping[str, float],
        names: tuple[str, ...],
    ) -> tuple[str | None, float]:
        wins = dict.fromkeys(names, 0)
        for name, p in significance.items():
            if p < _SIGNIFICANT:
                a, b = (metrics[name][model]["mean"] for model in names)
                wins[names[int(self.metrics[name].is_better(a, b))]] += 1
        best, other = sorted(names, key=lambda model: -wins[model])
        if wins[best] == wins[other]:
            return None, 0.0
        return best, wins[best] / sum(wins.values())


def _parts(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, (list, tuple)):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _until(batches: Iterable[Any], samples: int | None) -> Iterator[Any]:
    taken = 0
    for batch in batches:
        if samples is not None and taken >= samples:
            return
        taken += _parts(batch)[0].shape[0]
        yield batch


def _timed(model: nn.Module, inputs: Tensor) -> tuple[Tensor, float]:
    """Run a model; return its output and milliseconds."""
    device = next((p.device for p in model.parameters()), inputs.device)
    moved = inputs.to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    out: Tensor = model(moved)
    wait(device)
    return out, 1e3 * (time.perf_counter() - start)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
