"""Statistics of paired comparisons: intervals, p-values, and what could have been seen. The unit is the article."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """Return the mean and its 95 % bootstrap interval; with fewer than two values the interval is the value."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2 or np.ptp(array) == 0:
        return Interval(float(array.mean()), float(array.mean()), float(array.mean()))
    result = stats.bootstrap(
        (array,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return Interval(float(array.mean()), float(result.confidence_interval.low), float(result.confidence_interval.high))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the paired differences' mean under random signs."""
    array = np.asarray(differences, dtype=float)
    if len(array) < 2 or not array.any():
        return 1.0
    result = stats.permutation_test(
        (array,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    return float(result.pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment over a family of contrasts."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p))
        adjusted[name] = largest
    return adjusted


def smallest_detectable(differences: Sequence[float]) -> float:
    """Effect that this many articles would show with 80 % power at the 5 % level: 2.8 standard errors."""
    array = np.asarray(differences, dtype=float)
    return float(2.8 * array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.inf
