"""Goodput: the highest request rate that a fleet serves within its service level, by simulation, for any policies.

After DistServe (Zhong et al., OSDI 2024, section 2.2): at least 90 % of the requests within TTFT and TPOT at once, a
device. Rates lie on a fixed ladder of equal steps, so the answer is a rung: the highest of which it and every rung that
was tried below it keep the service level. The search takes for granted that a lower rate is easier, gallops from a
first guess and then halves, and stops each run as soon as the service level is lost. A run has so many requests that
none of its figures is an artefact of its beginning: a least number of them, and ten mean residence times.

Knows scenarios; must not know which policies are in them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log
from typing import Literal, TypeAlias

import msgspec

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost.timer_instant import INSTANT
from megalith.sim.build import Builder
from megalith.sim.run import Run
from megalith.sim.scenario import Scenario
from megalith.specs.fleet import FleetSpec, HandoffSpec
from megalith.specs.model import ModelSpec
from megalith.specs.slo import Slo
from megalith.specs.workload_rate import at_rate

Phase: TypeAlias = Literal["prefill", "decode"]
STEP = 1.02
LEAST_REQUESTS, RESIDENCES = 1_000, 10.0
LOWEST_PER_S, HIGHEST_PER_S = 1e-2, 1e6
"""Nothing is tried outside of it: below, the goodput is 0."""
_EVENTS_A_LOOK = 2_000
_FIRST_STEPS = 8
_FOREVER = 10**9
_ENDLESS_BLOCKS = 10**9


class GoodputQuestion(Config, kw_only=True):
    """A fleet under a load with a service level: the scenario's rate does not matter."""

    scenario: Scenario
    guess_per_s: float = 1.0
    step: float = STEP
    """From one rung of rates to the next: the answer is exact to this factor."""
    least_requests: int = LEAST_REQUESTS
    residences: float = RESIDENCES
    """A run lasts at least so many mean times of a request in it; 0 does without."""
    most_requests: int = 100_000
    spec: ModelSpec | None = None
    """Stands in for the catalogue's, as in `sim.build`."""

    def __post_init__(self) -> None:
        """ConfigError for a question without an answer."""
        if self.scenario.slo is None:
            raise ConfigError("Goodput counts requests within a service level, and there is none.",
                              "Give one, such as ttft=400ms,tpot=40ms.")  # fmt: skip
        if not 1.0005 <= self.step <= 2.0 or not LOWEST_PER_S <= self.guess_per_s <= HIGHEST_PER_S:
            raise ConfigError(
                f"Steps of {self.step:g} from {self.guess_per_s:g} requests a second cannot be searched.",
                f"Give a step of 1.0005 to 2 and a guess of {LOWEST_PER_S:g} to {HIGHEST_PER_S:g}.",
            )
        if self.least_requests < 1 or self.most_requests < self.least_requests or self.residences < 0:
            raise ConfigError("A run needs a request.", "Give at least 1, most_requests no less, residences from 0.")

    @property
    def devices(self) -> int:
        """Of the whole fleet, without a side that takes no time."""
        return sum(pool.devices for pool in self.scenario.fleet.pools if pool.timer != INSTANT)


class RateTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One run; simulated."""

    rate_per_s: float
    requests: int
    """That ended."""
    kept: bool
    attained: float
    shares: dict[str, float]
    """By bound, of the requests."""
    residence_s: float
    """Mean time of a finished request in the system."""
    residences: float
    """Mean times of a request that arrivals went on for."""
    stopped_early: bool


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; simulated."""

    rate_per_s: float
    """0: no rate keeps the service level."""
    devices: int
    broken_per_s: float | None
    """The next rung, which does not keep it; None: it was kept at the highest rate of all."""
    breaks: str
    """The bound that the fewest requests keep there."""
    attained: float
    """At the goodput."""
    residences: float
    runs: int
    requests: int
    """Simulated in all runs together."""

    @property
    def per_device_per_s(self) -> float:
        """Requests a second and device."""
        return self.rate_per_s / self.devices


def highest(keeps: Callable[[int], bool], start: int, low: int, high: int) -> int | None:
    """The highest rung of `low`..`high` that `keeps`, given that all below a kept one do; None where none does.

    Gallops from `start`, then halves: it asks O(log) times, and never twice for the same rung.
    """
    start = min(max(start, low), high)
    step = _FIRST_STEPS
    if keeps(start):
        kept, broken = start, high + 1
        while kept < high:
            following = min(kept + step, high)
            if not keeps(following):
                broken = following
                break
            kept, step = following, step * 2
    else:
        kept, broken = low - 1, start
        while broken > low:
            following = max(broken - step, low)
            if keeps(following):
                kept = following
                break
            broken, step = following, step * 2
    while broken - kept > 1:
        middle = (kept + broken) // 2
        kept, broken = (middle, broken) if keeps(middle) else (kept, middle)
    return None if kept < low else kept


def goodput(question: GoodputQuestion, progress: Callable[[int], object] = lambda _: None) -> Goodput:
    """Search. `progress(1)` is called after every run. Raises ConfigError or DoesNotFit on what cannot be run."""
    search = _Search(question, progress)
    rungs = [round(log(rate) / log(question.step)) for rate in (question.guess_per_s, LOWEST_PER_S, HIGHEST_PER_S)]
    found = highest(search.keeps, *rungs)
    kept = None if found is None else search.tried[found]
    above = search.tried.get(rungs[1] if found is None else found + 1)
    return Goodput(
        rate_per_s=0.0 if kept is None else kept.rate_per_s,
        devices=question.devices,
        broken_per_s=None if above is None else above.rate_per_s,
        breaks="" if above is None or not above.shares else min(above.shares, key=lambda name: above.shares[name]),
        attained=0.0 if kept is None else kept.attained,
        residences=0.0 if kept is None else kept.residences,
        runs=search.runs,
        requests=search.requests,
    )


