"""Arrival processes: when requests come.

Each gives whole nanoseconds between arrivals, by counter, so that request number i comes at the same time on every
machine. Knows time; knows nothing of what is requested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import msgspec
import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.base.units import NS_PER_S
from megalith.specs import draws
from megalith.specs.draws import Floats, Ints

_MAX_TRIES = 64


class SteadyArrivals(Config, tag_field="kind", tag="fixed"):
    """One request every 1 / `rate_per_s` seconds, the first at zero."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _require_rate(self.rate_per_s)

    def times_ns(self, seed: int, first: int, count: int, after_ns: int) -> Ints:  # noqa: ARG002 (see Arrivals)
        """When requests number `first` to `first` + `count` - 1 come. Not a running sum: it does not drift."""
        index = np.arange(first, first + count, dtype=np.float64)
        return np.rint(index * (NS_PER_S / self.rate_per_s)).astype(np.int64)


class PoissonArrivals(Config, tag_field="kind", tag="poisson"):
    """Exponential gaps: independent clients, coefficient of variation 1. The first request comes after one gap."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _require_rate(self.rate_per_s)

    def times_ns(self, seed: int, first: int, count: int, after_ns: int) -> Ints:
        """When requests number `first` to `first` + `count` - 1 come, if number `first` - 1 came at `after_ns`."""
        return _running(draws.exponentials(seed, first, count) * (NS_PER_S / self.rate_per_s), after_ns)


class GammaArrivals(Config, tag_field="kind", tag="gamma"):
    """Independent gamma gaps with coefficient of variation `cv`: above 1 is more bursty than Poisson, below less."""

    rate_per_s: float
    cv: float

    def __post_init__(self) -> None:
        _require_rate(self.rate_per_s)
        if not 0.01 <= self.cv <= 100:
            raise ConfigError(f"A coefficient of variation of {self.cv:g} cannot be drawn.", "Give 0.01 to 100.")

    def times_ns(self, seed: int, first: int, count: int, after_ns: int) -> Ints:
        """When requests number `first` to `first` + `count` - 1 come, if number `first` - 1 came at `after_ns`."""
        shape = 1.0 / (self.cv * self.cv)
        scale = NS_PER_S / (self.rate_per_s * shape)
        if shape >= 1.0:
            return _running(_gammas(shape, seed, first, count) * scale, after_ns)
        # G(a) = G(a + 1) * U^(1/a), for a < 1 (Marsaglia and Tsang, section 6).
        boost = draws.power(draws.shares(splitmix64(seed, _MAX_TRIES * 2), first, count), 1.0 / shape)
        return _running(_gammas(shape + 1.0, seed, first, count) * boost * scale, after_ns)


class OnOffArrivals(Config, tag_field="kind", tag="onoff"):
    """Bursts: Poisson arrivals while on, none while off; both periods exponential with means `on_s` and `off_s`.
    `rate_per_s` is the mean over both, so the rate within a burst is (on + off) / on times higher.

    Its gaps are independent and hyperexponential: the interrupted Poisson process (Kuczura, "The interrupted Poisson
    process as an overflow process", Bell System Technical Journal 52(3), 1973).
    """

    rate_per_s: float
    on_s: float
    off_s: float

    def __post_init__(self) -> None:
        _require_rate(self.rate_per_s)
        if not (0 < self.on_s < 1e9 and 0 < self.off_s < 1e9):
            what = f"Bursts of {self.on_s:g} s with pauses of {self.off_s:g} s cannot be drawn."
            raise ConfigError(what, "Give two mean durations above 0, such as on=20, off=55.")

    @property
    def cv(self) -> float:
        """Coefficient of variation of the gaps."""
        burst_rate = self.rate_per_s * (self.on_s + self.off_s) / self.on_s
        leave, enter = 1 / self.on_s, 1 / self.off_s
        return math.sqrt(1 + 2 * burst_rate * leave / (leave + enter) ** 2)

    def times_ns(self, seed: int, first: int, count: int, after_ns: int) -> Ints:
        """When requests number `first` to `first` + `count` - 1 come, if number `first` - 1 came at `after_ns`."""
        burst_rate = self.rate_per_s * (self.on_s + self.off_s) / self.on_s
        enter = 1 / self.off_s
        total = burst_rate + 1 / self.on_s + enter
        root = math.sqrt(total * total - 4 * burst_rate * enter)
        fast = (total + root) / 2
        # The product of the two rates is burst_rate * enter; this form keeps the digits that total - root loses.
        slow = burst_rate * enter / fast
        share_fast = (burst_rate - slow) / (fast - slow)
        pick = draws.shares(splitmix64(seed, 1), first, count) < share_fast
        return _running(
            draws.exponentials(seed, first, count) * np.where(pick, NS_PER_S / fast, NS_PER_S / slow), after_ns
        )


class CountedArrivals(Config, tag_field="kind", tag="counted"):
    """So many requests in each step of `step_s` seconds, at independent uniform times within it: a recorded or forecast
    load, played. It ends with its last step."""

    step_s: float
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1e-3 <= self.step_s <= 1e9 or not any(self.counts) or min(self.counts) < 0:
            what = f"{len(self.counts)} steps of {self.step_s:g} s with {sum(self.counts)} requests cannot be played."
            raise ConfigError(what, "Give counts from 0, one above 0, and a step of 0.001 s to 1e9 s.")

    @property
    def rate_per_s(self) -> float:
        """Mean over all steps."""
        return sum(self.counts) / (len(self.counts) * self.step_s)

    def times_ns(self, seed: int, first: int, count: int, after_ns: int) -> Ints:  # noqa: ARG002 (see Arrivals)
        """When requests number `first` to `first` + `count` - 1 come; fewer where the counts end."""
        ends = np.cumsum(np.array(self.counts, dtype=np.int64))
        last = min(first + count, int(ends[-1]))
        if first >= last:
            return np.zeros(0, dtype=np.int64)
        steps = np.searchsorted(ends, [first, last - 1], side="right")
        found = []
        for step in range(int(steps[0]), int(steps[1]) + 1):
            number = self.counts[step]
            within = np.sort(draws.shares(seed, int(ends[step]) - number, number))  # by number: cuts change nothing
            found.append(np.rint((step + within) * (self.step_s * NS_PER_S)).astype(np.int64))
        skipped = first - (int(ends[steps[0]]) - self.counts[int(steps[0])])
        return np.concatenate(found)[skipped : skipped + last - first]


class ClosedLoop(Config, tag_field="kind", tag="closed"):
    """`clients` that each wait for their answer, think for `think_s`, and ask again. Nothing has a due time: whoever
    runs the workload hands the next request to the client that is free."""

    clients: int
    think_s: float = 0.0

    def __post_init__(self) -> None:
        if self.clients < 1 or not 0 <= self.think_s < 1e9:
            what = f"{self.clients} clients that think for {self.think_s:g} s cannot be run."
            raise ConfigError(what, "Give at least 1 client and a think time from 0 s.")


OpenArrivals: TypeAlias = SteadyArrivals | PoissonArrivals | GammaArrivals | OnOffArrivals | CountedArrivals
Arrivals: TypeAlias = OpenArrivals | ClosedLoop


def arrival_times(arrivals: OpenArrivals, seed: int, chunk: int = 1024) -> Iterator[int]:
    """All due times in order; without end, but for counted ones."""
    first = after_ns = 0
    while True:
        times = arrivals.times_ns(seed, first, chunk, after_ns).tolist()
        yield from times
        if not times:
            return
        first, after_ns = first + chunk, times[-1]


def arrivals_at(arrivals: OpenArrivals, rate_per_s: float) -> OpenArrivals:
    """The same process at another rate, with the same CV: bursts keep their requests, so on/off periods scale too."""
    if isinstance(arrivals, OnOffArrivals):
        factor = arrivals.rate_per_s / rate_per_s if rate_per_s > 0 else 1.0
        return OnOffArrivals(rate_per_s=rate_per_s, on_s=arrivals.on_s * factor, off_s=arrivals.off_s * factor)
    if isinstance(arrivals, CountedArrivals):
        _require_rate(rate_per_s)
        ends = np.cumsum(np.array([0, *arrivals.counts])) * (rate_per_s / arrivals.rate_per_s)
        return CountedArrivals(step_s=arrivals.step_s, counts=tuple(np.diff(np.rint(ends).astype(np.int64)).tolist()))
    return msgspec.structs.replace(arrivals, rate_per_s=rate_per_s)


def _require_rate(rate_per_s: float) -> None:
    if not 1e-6 <= rate_per_s <= 1e9:
        raise ConfigError(f"A rate of {rate_per_s:g} requests a second cannot be drawn.", "Give 1e-6 to 1e9.")


def _running(gaps_ns: Floats, after_ns: int) -> Ints:
    """Whole nanoseconds before the sum, because sums of integers do not depend on their order."""
    return after_ns + np.cumsum(np.rint(gaps_ns).astype(np.int64))


def _gammas(shape: float, seed: int, first: int, count: int) -> Floats:
    """Gamma numbers of scale 1 and `shape` >= 1: Marsaglia and Tsang, "A simple method for generating gamma variables",
    ACM TOMS 26(3), 2000. Try number t of number i uses number i of stream t, so a rejection moves nothing else."""
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    result = np.full(count, shape)
    left = np.arange(count, dtype=np.uint64) + np.uint64(first)
    for attempt in range(_MAX_TRIES):
        normal = draws.normal_quantile(draws.as_shares(draws.words_at(splitmix64(seed, 2 * attempt), left)))
        share = draws.as_shares(draws.words_at(splitmix64(seed, 2 * attempt + 1), left))
        base = 1.0 + c * normal
        cube = base * base * base
        bound = 0.5 * normal * normal + d - d * cube + d * draws.log(np.where(cube > 0, cube, 1.0))
        accepted = (cube > 0) & (draws.log(share) < bound)
        result[(left[accepted] - np.uint64(first)).astype(np.int64)] = d * cube[accepted]
        left = left[~accepted]
        if not len(left):
            break
    # At worst 5 % are rejected, so none is left after 64 tries; the mean would keep the rate if one were.
    return result
