"""`plan placement`: how each phase is cut over devices and how many instances of each there are, after DistServe.

Zhong et al., OSDI 2024, section 4. High node affinity (algorithm 1): KV may go between nodes, so every (tensor,
pipeline) pair that fits is measured for each phase alone, the best of each is taken, and both are replicated until
their rates match: n = ceil(R / goodput). Low affinity (algorithm 2): the same stages of both phases share a node, so
whole units are measured, on as many instances as a node holds. The goodput of a unit is not above what either of its
phases does alone with the same instances, which says what need not be simulated. Either answer is compared with the
best fleet that does not split.

Knows goodput; must not know how it is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Literal

import msgspec

from megalith.base.errors import CapacityError, MegalithError
from megalith.plan.goodput import Goodput, GoodputQuestion, Phase, RateTrial, alone, goodput, hold
from megalith.plan.placement_question import COLOCATED, Affinity, Degrees, PlacementQuestion, Unit
from megalith.sim.build import Builder
from megalith.sim.processes import Crew, Failed, count_workers
from megalith.sim.scenario import Scenario

FORMAT = "megalith.plan-placement/1"
SLACK = 1.1
"""A unit may do this much better than its worse phase alone: prompts reach the decode side less bunched than they
arrive. Found by enumeration; see docs/studies.md."""
WAVE = 8
"""Units that are simulated at once; fixed, so that the answer does not depend on the machine."""
_MOST_REPAIRS = 8
_MOST_OF_A_PHASE = 16
"""Instances of one phase, where no rate was asked for and one of the other could feed more."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The goodput of something; simulated."""

    what: Literal["prefill", "decode", "unit", "prefill-first", "splitfuse"]
    title: str
    devices: int
    rate_per_s: float
    per_device_per_s: float
    breaks: str
    """The bound that fails first at the next rate."""


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The answer at one rate."""

    title: str
    unit: Unit
    """All its instances, as one."""
    units: int
    flags: str
    devices: int
    rate_per_s: float
    """What it serves: the rate that was asked for, or its goodput."""
    attained: float
    added: dict[str, int]
    """Instances beyond those that n = ceil(R / goodput) says, by phase: without them both phases together do not."""


class PlacementPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. Every figure is simulated."""

    format: str
    affinity: Affinity
    model: str
    device: str
    slo: str
    load: str
    fleet: Fleet
    ideal_per_device_per_s: float | None
    """High affinity: with as many instances of each phase as it takes to match their rates exactly."""
    colocated: Measured | None
    """The best instance that does both; None: none keeps the service level at any rate."""
    colocated_devices: int | None
    """That the rate of `fleet` would take."""
    gain: float | None
    """Goodput a device of the split over that of the best that does not split."""
    measured: list[Measured]
    passed: dict[str, str]
    """Degrees that were not measured, and why."""
    runs: int
    notes: list[str]
    timing: dict[str, str]

    @property
    def splits(self) -> bool:
        """Whether splitting pays."""
        return self.gain is None or self.gain > 1


def plan_placement(
    question: PlacementQuestion, workers: int | None = None, advance: Callable[[int], object] = lambda _: None
) -> PlacementPlan:
    """Search. Raises ConfigError for a question that cannot be, CapacityError when nothing keeps the service level."""
    with Crew(measure, count_workers(workers)) as crew:
        search = _Search(question, crew, advance)
        return search.high() if question.affinity == "high" else search.low()


def measure(question: GoodputQuestion) -> Goodput:
    """What a worker process does."""
    return goodput(question)


