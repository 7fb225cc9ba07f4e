"""A histogram of non-negative integers with a bounded relative error and a fixed size, for figures too many to keep.

Knows integers and weights; must not know what they measure. Buckets are those of a floating-point number cut to eleven
significant bits: every value below 2048 has its own bucket, a larger one shares it with values at most 2**-10 of itself
away. Count, sum, minimum and maximum are exact. Equal multisets give equal histograms however they were put in: in
batches, in another order, merged, or as arithmetic progressions in closed form.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError
from megalith.report.percentiles import rank

IntArray: TypeAlias = NDArray[np.int64]

RELATIVE_ERROR = 2.0**-11
"""Most that a quantile may be off, as a share of the true value: 0.049 %."""

_BITS = 10
_SHIFT = 52 - _BITS
# A float64's bits above _SHIFT, for 1.0; index 1 is the bucket of the value 1 and index 0 that of zero.
_ORIGIN = (1023 << _BITS) - 1
_EXACT_FLOAT = 1 << 53
_MOST_POINTS = 1 << 17


class Histogram:
    """Counts of integers from 0 to 2**63 - 1. At most 0.5 MB; as much as its largest value needs."""

    __slots__ = ("_counts", "count", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.count = 0
        """Samples, a sample of weight w counted w times."""
        self.total = 0
        """Their sum."""
        self.minimum = 0
        """The smallest; 0 when there is none."""
        self.maximum = 0
        """The largest; 0 when there is none."""
        self._counts: IntArray = np.zeros(0, dtype=np.int64)

    def add(self, values: IntArray, weights: IntArray | None = None) -> None:
        """Count each of `values` once, or as often as its weight (0 or more). ValueError below zero."""
        if len(values) == 0:
            return
        if weights is not None:
            _check_weights(weights)
            here = weights > 0
            if not here.all():
                return self.add(values[here], weights[here])
        low, high = int(values.min()), int(values.max())
        index = _index(values, low, high)
        if weights is None:
            added, count, total = np.bincount(index), len(values), _dot(values, None, high)
        else:
            added = _weighted_bincount(index, weights)
            count, total = _dot(weights, None, int(weights.max())), _dot(values, weights, high)
        self._take(added, count, total, low, high)
        return None

    def add_progressions(self, first: IntArray, slope: IntArray, steps: IntArray, weights: IntArray) -> None:
        """For each row count first + j * slope for every j below `steps`, each `weights` times.

        The same as adding the values one by one, in time proportional to the buckets that a row crosses.
        """
        here = (steps > 0) & (weights > 0)
        if not here.all():
            first, slope, steps, weights = first[here], slope[here], steps[here], weights[here]
        if len(first) == 0:
            return
        longest = float(np.abs(slope).max()) * float(steps.max()) + float(first.max())
        if longest >= 1 << 62:
            raise ValueError(f"a progression that reaches {longest:.3g}, beyond 2**62")
        falling = slope < 0
        if falling.any():
            first, slope = np.where(falling, first + (steps - 1) * slope, first), np.abs(slope)
        last = first + (steps - 1) * slope
        low, high = int(first.min()), int(last.max())
        start = _index(first, low, high)
        points = np.minimum(_index(last, low, high) - start + 1, steps)
        for part in _slices(points):
            index, counts = _spread(first[part], slope[part], steps[part], weights[part], start[part], points[part])
            added = _weighted_bincount(index, counts)
            self._take(added, 0, 0, low, high)
        self.count += _dot(steps, weights, int(steps.max()))
        self.total += _progression_sum(first, slope, steps, weights)

    def merge(self, other: Histogram) -> None:
        """Add all that `other` has counted."""
        if other.count:
            self._take(other._counts, other.count, other.total, other.minimum, other.maximum)

    def percentile(self, percent: float) -> int:
        """The nearest-rank percentile (see report.percentiles), at most RELATIVE_ERROR of the true one away.

        Exact below 2048, at the first and at the last rank. Raises ConfigError without a sample or outside 0..100.
        """
        return self.at_rank(rank(self._some(), percent))

    def quantile(self, share: float) -> int:
        """The same for a share between 0 and 1."""
        return self.percentile(float(f"{share * 100:.12g}"))

    def at_rank(self, position: int) -> int:
        """The `position`-th smallest sample, counted from 1, within RELATIVE_ERROR."""
        if not 1 <= position <= self._some():
            raise ConfigError(f"There is no sample {position} of {self.count}.")
        if position == 1:
            return self.minimum
        if position == self.count:
            return self.maximum
        bucket = int(np.searchsorted(np.cumsum(self._counts), position))
        low, high = _edge(bucket), _edge(bucket + 1) - 1
        return min(max((low + high) // 2, self.minimum), self.maximum)

    def mean(self) -> float:
        """The exact mean, correctly rounded."""
        return self.total / self._some()

    def at_or_below(self, value: int) -> int:
        """How many samples are at or below `value`; those of its own bucket count in full, unless it is a bound."""
        if self.count == 0 or value < self.minimum:
            return 0
        if value >= self.maximum:
            return self.count
        index = int(_index(np.array([value], dtype=np.int64), value, value)[0])
        return int(self._counts[: index + 1].sum())

    def cdf(self, most_points: int = 1000) -> tuple[list[int], list[float]]:
        """Values and the share of samples at or below each, rising, ending at (maximum, 1.0).

        At most `most_points` points, evenly spread over the samples. Values are upper ends of buckets.
        """
        if self.count == 0:
            return [], []
        used = np.flatnonzero(self._counts)
        sums = np.cumsum(self._counts[used])
        if len(used) > most_points:
            targets = np.linspace(0, self.count, most_points + 1)[1:]
            keep = np.unique(np.searchsorted(sums, targets).clip(0, len(used) - 1))
            used, sums = used[keep], sums[keep]
        values = [min(_edge(int(i) + 1) - 1, self.maximum) for i in used]
        return values, [int(s) / self.count for s in sums]

    def __getstate__(self) -> tuple[Any, ...]:
        """Sparse, so that it travels cheaply between processes."""
        used = np.flatnonzero(self._counts)
        return (self.count, self.total, self.minimum, self.maximum, len(self._counts), used, self._counts[used])

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.count, self.total, self.minimum, self.maximum, length, used, counts = state
        self._counts = np.zeros(length, dtype=np.int64)
        self._counts[used] = counts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        mine = (self.count, self.total, self.minimum, self.maximum)
        theirs = (other.count, other.total, other.minimum, other.maximum)
        return mine == theirs and np.array_equal(np.trim_zeros(self._counts), np.trim_zeros(other._counts))

    __hash__ = None  # type: ignore[assignment]

    def _some(self) -> int:
        if self.count == 0:
            raise ConfigError("No sample, so no percentile.", "Measure at least one.")
        return self.count

    def _take(self, added: IntArray, count: int, total: int, low: int, high: int) -> None:
        empty = len(self._counts) == 0
        if len(added) > len(self._counts):
            grown = np.zeros(len(added), dtype=np.int64)
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        self._counts[: len(added)] += added
        self.minimum = low if empty else min(self.minimum, low)
        self.maximum = high if empty else max(self.maximum, high)
        self.count += count
        self.total += total


def _check_weights(weights: IntArray) -> None:
    if weights.min() < 0:
        raise ValueError(f"a weight of {int(weights.min())}")


def _index(values: IntArray, low: int, high: int) -> IntArray:
    """The bucket of each value; `low` and `high` bound them. A float64's exponent and first mantissa bits say it."""
    if low < 0:
        raise ValueError(f"{low} is below zero")
    if high >= _EXACT_FLOAT:
        # Only the first eleven bits matter; without the last ten the conversion to float cannot round up.
        values = np.where(values >= _EXACT_FLOAT, values & ~np.int64(1023), values)
    bits: IntArray = values.astype(np.float64).view(np.int64) >> _SHIFT
    bits -= _ORIGIN
    return np.maximum(bits, 0, out=bits)


