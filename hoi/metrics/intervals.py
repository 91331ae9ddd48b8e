"""Numbers with their intervals.  Statistic of weighted pictures -> Measurement -> Results -> Markdown, JSON.

Every number here is a function of how often each picture counts: once each gives the number itself, random counts give
what other draws of as many pictures might have given (the bootstrap, Efron 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.95
EXPLANATION = (
    "95 % bootstrap interval: the measured pictures are drawn anew with replacement and the reference stays as it is; "
    "the percentiles are moved so that the draws' mean lies on the number, since repeated pictures bias distances"
)

SHARE, PERCENT = (0.0, 1.0), (0.0, 100.0)  # bounds of a number, at which intervals end

Better, Bounds = Literal["lower", "higher"], tuple[float, float]
# (R, N) how often each of N pictures counts in each of R draws -> (R,) values
Statistic = Callable[[np.ndarray], np.ndarray]


def ratio_of(totals: np.ndarray, counts: np.ndarray) -> Statistic:
    """The mean over things of which a picture may hold several: totals and counts, (N,) each; NaN without any."""

    def statistic(draws: np.ndarray) -> np.ndarray:
        numerator, denominator = draws @ totals, draws @ counts
        return np.divide(numerator, denominator, out=np.full(len(draws), np.nan), where=denominator > 0)

    return statistic


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of a number each picture has: (N,)."""
    return ratio_of(values, np.ones(len(values)))


def mean_of_parts(parts: Sequence[Statistic]) -> Statistic:
    """The unweighted mean of several statistics; one that a draw has no picture of does not count there."""
    return lambda draws: np.nanmean([part(draws) for part in parts], axis=0)


def mean_of_groups(values: np.ndarray, groups: np.ndarray) -> Statistic:
    """The mean of the groups' means, whatever their sizes: values and names of groups, (N,) each."""
    return mean_of_parts([ratio_of(values * (groups == group), groups == group) for group in sorted(set(groups))])


def estimate(statistic: Statistic, n: int, resamples: int, seed: int) -> tuple[float, float | None, float | None]:
    """Evaluate a statistic on n pictures and on `resamples` draws of n with replacement.

    returns  value, and the ends of its interval, the draws' quantiles shifted as EXPLANATION says; None without
             resampling, or of a single picture, all of whose draws are equal
    """
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(n, np.full(n, 1 / n), size=resamples if n > 1 else 0)
    # The number itself is a draw like the others, so that no formula is written twice.
    value, *drawn = statistic(np.concatenate([np.ones((1, n)), draws]))
    drawn = np.array(drawn)[np.isfinite(drawn)]  # a draw may miss all pictures that a number is about
    if not len(drawn):
        return float(value), None, None
    # A draw holds 63 % of the pictures, the others twice or more: sets that repeat look farther apart than they are.
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) - drawn.mean() + value
    return float(value), float(low), float(high)


@dataclass(frozen=True)
class Measurement:
    """One number.

    name        with unit and everything that decides how it compares: "PCK@0.2", "FID (tf1)"
    value       low and high are the ends of its interval, None without resampling
    n           pictures, or videos, that it is over
    better      whether a "lower" or a "higher" number is better
    definition  one sentence
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    better: Better
    definition: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; null stands for a number that does not exist, such as a mean over nothing."""
        numberless = [key for key in ("value", "low", "high") if not math.isfinite(getattr(self, key) or 0)]
        return asdict(self) | dict.fromkeys(numberless)


@dataclass
class Results:
    """Measurements in the order in which they were made, with notes on how to read them.

    resamples  draws of each interval; 0: no intervals
    """

    resamples: int
    seed: int
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self, name: str, statistic: Statistic, n: int, better: Better, definition: str, bounds: Bounds = (0.0, math.inf)
    ) -> None:
        """Evaluate a statistic of n pictures; the other arguments are those of Measurement.

        bounds  values that the number can have; the interval, whose shift knows no bounds, ends there
        """
        value, low, high = estimate(statistic, n, self.resamples, self.seed)
        if low is not None:
            low, high = max(low, bounds[0]), min(high, bounds[1])
        self.measurements.append(Measurement(name, value, low, high, n, better, definition))

    def note(self, text: str) -> None:
        """Say something once, however many numbers it is true of."""
        if text not in self.notes:
            self.notes.append(text)

    def interval(self) -> dict[str, Any]:
        """What the intervals are."""
        return {"confidence": CONFIDENCE, "resamples": self.resamples, "seed": self.seed, "explanation": EXPLANATION}


def as_table(measurements: Sequence[Measurement]) -> str:
    """Markdown that reads well on a terminal, too: padded columns, an arrow for the better direction."""
    rows = [["number", "", "value", "95 % interval", "n"]]
    for item in measurements:
        interval = "-" if item.low is None else f"{four_digits(item.low)} .. {four_digits(item.high)}"
        arrow = {"lower": "↓", "higher": "↑"}[item.better]
        rows.append([item.name, arrow, four_digits(item.value), interval, str(item.n)])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def four_digits(number: float) -> str:
    """The number to four significant digits; - for a mean over nothing."""
    return f"{number:.4g}" if math.isfinite(number) else "-"
