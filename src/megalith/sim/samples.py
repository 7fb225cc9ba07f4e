"""Samples of one figure: every one of them while they are few, a histogram when they are many.

Knows integers; must not know what they measure. Says of each result whether it is exact.
"""

from __future__ import annotations

import msgspec
import numpy as np

from megalith.base.errors import ConfigError
from megalith.report.percentiles import rank
from megalith.sim.histogram import RELATIVE_ERROR, Histogram, IntArray

EXACT_LIMIT = 200_000
"""Samples that are kept in full: 1.6 MB a figure."""


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """What the samples of one figure say, in their own unit. Percentiles are nearest-rank.

    `error` is the most that p50 to p99 may be off, as a share of the true value: 0 when they are exact. Everything
    else is exact, the mean rounded to the nearest integer.
    """

    count: int
    mean: int
    minimum: int
    p50: int
    p90: int
    p95: int
    p99: int
    maximum: int
    error: float


class Samples:
    """A growing set of non-negative integers in bounded memory."""

    __slots__ = ("_kept", "_limit", "_sorted", "histogram")

    def __init__(self, exact_limit: int = EXACT_LIMIT) -> None:
        self.histogram = Histogram()
        self._limit = exact_limit
        self._kept: list[IntArray] | None = []
        self._sorted: IntArray | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return self.histogram.count

    @property
    def error(self) -> float:
        """The most that a percentile may be off, as a share of it: 0 while all samples are kept."""
        return 0.0 if self._kept is not None else RELATIVE_ERROR

    def add(self, values: IntArray) -> None:
        """Take one sample each; ValueError below zero. The array is kept: do not write to it afterwards."""
        self.histogram.add(values)
        self._sorted = None
        if self._kept is None:
            return
        self._kept.append(values)
        if self.histogram.count > self._limit:
            self._kept = None

    def merge(self, other: Samples) -> None:
        """Add all that `other` has; exact as long as both are and the limit allows it."""
        self.histogram.merge(other.histogram)
        self._sorted = None
        if self._kept is None or other._kept is None or self.histogram.count > self._limit:
            self._kept = None
        else:
            self._kept.extend(other._kept)

    def percentile(self, percent: float) -> int:
        """The nearest-rank percentile, within `error`. Raises ConfigError without a sample."""
        if self.count == 0:
            raise ConfigError("No sample, so no percentile.", "Measure at least one.")
        return self.at_rank(rank(self.count, percent))

    def at_rank(self, position: int) -> int:
        """The `position`-th smallest sample, counted from 1, within `error`."""
        if self._kept is None:
            return self.histogram.at_rank(position)
        if not 1 <= position <= self.count:
            raise ConfigError(f"There is no sample {position} of {self.count}.")
        return int(self._ordered()[position - 1])

    def cdf(self, most_points: int = 1000) -> tuple[list[int], list[float]]:
        """Values and the share of samples at or below each, rising to (maximum, 1.0), at most `most_points`."""
        if self._kept is None or self.count == 0:
            return self.histogram.cdf(most_points)
        ordered = self._ordered()
        at = np.unique(np.linspace(0, len(ordered), min(most_points, len(ordered)) + 1)[1:].astype(np.int64)) - 1
        values = ordered[at]
        shares = np.searchsorted(ordered, values, side="right") / len(ordered)
        last = np.append(values[1:] != values[:-1], True)
        return values[last].tolist(), shares[last].tolist()

    def describe(self) -> Distribution | None:
        """The summary; None without a sample."""
        if self.count == 0:
            return None
        p50, p90, p95, p99 = (self.percentile(percent) for percent in (50, 90, 95, 99))
        return Distribution(
            count=self.count,
            mean=rounded_mean(self.histogram.total, self.count),
            minimum=self.histogram.minimum,
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            maximum=self.histogram.maximum,
            error=self.error,
        )

    def _ordered(self) -> IntArray:
        if self._sorted is None:
            kept = self._kept or []
            self._sorted = np.sort(np.concatenate(kept))
            self._kept = [self._sorted]
        return self._sorted


def rounded_mean(total: int, count: int) -> int:
    """total / count to the nearest integer, halves up, in exact arithmetic."""
    return (2 * total + count) // (2 * count)