def _edge(index: int) -> int:
    """The smallest integer of bucket `index`, or of the next one that has any."""
    if index <= 0:
        return 0
    exponent, mantissa = divmod(index - 1, 1 << _BITS)
    scaled = ((1 << _BITS) + mantissa) << exponent
    return -(-scaled >> _BITS)


def _edges(index: IntArray) -> IntArray:
    """`_edge` of many; indices from 1 on, edges below 2**62."""
    exponent = (index - 1) >> _BITS
    mantissa = ((index - 1) & ((1 << _BITS) - 1)) + (1 << _BITS)
    wide = mantissa << np.maximum(exponent - _BITS, 0)
    drop = np.maximum(_BITS - exponent, 0)
    edges: IntArray = (wide + (np.int64(1) << drop) - 1) >> drop
    return edges


def _weighted_bincount(index: IntArray, weights: IntArray) -> IntArray:
    """Sums of integer weights by bucket; floats carry them exactly up to 2**53."""
    if float(weights.sum(dtype=np.float64)) < _EXACT_FLOAT:
        return np.bincount(index, weights=weights).astype(np.int64)
    sums: IntArray = np.zeros(int(index.max()) + 1, dtype=np.int64)
    np.add.at(sums, index, weights)
    return sums


def _dot(values: IntArray, weights: IntArray | None, high: int) -> int:
    """The exact sum of values (0 <= value <= high) times weights."""
    weight = len(values) if weights is None else float(weights.sum(dtype=np.float64))
    if high * weight < 1 << 62:
        return int(values.sum() if weights is None else values @ weights)
    if weight < 1 << 30:
        upper, lower = values >> 31, values & ((1 << 31) - 1)
        return (_dot(upper, weights, high >> 31) << 31) + _dot(lower, weights, (1 << 31) - 1)
    many = [1] * len(values) if weights is None else weights.tolist()
    return sum(a * b for a, b in zip(values.tolist(), many, strict=True))


