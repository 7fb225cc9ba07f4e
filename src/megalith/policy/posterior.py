"""How many instances a pool has: the fewest that a posterior of the load allows, or what a proportional rule says.

HARMONY's second stage. n* = argmin over n of cost(n) + E[SLA loss(load, n)], with the expectation over all samples of a
posterior of the load, not over a point forecast; with a loss of 0 or 1 that is the smallest n with P(load > what n
instances carry) <= eps. The published code has no decision stage, so this one follows the paper's formula. Samples come
from an estimator that is frozen before the run. Knows facts, samples and a map from instances to load; must not know
how the samples came about.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from math import ceil
from typing import Literal, Protocol

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.policy.autoscale import Pool, Scaler, ScalingOptions
from megalith.policy.cluster import Command, Event, View
from megalith.policy.router_options import require
from megalith.specs.posterior import read_posterior


class LoadSamples(Protocol):
    """A frozen estimator of the load: the same answer to the same question."""

    def peaks(self, from_s: float, until_s: float) -> Sequence[float]:
        """For each sample the largest load in [from_s, until_s), as known at `from_s`. ConfigError beyond its end."""
        ...


class PosteriorScalingOptions(ScalingOptions):
    """Which posterior, what an instance carries, and what a breach costs."""

    path: str | None = None
    """File of the posterior, as `megalith forecast --posterior` writes it."""
    capacity_per_s: float | tuple[float, ...] = 1.0
    """Load (requests a second, in the posterior's unit) that instances carry within the service level: of one instance,
    each alike; or, measured, of 1, 2, 3, ... of them together. Beyond the list each adds as much as the last."""
    by: Literal["quantile", "cost"] = "quantile"
    """quantile: fewest instances with P(load > capacity) <= eps. cost: least cost and expected loss together."""
    eps: float = 0.05
    loss_per_load: float = 20.0
    """`cost`: what a unit of load beyond the capacity costs for a while, in instances for the same while."""
    point: bool = False
    """Decide by the mean of the samples alone, as a point forecast would: a control."""
    margin: float = 1.0
    """The load times this is what is provisioned for."""
    start_s: float = 0.0
    """How long an instance takes to serve: decisions look so far ahead, and to the next tick after that."""
    offset_s: float = 0.0
    """Time in the posterior at which the run begins."""
    period_s: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.eps < 1, "eps must be at least 0 and below 1")
        require(self.loss_per_load > 0, "loss_per_load must be above 0")
        require(0 < self.margin < 1e6, "margin must be above 0")
        require(self.start_s >= 0 and self.offset_s >= 0, "start_s and offset_s must be at least 0")
        given = self.capacity_per_s
        steps = given if isinstance(given, tuple) else (given,)
        rising = all(after > before for before, after in itertools.pairwise(steps))
        require(len(steps) > 0 and steps[0] > 0 and rising, "capacity_per_s must be above 0 and rise with instances")


class Capacity:
    """What n instances carry, and how many carry a load."""

    def __init__(self, given: float | Sequence[float]) -> None:
        """One figure for each instance, or measured ones of 1, 2, ... together, rising."""
        self._given = [given] if isinstance(given, int | float) else list(given)
        before = self._given[-2] if len(self._given) > 1 else 0.0
        self._more = self._given[-1] - before

    def of(self, instances: int) -> float:
        """Load that so many carry; 0 for none."""
        given = self._given
        if instances <= len(given):
            return given[instances - 1] if instances > 0 else 0.0
        return given[-1] + (instances - len(given)) * self._more

    def needed(self, load: float) -> int:
        """Fewest instances that carry the load."""
        given = self._given
        if load <= 0:
            return 0
        if load <= given[-1]:
            return bisect_left(given, load) + 1
        more = ceil((load - given[-1]) / self._more)
        # A division may be off by one bit: settle it by what is carried.
        while self.of(len(given) + more - 1) >= load:
            more -= 1
        while self.of(len(given) + more) < load:
            more += 1
        return len(given) + more


def fewest(loads: Sequence[float], capacity: Capacity, eps: float) -> int:
    """Fewest instances that leave at most a share eps of the samples above what they carry."""
    ordered = sorted(loads)
    above = int(eps * len(ordered) + 1e-9)
    return capacity.needed(ordered[len(ordered) - 1 - above])


def cheapest(loads: Sequence[float], capacity: Capacity, loss_per_load: float, most: int) -> int:
    """The count up to `most` with the least of: its instances, and the mean load above what they carry at
    `loss_per_load`; the smallest of equals."""
    ordered = sorted(loads)
    sums = [0.0]
    for load in reversed(ordered):
        sums.append(sums[-1] + load)
    best, best_cost = 0, float("inf")
    for count in range(most + 1):
        carried = capacity.of(count)
        above = len(ordered) - bisect_right(ordered, carried)
        cost = count + loss_per_load * (sums[above] - above * carried) / len(ordered)
        if cost < best_cost - 1e-9 * abs(cost):
            best, best_cost = count, cost
    return best


class PosteriorScaling(Scaler):
    """As many instances as the posterior of the load calls for, from now until those started now would serve and the
    next decision is due."""

    name = "posterior-scaling"

    def __init__(self, options: PosteriorScalingOptions, seed: int = 0, estimator: LoadSamples | None = None) -> None:
        """`estimator`: samples of one's own instead of the file. Raises ConfigError for a file that cannot be read."""
        super().__init__(options, seed)
        self._rule = options
        if estimator is None and options.path is not None:
            estimator = read_posterior(options.path)
        self._samples = estimator
        self._capacity = Capacity(options.capacity_per_s)
        self._now_s = 0.0
        self._asked: tuple[float, int] | None = None

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """As every scaler; the time of the event is where the posterior is read."""
        self._now_s = event.at_ns / NS_PER_S + self._rule.offset_s
        return super().act(event, view)

    def wanted(self, now_s: float) -> int:
        """Instances that the load calls for at a time of the posterior. ConfigError beyond its end, or without one."""
        rule = self._rule
        if self._asked is not None and self._asked[0] == now_s:
            return self._asked[1]
        if self._samples is None:
            raise ConfigError(
                "posterior-scaling needs a posterior of the load.",
                "Give path=FILE, as `megalith forecast LOAD.csv --posterior FILE` writes it.",
            )
        loads = self._samples.peaks(now_s, now_s + rule.start_s + rule.period_s)
        if rule.point:
            loads = [sum(loads) / len(loads)]
        if rule.margin != 1.0:
            loads = [load * rule.margin for load in loads]
        if rule.by == "cost":
            count = cheapest(loads, self._capacity, rule.loss_per_load, rule.max_count)
        else:
            count = fewest(loads, self._capacity, rule.eps)
        self._asked = now_s, count
        return count

    def need(self, pool: Pool) -> int:
        """What is wanted less what serves and starts; fewer go one at a time."""
        return self.wanted(self._now_s) - len(pool.serving) - pool.starting


class TargetScalingOptions(ScalingOptions):
    """The proportional rule of horizontal pod autoscalers."""

    by: Literal["outstanding", "kv"] = "outstanding"
    """outstanding: unfinished requests of an instance. kv: share of the blocks that are held or waited for."""
    target: float = 4.0
    """What an instance should have."""
    tolerance: float = 0.1
    """Within this share of the target nothing changes; Kubernetes has 0.1."""
    period_s: float = 15.0
    """As in Kubernetes."""
    stabilise_s: float = 300.0
    """Fewer only down to the most that was wished for in the last so many seconds; Kubernetes has 300."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.target > 0, "target must be above 0")
        require(0 <= self.stabilise_s <= 1e6, "stabilise_s must lie between 0 and 1e6")
        require(0 <= self.tolerance < 1, "tolerance must be at least 0 and below 1")


class TargetScaling(Scaler):
    """count * figure / target, rounded up: reacts to what is there, by as many as it takes. What Kubernetes'
    HorizontalPodAutoscaler does, and a stronger baseline than one more at a time."""

    name = "target-scaling"

    def __init__(self, options: TargetScalingOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._rule = options
        self._now_ns = 0
        self._recent: dict[str, list[tuple[int, int]]] = {}

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """As every scaler; wishes are kept for the stabilisation window."""
        self._now_ns = event.at_ns
        return super().act(event, view)

    def need(self, pool: Pool) -> int:
        """More at once; fewer when the highest wish of the window is below what serves. What starts counts as there
        with nothing on it."""
        if not pool.serving:
            return 0
        rule, count = self._rule, len(pool.serving) + pool.starting
        if rule.by == "outstanding":
            total = float(sum([one.outstanding for one in pool.serving]))
        else:
            total = sum([1 - (one.free_blocks() - one.waiting_blocks()) / one.kv_blocks for one in pool.serving])
        wish = count if abs(total / (rule.target * count) - 1) <= rule.tolerance else ceil(total / rule.target)
        name = pool.serving[0].pool
        since = self._now_ns - round(rule.stabilise_s * NS_PER_S)
        recent = [(at, one) for at, one in self._recent.get(name, []) if at > since]
        self._recent[name] = [*recent, (self._now_ns, wish)]
        return max(one for _, one in self._recent[name]) - count
