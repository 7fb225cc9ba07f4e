"""How many servers a row's power budget carries under a power policy: calibrated by what the row draws today.

A row of `budget_servers` provisioned servers draws at most `peak` of its budget in a week: that fixes the rate of
requests. Then rows with more servers, each with the same load on a server, are simulated side by side
(sim/fluid_row.py) under the policy and without one. A count holds when nothing brakes and latencies keep the limits
against the same row with nobody at the clocks. Every figure is simulated. Knows rows, budgets and limits; must not know
how they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost.timer_phases import POWER_EXPONENT
from megalith.sim.build import Builder
from megalith.sim.fluid import Machine
from megalith.sim.fluid_row import POOLS, RowResult, RowSpec, simulate_rows
from megalith.sim.scenario import Scenario
from megalith.specs import catalog
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec, PowerSpec
from megalith.specs.lengths import FixedLength
from megalith.specs.row_load import S_PER_DAY, WEEK_S, RowLoad
from megalith.specs.workload import WorkloadSpec

RATED_W = 6500.0
"""Of a DGX A100: its data sheet's most."""
OTHER_W = 3105.0
"""Beside eight devices at 400 W: what makes 97 % of the rated power, as training rows draw it at the peak (POLCA, as
accounts of it give it: devices are about half of a server)."""
_LADDER = tuple(1.3**power for power in range(-11, 5))
_NEAR = 0.04
_BUSY_HOURS = 3.0


class RowQuestion(Config, kw_only=True):
    """A row and what may run in it."""

    model: str = "bloom-176b"
    device: str = "a100-80gb"
    devices: int = 8
    """Of one server, tensor parallel."""
    timer: str = "splitwise:context_aware"
    rated_w: float = RATED_W
    """Provisioned for one server."""
    other_w: float = OTHER_W
    """What one draws beside its devices."""
    budget_servers: int = 40
    peak: float = 0.79
    """Of the budget, what so many servers draw at most in the calibrated week."""
    load: RowLoad = RowLoad(rate_per_server=0.1)
    """Its rate is only where the calibration begins."""
    telemetry_s: float = 2.0
    actuation_s: float = 40.0
    brake_s: float = 5.0
    low_share: float = 0.5
    exponent: float = POWER_EXPONENT
    """Of the clock in the power above idle."""

    def __post_init__(self) -> None:
        if self.budget_servers < 2 or not 0 < self.peak < 1 or not 0 <= self.other_w < self.rated_w:
            raise ConfigError(
                f"A budget for {self.budget_servers} servers of {self.rated_w:g} W ({self.other_w:g} W beside the "
                f"devices) of which {self.peak:.0%} are drawn cannot be.",
                "Give at least 2 servers, a peak between 0 and 1, and less beside the devices than in all.",
            )

    @property
    def budget_w(self) -> float:
        """Of the row."""
        return self.budget_servers * self.rated_w

    @property
    def machine(self) -> Machine:
        """One server. Raises ConfigError for names that do not exist and devices without power figures."""
        pool = PoolSpec(
            name="server", device=self.device, count=1, tensor_parallel=self.devices, kv_blocks=1 << 20,
        )  # fmt: skip
        load = WorkloadSpec(
            input=FixedLength(tokens=1), output=FixedLength(tokens=1), arrivals=PoissonArrivals(rate_per_s=1.0)
        )
        scenario = Scenario(model=self.model, fleet=FleetSpec(pools=(pool,)), workload=load, timer=self.timer)
        kind = Builder(scenario).kinds["server"]
        if kind.power is None:
            raise ConfigError(
                f"Nobody published what {self.device} draws in prompts and decodes by the timer {self.timer!r}.",
                "Use a model and device of splitwise-sim, with timer splitwise:context_aware.",
            )
        return Machine(kind.timer, self.devices, self.other_w, self.load.kinds, self.exponent)

    def row(self, servers: int, policy: PolicySpec | None, factor: float, seed: int = 0) -> RowSpec:
        """A row in this budget."""
        power = PowerSpec(
            budget_w=self.budget_w, telemetry_s=self.telemetry_s, actuation_s=self.actuation_s, brake_s=self.brake_s,
            other_w=self.other_w,
        )  # fmt: skip
        return RowSpec(
            servers=servers, power=power, policy=policy, low_share=self.low_share, rate_factor=factor, seed=seed
        )


class Limits(Config, kw_only=True):
    """What latencies may lose against the same row with nobody at the clocks: the SLO of POLCA as accounts give it."""

    high_p50: float = 0.01
    high_p99: float = 0.05
    low_p50: float = 0.05
    low_p99: float = 0.50


@dataclass(frozen=True, slots=True)
class Lost:
    """Latency of a row against the same row with nobody at the clocks, less 1."""

    high_p50: float
    high_p99: float
    low_p50: float
    low_p99: float

    def within(self, limits: Limits) -> bool:
        """Whether all limits hold."""
        return all(getattr(self, name) <= getattr(limits, name) for name in Limits.__struct_fields__)


