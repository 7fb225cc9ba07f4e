"""simulate_rows(): rows of servers over weeks, several rows side by side, each under its own power policy.

Rows that run side by side share machine, kinds of requests and time, and differ in servers, policy, budget and rate;
those with the same seed have the same wandering of the load. One vector holds all their servers, so ten rows cost
little more than one. Every figure is simulated, at the fidelity `fluid`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.policy import registry
from megalith.sim.fluid import FluidServers, Machine
from megalith.sim.fluid_load import RowArrivals, in_steps
from megalith.sim.fluid_power import RowPower
from megalith.sim.power import PowerCounters
from megalith.specs.draws import Floats, Ints
from megalith.specs.fleet import PolicySpec, PowerSpec
from megalith.specs.row_load import RowLoad, rates

POOLS = ("low", "high")
"""Scopes for policies, by priority."""
_CHUNK_STEPS = 1800
_BIN = 2e-4
"""Width of a bin of stretches, as a share: percentiles are off by half of that at most."""
_BINS = 24_000
_FLUSH = 2_000


class RowSpec(Config, kw_only=True):
    """One row."""

    servers: int
    power: PowerSpec
    policy: PolicySpec | None = None
    """None: no controller and no brake, whatever the power is."""
    low_share: float = 0.5
    """Of the servers, those for low priority, to the nearest whole one."""
    rate_factor: float = 1.0
    """On the rate of the load."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.servers < 2 or not 0 < self.low_share < 1 or not self.rate_factor > 0:
            raise ConfigError(
                f"A row of {self.servers} servers, {self.low_share:g} of them low, at {self.rate_factor:g} of the load "
                "cannot be.",
                "Give at least 2 servers, a share between 0 and 1, and a factor above 0.",
            )

    @property
    def low(self) -> int:
        """Servers for low priority."""
        return min(max(1, round(self.servers * self.low_share)), self.servers - 1)


@dataclass(slots=True)
class RowResult:
    """What came of one row."""

    spec: RowSpec
    power_w: NDArray[np.float32]
    """Every telemetry sample."""
    counters: PowerCounters
    requests: int
    capped: dict[str, float]
    """By pool, the share of the time at less than the full clock."""
    peak_tokens: float
    """Most in the cache of any server."""
    prompt_share: float
    """Of the time of servers."""
    idle_share: float
    stretch: dict[str, Stretches] = field(default_factory=dict)
    """By kind of request, and by priority (`low`, `high`)."""

    @property
    def peak_share(self) -> float:
        """Highest sample over the budget."""
        return float(self.power_w.max()) / self.spec.power.budget_w

    @property
    def mean_share(self) -> float:
        """Mean power over the budget."""
        return float(self.power_w.mean(dtype=np.float64)) / self.spec.power.budget_w

    def rise(self, samples: int) -> float:
        """Largest rise of power over so many samples, as a share of the budget."""
        if len(self.power_w) <= samples:
            return 0.0
        return float((self.power_w[samples:] - self.power_w[:-samples]).max()) / self.spec.power.budget_w


@dataclass(frozen=True, slots=True)
class Stretches:
    """End-to-end times over those of the same request alone on a server at the full clock."""

    counts: Ints
    alone_s: float
    """Of one request; of several kinds, their mean."""

    @property
    def requests(self) -> int:
        """How many."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Stretch that this share of the requests is at or below. ConfigError without requests."""
        totals = np.cumsum(self.counts)
        if not len(totals) or not totals[-1]:
            raise ConfigError("No request ended, so there are no percentiles.", "Simulate longer.")
        place = share * totals[-1]
        cell = int(np.searchsorted(totals, place))
        before = totals[cell - 1] if cell else 0
        inside = (place - before) / max(1, self.counts[cell])
        return float(np.exp((cell + inside) * _BIN - 0.1))

    def __add__(self, other: Stretches) -> Stretches:
        mine, theirs = self.requests, other.requests
        mean = (self.alone_s * mine + other.alone_s * theirs) / max(1, mine + theirs)
        return Stretches(self.counts + other.counts, mean)