class _Search:
    """One question on its way to an answer."""

    def __init__(
        self,
        question: PlacementQuestion,
        crew: Crew[GoodputQuestion, Goodput],
        advance: Callable[[int], object],
    ) -> None:
        self.question, self.crew, self.advance = question, crew, advance
        self.measured: list[Measured] = []
        self.passed: dict[str, str] = {}
        self.timing: dict[str, str] = {}
        self.runs = 0
        self.fitting = [one for one in question.degrees() if self._fits(one)]
        if not self.fitting:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.passed.items())
            raise CapacityError(
                f"No instance of up to {question.most_devices} {question.device} holds {question.model} ({reasons}).",
                "Raise --max-devices, allow higher degrees, or take a larger device.",
            )

    # The two algorithms

    def high(self) -> PlacementPlan:
        """Each phase for itself, then as many of each as the rate takes."""
        question = self.question
        phases: tuple[Phase, ...] = ("prefill", "decode")
        best: list[tuple[Degrees, Goodput]] = []
        for phase in phases:
            cases = [alone(question.split(_pair(one)), phase) for one in self.fitting]
            found = self._goodputs(phase, [str(one) for one in self.fitting], cases)
            pairs = [(one, rate) for one, rate in zip(self.fitting, found, strict=True) if rate.rate_per_s > 0]
            if not pairs:
                raise self._hopeless(phase)
            best.append(max(pairs, key=lambda pair: (pair[1].per_device_per_s, -pair[0].devices)))
        (prefill, prompts), (decode, tokens) = best
        rates = sorted((prompts.rate_per_s, tokens.rate_per_s))
        rate = question.rate_per_s or min(rates[1], rates[0] * _MOST_OF_A_PHASE)
        unit = Unit(
            prefill=prefill, prefills=ceil(rate / prompts.rate_per_s),
            decode=decode, decodes=ceil(rate / tokens.rate_per_s),
        )  # fmt: skip
        if question.rate_per_s is None:
            (whole,) = self._goodputs("unit", [str(unit)], [question.split(unit)], rate)
            fleet = self._fleet(unit, 1, whole.rate_per_s, whole.attained, unit)
        else:
            fleet = self._repaired(unit, rate)
        shares = (prefill.devices / prompts.rate_per_s, decode.devices / tokens.rate_per_s)
        return self._plan(fleet, 1 / sum(shares))

    def low(self) -> PlacementPlan:
        """Units inside nodes, in the order of what their phases alone promise."""
        question = self.question
        units = list(question.units(self.fitting))
        if not units:
            raise CapacityError(
                f"No two instances of {question.model} fit on the {question.node_devices} devices of a node.",
                "Raise --node, or take --affinity high.",
            )
        promises = self._promises(units) if not question.exhaustive else dict.fromkeys(units, float("inf"))
        waiting = sorted(units, key=lambda unit: (-promises[unit] / unit.devices, unit.devices, str(unit)))
        best: tuple[Unit, Goodput] | None = None
        for begin in range(0, len(waiting), WAVE):
            least = 0.0 if best is None else best[1].per_device_per_s
            wave = [unit for unit in waiting[begin : begin + WAVE] if promises[unit] * SLACK / unit.devices > least]
            guesses = [promises[unit] for unit in wave]
            cases = [question.split(unit) for unit in wave]
            for unit, found in zip(wave, self._goodputs("unit", list(map(str, wave)), cases, *guesses), strict=True):
                if found.rate_per_s > 0 and (best is None or _rank(unit, found) > _rank(*best)):
                    best = unit, found
        if best is None:
            raise self._hopeless("unit")
        unit, whole = best
        count = 1 if question.rate_per_s is None else ceil(question.rate_per_s / whole.rate_per_s)
        return self._plan(self._fleet(unit, count, whole.rate_per_s * count, whole.attained, unit), None)

    # Parts

    def _promises(self, units: Sequence[Unit]) -> dict[Unit, float]:
        """By unit the goodput of its worse phase alone, with the same instances."""
        rates: dict[tuple[Phase, Degrees, int], float] = {}
        sides: dict[Phase, set[tuple[Degrees, int]]] = {
            "prefill": {(unit.prefill, unit.prefills) for unit in units},
            "decode": {(unit.decode, unit.decodes) for unit in units},
        }
        for phase, wanted in sides.items():
            ordered = sorted(wanted, key=lambda pair: (self.fitting.index(pair[0]), pair[1]))
            cases = [alone(self.question.split(_pair(degrees, count)), phase) for degrees, count in ordered]
            titles = [f"{count} x {degrees}" for degrees, count in ordered]
            for (degrees, count), found in zip(ordered, self._goodputs(phase, titles, cases), strict=True):
                rates[phase, degrees, count] = found.rate_per_s
        return {
            unit: min(rates["prefill", unit.prefill, unit.prefills], rates["decode", unit.decode, unit.decodes])
            for unit in units
        }

    def _repaired(self, formula: Unit, rate_per_s: float) -> Fleet:
        """The replicated fleet at the rate that was asked for, with an instance more where one phase falls short."""
        unit, trial = formula, None
        for _ in range(_MOST_REPAIRS + 1):
            trial = self._hold(unit, rate_per_s)
            if trial.kept:
                return self._fleet(unit, 1, rate_per_s, trial.attained, formula)
            worst = min(trial.shares, key=lambda bound: trial.shares[bound])
            field = "prefills" if worst.startswith("ttft") else "decodes"
            unit = msgspec.structs.replace(unit, **{field: getattr(unit, field) + 1})
        assert trial is not None
        raise CapacityError(
            f"{unit} still keeps {self.question.slo} for only {trial.attained:.0%} at {rate_per_s:g} requests/s.",
            "Ask without --rate for what the placement serves, or ease the service level.",
        )

    def _hold(self, unit: Unit, rate_per_s: float) -> RateTrial:
        question = self.question.asked(self.question.split(unit))
        trial = hold(question, rate_per_s)
        self.runs += 1
        self.advance(1)
        return trial

    def _fits(self, degrees: Degrees) -> bool:
        try:
            builder = Builder(self.question.split(_pair(degrees)))
        except MegalithError as error:
            self.passed[str(degrees)] = error.what
            return False
        self.timing |= {str(degrees): kind.timing for kind in builder.kinds.values()}
        return True

    def _goodputs(
        self, what: str, titles: Sequence[str], scenarios: Sequence[Scenario], *guesses: float
    ) -> list[Goodput]:
        """Of all of them, in their order. `guesses`: one for each, or none."""
        tasks = [
            self.question.asked(scenario, guesses[i] if i < len(guesses) and 0.01 <= guesses[i] < 1e6 else 1.0)
            for i, scenario in enumerate(scenarios)
        ]
        results: dict[int, Goodput] = {}
        for place, one in self.crew.results(tasks):
            if isinstance(one, Failed):
                raise MegalithError(f"The search for {what} {titles[place]} failed: {one}")
            results[place] = one
            self.runs += one.runs
            self.advance(one.runs)
        for place, title in enumerate(titles):
            one = results[place]
            row = Measured(
                what=what, title=title, devices=one.devices, rate_per_s=one.rate_per_s,  # type: ignore[arg-type]
                per_device_per_s=one.per_device_per_s, breaks=one.breaks,
            )  # fmt: skip
            self.measured.append(row)
        return [results[place] for place in range(len(tasks))]

    def _fleet(self, unit: Unit, units: int, rate_per_s: float, attained: float, formula: Unit) -> Fleet:
        whole = msgspec.structs.replace(unit, prefills=unit.prefills * units, decodes=unit.decodes * units)
        added = {"prefill": unit.prefills - formula.prefills, "decode": unit.decodes - formula.decodes}
        return Fleet(
            title=f"{units} x ({unit})" if units > 1 else str(unit), unit=whole, units=units,
            flags=self.question.flags(whole), devices=whole.devices, rate_per_s=rate_per_s, attained=attained,
            added={phase: more for phase, more in added.items() if more},
        )  # fmt: skip

    def _colocated(self) -> Measured | None:
        for policy, budget in COLOCATED:
            cases = [self.question.mixed(one, policy, budget) for one in self.fitting]
            self._goodputs(policy, [str(one) for one in self.fitting], cases)
        able = [one for one in self.measured if one.what in dict(COLOCATED) and one.rate_per_s > 0]
        return max(able, key=lambda one: (one.per_device_per_s, -one.devices), default=None)

    def _plan(self, fleet: Fleet, ideal: float | None) -> PlacementPlan:
        question, colocated = self.question, self._colocated()
        each = None if colocated is None else colocated.rate_per_s
        notes = ["Not searched: other batch policies and token budgets; replanning when the load drifts."]
        if question.timer in ("auto", "analytic", "operators") and max(question.pipeline_parallel) > 1:
            notes.append("Stages of a pipeline are even parts of a step; what they send on takes no time here.")
        return PlacementPlan(
            format=FORMAT, affinity=question.affinity, model=question.model, device=question.device,
            slo=str(question.slo), load=question.workload.name or "drawn", fleet=fleet, ideal_per_device_per_s=ideal,
            colocated=colocated,
            colocated_devices=None if colocated is None or each is None
            else ceil(fleet.rate_per_s / each) * colocated.devices,
            gain=None if colocated is None else fleet.rate_per_s / fleet.devices / colocated.per_device_per_s,
            measured=self.measured, passed=self.passed, runs=self.runs, notes=notes, timing=self.timing,
        )  # fmt: skip

    def _hopeless(self, what: str) -> CapacityError:
        bound = {"prefill": "ttft", "decode": "tpot"}.get(what, "")
        bounds = [str(one) for one in self.question.slo.bounds if not bound or one.metric == bound]
        return CapacityError(
            f"No {what} of up to {self.question.most_devices} {self.question.device} keeps {' and '.join(bounds)} for "
            f"{self.question.slo.attain:.0%} of the requests, at any rate down to 0.01 a second.",
            "Ease the limits, allow higher degrees, or leave out requests that do not fit the model's context "
            "(--trace NAME:max_total=2048).",
        )


def _pair(degrees: Degrees, count: int = 1) -> Unit:
    return Unit(prefill=degrees, prefills=count, decode=degrees, decodes=count)


def _rank(unit: Unit, found: Goodput) -> tuple[float, int]:
    return found.per_device_per_s, -unit.devices
