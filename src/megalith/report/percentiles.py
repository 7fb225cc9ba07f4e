"""Exact percentiles of integer samples. Knows nothing of what the samples mean.

Definition used everywhere in Megalith: **nearest rank** (Hyndman and Fan's type 1, NumPy's `inverted_cdf`). The p-th
percentile of n samples is the ceil(p * n / 100)-th smallest, for p = 0 the smallest. It is always a sample that
occurred, so integer nanoseconds stay integers and p100 is the maximum. Peers' tools interpolate linearly (NumPy's
default); with hundreds of samples the two differ by less than one sample's spacing, and with ten samples the honest
p99 is the maximum, which is what nearest rank says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import isqrt

import msgspec

from megalith.base.errors import ConfigError

STANDARD_PERCENTS = (50, 90, 95, 99)


def rank(count: int, percent: float) -> int:
    """The 1-based rank of the `percent`-th percentile of `count` >= 1 samples, in exact arithmetic.

    `percent` is taken as the decimal number that it prints as (99.9 is 999/10). Raises ConfigError outside 0..100.
    """
    if not 0 <= percent <= 100:
        raise ConfigError(f"Percentile {percent} does not exist.", "Ask for one between 0 and 100.")
    exact = Fraction(str(percent)) * count / 100
    return max(1, -(-exact.numerator // exact.denominator))


def percentile(sorted_samples: Sequence[int], percent: float) -> int:
    """The nearest-rank percentile of samples that are already sorted; there must be at least one."""
    if not sorted_samples:
        raise ConfigError("No sample, so no percentile.", "Measure at least one.")
    return sorted_samples[rank(len(sorted_samples), percent) - 1]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What one column of samples says. Everything but `count` is in the samples' own unit.

    `mean` is rounded to the nearest integer and `deviation` (population standard deviation) rounded down.
    """

    count: int
    mean: int
    deviation: int
    minimum: int
    p50: int
    p90: int
    p95: int
    p99: int
    maximum: int


def summarize(samples: Iterable[int]) -> Summary | None:
    """The summary of integer samples; None when there are none."""
    ordered = sorted(samples)
    count = len(ordered)
    if count == 0:
        return None
    total = sum(ordered)
    squares = sum(value * value for value in ordered)
    p50, p90, p95, p99 = (percentile(ordered, percent) for percent in STANDARD_PERCENTS)
    return Summary(
        count=count,
        mean=(2 * total + count) // (2 * count),
        deviation=isqrt(max(0, count * squares - total * total)) // count,
        minimum=ordered[0],
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        maximum=ordered[-1],
    )
