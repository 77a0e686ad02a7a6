"""Means with confidence intervals, by scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies with a confidence; both ends are NaN for fewer than 2 samples."""

    mean: float
    low: float
    high: float
    confidence: float
    samples: int

    def __str__(self) -> str:
        """Mean and ends."""
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interval_of(values: Sequence[float], confidence: float) -> Interval:
    """Return the mean of values with a bootstrap interval, percentiles of 2,000 resamples.

    Needs numpy and scipy (``pip install kasmina-fx[ab]``); see Efron and Tibshirani, "An
    Introduction to the Bootstrap" (1993), chapter 13.

    Args:
        values: Samples; none gives NaN.
        confidence: Between 0 and 1.
    """
    import numpy as np  # an extra
    from scipy.stats import bootstrap  # an extra

    if len(values) < 2:
        mean = float(values[0]) if len(values) else math.nan
        return Interval(mean, math.nan, math.nan, confidence, len(values))
    found = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=2000,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(
        float(np.mean(values)), float(found.low), float(found.high), confidence, len(values)
    )