def hold(question: GoodputQuestion, rate_per_s: float, progress: Callable[[int], object] = lambda _: None) -> RateTrial:
    """Whether the fleet holds one rate, in a run as long as those of `goodput`."""
    return _Search(question, progress).at(rate_per_s)


class _Search:
    """Runs at rungs, and what they taught of how long a request stays."""

    def __init__(self, question: GoodputQuestion, progress: Callable[[int], object]) -> None:
        self.question, self.progress = question, progress
        self.tried: dict[int, RateTrial] = {}
        self.runs = self.requests = 0
        self._residence_s = 0.0

    def keeps(self, rung: int) -> bool:
        """Whether the service level is kept there."""
        trial = self.tried[rung] = self.at(self.question.step**rung)
        return trial.kept

    def at(self, rate_per_s: float) -> RateTrial:
        """A run that is long enough to tell."""
        requests = self._enough(rate_per_s)
        while True:
            trial = try_rate(self.question.scenario, rate_per_s, requests, self.question.spec)
            self.runs += 1
            self.requests += trial.requests
            self.progress(1)
            if not trial.kept:
                return trial
            self._residence_s = trial.residence_s
            wanted = self._enough(rate_per_s)
            if trial.residences >= self.question.residences or wanted <= requests:
                return trial
            requests = wanted

    def _enough(self, rate_per_s: float) -> int:
        # A tenth more, for arrivals are drawn.
        wanted = ceil(self.question.residences * self._residence_s * rate_per_s * 1.1)
        return min(max(wanted, self.question.least_requests), self.question.most_requests)


def try_rate(scenario: Scenario, rate_per_s: float, requests: int, spec: ModelSpec | None = None) -> RateTrial:
    """One run at that rate, given up as soon as its service level is lost."""
    workload = msgspec.structs.replace(at_rate(scenario.workload, rate_per_s), requests=requests)
    changed = msgspec.structs.replace(scenario, workload=workload, sample_s=0.0)
    run = Run(changed, Builder(changed, spec), stop=lambda recorder, _: recorder.lost(requests))
    while run.advance(_EVENTS_A_LOOK):
        pass
    result = run.result()
    slo = result.figures.slo
    assert slo is not None
    e2e = result.figures.latencies.get("e2e_ns")
    residence_s = 0.0 if e2e is None else e2e.mean / NS_PER_S
    return RateTrial(
        rate_per_s=rate_per_s,
        requests=result.requests,
        kept=slo.kept and not result.stopped_early,
        attained=slo.attainment,
        shares=slo.shares,
        residence_s=residence_s,
        residences=result.requests / rate_per_s / residence_s if residence_s else 0.0,
        stopped_early=result.stopped_early,
    )


def alone(scenario: Scenario, phase: Phase) -> Scenario:
    """One phase of a split fleet by itself, under its own bounds: the other one takes no time and has no end of room.

    Prefill instances then give one token a request and know no decode side; decode instances get each request as it
    arrives, by the fleet's hand-off over the fleet's link, whose ports are not shared on the side that takes no time.
    Raises ConfigError where there is nothing of that role, or no bound on it.
    """
    fleet = scenario.fleet
    pools = tuple(pool for pool in fleet.pools if pool.role == phase)
    metric = "ttft" if phase == "prefill" else "tpot"
    slo = scenario.slo and [bound for bound in scenario.slo.bounds if bound.metric == metric]
    if not pools or not slo:
        raise ConfigError(
            f"{phase} cannot be measured alone: "
            + (f"the service level has no bound on {metric}." if pools else "the fleet has no pool of that role."),
            "Give a fleet with prefill and decode pools and a service level like ttft=400ms,tpot=40ms.",
        )
    if phase == "prefill":
        pools = tuple(msgspec.structs.replace(pool, role="mixed") for pool in pools)
        changed = msgspec.structs.replace(fleet, pools=pools)
        workload = msgspec.structs.replace(scenario.workload, max_output_tokens=1)
    else:
        changed, workload = _decode_only(fleet, pools[0].name), scenario.workload
    assert scenario.slo is not None
    level = Slo(bounds=tuple(slo), attain=scenario.slo.attain)
    return msgspec.structs.replace(scenario, fleet=changed, workload=workload, slo=level)


def _decode_only(fleet: FleetSpec, name: str) -> FleetSpec:
    decodes = tuple(pool for pool in fleet.pools if pool.role == "decode")
    first = msgspec.structs.replace(
        decodes[0], name=f"{name}-source", role="prefill", count=1, timer=INSTANT, kv_blocks=_ENDLESS_BLOCKS,
        tensor_parallel=1, pipeline_parallel=1, policy="prefill-first", watermark=0.0,
    )  # fmt: skip
    handoff = msgspec.structs.replace(fleet.handoff, refused="wait", max_waiting=_FOREVER, max_wait_s=float(_FOREVER))
    assert isinstance(handoff, HandoffSpec)
    link = msgspec.structs.replace(fleet.link, contention=False)
    return msgspec.structs.replace(fleet, pools=(first, *decodes), handoff=handoff, link=link)