@dataclass(frozen=True, slots=True)
class Headroom:
    """How many servers a policy carries in a budget."""

    policy: str
    budget_servers: int
    servers: int
    """Most without a brake and within the limits, of a run of counts that all hold."""
    without_brakes: int
    """Most without a brake, whatever latencies do."""
    peak_share: float
    """Of the budget, what `servers` draw at most."""

    @property
    def more(self) -> float:
        """Servers beyond the budget's, as a share."""
        return self.servers / self.budget_servers - 1.0

    @property
    def power_left(self) -> float:
        """Share of the budget that even the peak leaves."""
        return 1.0 - self.peak_share


def policy_for(question: RowQuestion, name: str, **options: object) -> PolicySpec:
    """A power policy with the pools of a row, and a hold that is at least the actuation time."""
    given: dict[str, object] = {"low": [POOLS[0]], "high": [POOLS[1]], **options}
    if name == "polca":
        given.setdefault("hold_s", max(question.actuation_s, question.telemetry_s))
    return PolicySpec(name=name, options=given)


def calibrate(question: RowQuestion, duration_s: float = WEEK_S, seed: int = 1000) -> float:
    """The factor on the load's rate at which `budget_servers` draw `peak` of the budget at most, in one drawn week.

    Two rounds of rows side by side, the second around what the first found; straight lines between them. Raises
    ConfigError when no rate does.
    """
    machine = question.machine
    coarse = list(_LADDER)
    first = _peaks(question, machine, coarse, min(duration_s, S_PER_DAY / 8), seed, busy=True)
    middle = _where(question, coarse, first)
    fine = [middle * (1 + _NEAR * step) for step in range(-9, 4)]
    return _where(question, fine, _peaks(question, machine, fine, duration_s, seed))


def lost(row: RowResult, free: RowResult) -> Lost:
    """What latencies of a row lost against those of the same row with nobody at the clocks."""
    found = {
        f"{pool}_p{percent}": row.stretch[pool].quantile(percent / 100) / free.stretch[pool].quantile(percent / 100) - 1
        for pool in POOLS
        for percent in (50, 99)
    }
    return Lost(**found)


def headroom(
    question: RowQuestion, policy: PolicySpec, factor: float, counts: Sequence[int] = (), limits: Limits | None = None,
    seed: int = 0, hours: float = _BUSY_HOURS,
) -> Headroom:  # fmt: skip
    """How many servers the budget carries under this policy, in some seconds: the busiest `hours` of a Tuesday.

    `factor` is what calibrate() found. All counts (by default the budget's up to 1.5 times as many, by two) run side by
    side. A week may hold a worse moment: `megalith plan power --servers` looks at one.
    """
    counts = sorted(counts) or range(question.budget_servers, round(1.5 * question.budget_servers) + 1, 2)
    limits = limits or Limits()
    load = _busy(question, hours)
    rows = [question.row(count, chosen, factor, seed) for chosen in (policy, None) for count in counts]
    results = simulate_rows(rows, load, question.machine, hours * 3600)
    held, unbraked, peak = 0, 0, 0.0
    both = zip(counts, results[: len(counts)], results[len(counts) :], strict=True)
    alive = fine = True
    for count, row, free in both:
        alive = alive and row.counters.brakes == 0
        fine = fine and alive and lost(row, free).within(limits)
        if alive:
            unbraked = count
        if fine:
            held, peak = count, row.peak_share
    return Headroom(policy.name, question.budget_servers, held, unbraked, peak)


def _busy(question: RowQuestion, hours: float = _BUSY_HOURS) -> RowLoad:
    hour = question.load.week.peak_hour
    return msgspec.structs.replace(question.load, start_s=S_PER_DAY + (hour - hours / 2) * 3600)


def _peaks(
    question: RowQuestion, machine: Machine, factors: Sequence[float], duration_s: float, seed: int, busy: bool = False
) -> list[float]:
    rows = [question.row(question.budget_servers, None, factor, seed) for factor in factors]
    load = _busy(question) if busy else question.load
    return [result.peak_share for result in simulate_rows(rows, load, machine, duration_s)]


def _where(question: RowQuestion, factors: Sequence[float], peaks: Sequence[float]) -> float:
    """The factor at which the peak is reached first; it rises with the load, but for luck."""
    rising = np.maximum.accumulate(np.array(peaks))
    if not rising[0] <= question.peak <= rising[-1]:
        raise ConfigError(
            f"{question.budget_servers} servers of {question.model} draw {rising[0]:.1%} to {rising[-1]:.1%} of "
            f"{question.budget_w:,.0f} W at most, at any rate that was tried: never {question.peak:.1%}.",
            "Name a peak in between, or other watts of a server.",
        )
    return float(np.interp(question.peak, rising, np.array(factors)))


def device_title(question: RowQuestion) -> str:
    """What the servers are, for people."""
    return f"{question.devices} x {catalog.device(question.device).name}"
