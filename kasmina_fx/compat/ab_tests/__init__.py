"""A/B tests of two models on the same data, in the shape that older code calls and reads.

:func:`kasmina_fx.ab.compare` compares outputs, gradients, losses, latency and memory of two ways to
run one model; this compares two models, which may be anything. Needs the extra ``ab``.
"""

from kasmina_fx.compat.ab_tests.comparator import ModelComparator
from kasmina_fx.compat.ab_tests.metrics import (
    ABTestMetric,
    AccuracyMetric,
    LatencyMetric,
    OutputSimilarityMetric,
)
from kasmina_fx.compat.ab_tests.runner import ABTestResult, ABTestRunner

__all__ = [
    "ABTestMetric",
    "ABTestResult",
    "ABTestRunner",
    "AccuracyMetric",
    "LatencyMetric",
    "ModelComparator",
    "OutputSimilarityMetric",
]
