"""Confidence intervals by resampling pictures.  Statistic of weighted pictures -> value with interval.

Every number here is a function of how often each picture counts: once each gives the number itself, random counts give
what other draws of as many pictures might have given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
EXPLANATION = (
    "95 % bootstrap interval: the measured pictures are drawn anew with replacement and the reference stays as it is; "
    "the percentiles are moved so that the draws' mean lies on the number, since repeated pictures bias distances"
)

# (R, N) how often each of N pictures counts in each of R draws -> (R,) values
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (None without resampling) over n pictures (or clips)."""

    value: float
    low: float | None
    high: float | None
    n: int


def estimate(statistic: Statistic, n: int, resamples: int, seed: int) -> Estimate:
    """Evaluate a statistic on n pictures and on `resamples` draws of n with replacement.

    A single picture has no interval, as all of its draws are equal.
    """
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(n, np.full(n, 1 / n), size=resamples if n > 1 else 0)
    value, *drawn = statistic(np.concatenate([np.ones((1, n)), draws]))
    drawn = np.array(drawn)[np.isfinite(drawn)]  # a draw may miss all pictures that a number is about
    if not len(drawn):
        return Estimate(float(value), None, None, n)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) - drawn.mean() + value
    return Estimate(float(value), float(low), float(high), n)


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of a number each picture has: (N,)."""
    return ratio_of(values, np.ones(len(values)))


def ratio_of(totals: np.ndarray, counts: np.ndarray) -> Statistic:
    """The mean over things of which a picture may hold several: totals and counts, (N,) each; NaN without any."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        numerator, denominator = weights @ totals, weights @ counts
        return np.divide(numerator, denominator, out=np.full(len(weights), np.nan), where=denominator > 0)

    return statistic
