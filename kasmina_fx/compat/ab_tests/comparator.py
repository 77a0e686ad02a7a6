"""May a new model take the place of an old one: an A/B test, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from kasmina_fx.compat.ab_tests.metrics import LATENCY, SIMILARITY
from kasmina_fx.compat.ab_tests.runner import ABTestRunner


class ModelComparator:
    """Says whether a new model may take the place of an old one.

    Args:
        ab_runner: Who compares them; None: an :class:`ABTestRunner`.
    """

    def __init__(self, ab_runner: ABTestRunner | None = None) -> None:
        self.ab_runner = ABTestRunner() if ab_runner is None else ab_runner

    def compare_implementations(
        self,
        legacy_model: nn.Module,
        new_model: nn.Module,
        test_data: Iterable[Any],
        test_name: str = "implementation_comparison",
    ) -> dict[str, Any]:
        """Run a test; return ``test_result``, ``recommendations``, ``risks``, ``rollout_safe``.

        A risk is a p99 of the latency above 1.1 times the old model's, or outputs whose cosine is
        below 0.99 on average.
        """
        result = self.ab_runner.run_test(legacy_model, new_model, test_data, test_name)
        advice: list[str] = []
        risks: list[str] = []
        if LATENCY in result.metrics:
            old, new = (result.metrics[LATENCY][name]["p99"] for name in ("legacy", "new"))
            told = f"{new:.2f}ms vs {old:.2f}ms"
            if new > 1.1 * old:
                risks.append(f"Latency regression detected: {told}")
            elif new < 0.9 * old:
                advice.append(f"Latency improved: {told}")
        if SIMILARITY in result.metrics:
            mean = result.metrics[SIMILARITY]["mean"]
            if mean >= 0.99:
                advice.append(f"Output consistency maintained: {mean:.4f} similarity")
            else:
                risks.append(f"Output divergence detected: {mean:.4f} similarity")
        advice.append("Address risks before rollout" if risks else "Safe to proceed with rollout")
        return {
            "test_result": result,
            "recommendations": advice,
            "risks": risks,
            "rollout_safe": not risks,
        }