class _Tally:
    """Takes requests that end, by row and kind."""

    def __init__(self, row_of: Ints, rows: int, alone_s: Floats) -> None:
        self._row_of, self._alone_s, self._kinds = row_of, alone_s, len(alone_s)
        self.counts = np.zeros((rows * self._kinds, _BINS), dtype=np.int64)
        self._waiting: list[tuple[Ints, Ints, Floats]] = []

    def add(self, server: Ints, kind: Ints, e2e_s: Floats) -> None:
        """See Ends."""
        self._waiting.append((server, kind, e2e_s))
        if len(self._waiting) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Count what waits."""
        if self._waiting:
            server, kind, e2e_s = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            stretch = np.log(np.maximum(e2e_s / self._alone_s[kind], 1e-9)) + 0.1
            bins = np.clip((stretch / _BIN).astype(np.int64), 0, _BINS - 1)
            cell = (self._row_of[server] * self._kinds + kind) * _BINS + bins
            self.counts += np.bincount(cell, minlength=self.counts.size).reshape(self.counts.shape)


class _Rows:
    """A run under way."""

    def __init__(self, rows: Sequence[RowSpec], load: RowLoad, machine: Machine, step_s: float) -> None:
        self.rows, self.load, self.machine, self.step_s = rows, load, machine, step_s
        counts = [row.servers for row in rows]
        self.first = np.concatenate([[0], np.cumsum(counts)]).tolist()
        row_of = np.repeat(np.arange(len(rows)), counts)
        alone_s = np.array([machine.alone_s(kind) for kind in load.kinds])
        self.tally = _Tally(row_of, len(rows), alone_s)
        self.servers = FluidServers(machine, self.first[-1], step_s, self.tally)
        self.arrivals = [
            RowArrivals(load.kinds, row.low, row.servers - row.low, first, row.seed)
            for row, first in zip(rows, self.first[:-1], strict=True)
        ]
        self.powers = [
            RowPower(row.power, POOLS, None if row.policy is None else registry.controller(row.policy, row.seed))
            for row in rows
        ]
        self.controlled = [(row, self.powers[row]) for row, spec in enumerate(rows) if spec.policy is not None]
        self.samples: list[Floats] = []

    def chunk(self, first_step: int, wanted: dict[int, Floats]) -> None:
        """Some steps; `wanted` has the rates of each seed in them."""
        steps = next(iter(wanted.values())).shape[1]
        parts = [
            arrivals.take(wanted[row.seed] * row.rate_factor, first_step, self.step_s)
            for row, arrivals in zip(self.rows, self.arrivals, strict=True)
        ]
        at_s, server, kind, bounds = in_steps(parts, first_step, steps, self.step_s)
        servers, starts, step_ns = self.servers, self.first[:-1], round(self.step_s * NS_PER_S)
        for step in range(steps):
            now_s = (first_step + step) * self.step_s
            servers.step(now_s, at_s, server, kind, bounds[step])
            power_w = np.add.reduceat(servers.power_w, starts)
            self.samples.append(power_w)
            end_ns = (first_step + step + 1) * step_ns
            watts = power_w.tolist()
            for row, power in self.controlled:
                if power.sample(end_ns, watts[row]):
                    self._set_clocks(row, now_s + self.step_s)

    def _set_clocks(self, row: int, now_s: float) -> None:
        low = self.first[row] + self.rows[row].low
        edges = (self.first[row], low, self.first[row + 1])
        for pool, clock in enumerate(self.powers[row].clocks.values()):
            self.servers.set_clock(edges[pool], edges[pool + 1], clock, now_s)

    def result(self, row: int) -> RowResult:
        """What came of that row."""
        spec, kinds, steps = self.rows[row], self.load.kinds, len(self.samples)
        here = slice(self.first[row], self.first[row + 1])
        power_w = np.array([power[row] for power in self.samples], dtype=np.float32)
        counters = self.powers[row].counters
        if spec.policy is None:
            over = int((power_w > spec.power.budget_w).sum())
            counters = PowerCounters(samples=steps, violations=over, peak_w=float(power_w.max()))
        found = {
            kind.name: Stretches(self.tally.counts[row * len(kinds) + index], self.machine.alone_s(kind))
            for index, kind in enumerate(kinds)
        }
        for priority, pool in enumerate(POOLS):
            one, *more = [found[kind.name] for kind in kinds if kind.priority == priority]
            found[pool] = sum(more, one)
        requests = sum(found[kind.name].requests for kind in kinds)
        server_s = steps * self.step_s * spec.servers
        return RowResult(
            spec=spec, power_w=power_w, counters=counters, requests=requests,
            capped={pool: self.powers[row].slowed[pool] / steps for pool in POOLS},
            peak_tokens=float(self.servers.peak_tokens[here].max()),
            prompt_share=float(self.servers.prompt_s[here].sum()) / server_s,
            idle_share=float(self.servers.idle_s[here].sum()) / server_s, stretch=found,
        )  # fmt: skip


def simulate_rows(
    rows: Sequence[RowSpec],
    load: RowLoad,
    machine: Machine,
    duration_s: float,
    progress: Callable[[float], object] | None = None,
) -> list[RowResult]:
    """Run these rows side by side for so long, in steps of the telemetry; requests under way at the end do not count.

    `progress` is called with the share that is done. Raises ConfigError for rows that cannot run together.
    """
    steps_s = {row.power.telemetry_s for row in rows}
    if len(steps_s) != 1 or not rows:
        raise ConfigError(
            f"{len(rows)} rows with telemetry every {sorted(steps_s)} s cannot run side by side.",
            "Give at least one, and all the same telemetry.",
        )
    (step_s,) = steps_s
    steps = round(duration_s / step_s)
    if steps < 1 or duration_s == inf:
        raise ConfigError(f"{duration_s:g} s are no telemetry samples.", f"Simulate at least {step_s:g} s.")
    run = _Rows(rows, load, machine, step_s)
    # Every rate is needed from the beginning on: the wandering remembers.
    wandering = {seed: rates(load, seed, steps, step_s) for seed in {row.seed for row in rows}}
    for first in range(0, steps, _CHUNK_STEPS):
        last = min(steps, first + _CHUNK_STEPS)
        run.chunk(first, {seed: rate[:, first:last] for seed, rate in wandering.items()})
        if progress is not None:
            progress(last / steps)
    run.tally.flush()
    return [run.result(index) for index in range(len(rows))]


def without_control(row: RowSpec) -> RowSpec:
    """The same row with nobody at the clocks: what latencies are compared with."""
    return msgspec.structs.replace(row, policy=None)