def _progression_sum(first: IntArray, slope: IntArray, steps: IntArray, weights: IntArray) -> int:
    high = float(steps.max()) * (float(first.max()) + float(slope.max()) * float(steps.max()))
    if high < 1 << 61:
        sums = steps * first + slope * (steps * (steps - 1) // 2)
        return _dot(sums, weights, int(sums.max()))
    rows = zip(first.tolist(), slope.tolist(), steps.tolist(), weights.tolist(), strict=True)
    return sum(w * (n * a + d * (n * (n - 1) // 2)) for a, d, n, w in rows)


def _slices(points: IntArray) -> list[slice]:
    """Cut rows into runs of about _MOST_POINTS points together, so that a batch needs bounded memory."""
    if points.sum() <= _MOST_POINTS:
        return [slice(0, len(points))]
    run = np.cumsum(points) // _MOST_POINTS
    cuts = [0, *(np.flatnonzero(np.diff(run)) + 1).tolist(), len(points)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def _spread(
    first: IntArray, slope: IntArray, steps: IntArray, weights: IntArray, start: IntArray, points: IntArray
) -> tuple[IntArray, IntArray]:
    """Buckets and counts of progressions that do not fall; `points` of each row.

    A row with no more steps than buckets is written out value by value. Else the steps in a bucket are those below its
    upper edge less those below its lower one; first + j * slope < edge holds for ceil((edge - first) / slope) of them.
    """
    one = points == 1
    parts = [(start[one], steps[one] * weights[one])]
    short = ~one & (points == steps)
    if short.any():
        row, j = _ragged(points[short])
        values = first[short][row] + j * slope[short][row]
        parts.append((_index(values, 0, int(values.max())), weights[short][row]))
    long = ~one & ~short
    if long.any():
        row, j = _ragged(points[long])
        index = start[long][row] + j
        rise, many = slope[long][row], steps[long][row]
        ends = np.minimum(-((first[long][row] - _edges(index + 1)) // rise), many)
        begins = np.empty_like(ends)
        begins[1:] = ends[:-1]
        begins[j == 0] = 0
        parts.append((index, (ends - begins) * weights[long][row]))
    return np.concatenate([i for i, _ in parts]), np.concatenate([c for _, c in parts])


def _ragged(lengths: IntArray) -> tuple[IntArray, IntArray]:
    """(row, position in the row) of every element of rows of these lengths."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    return row, np.arange(len(row)) - starts[row]
