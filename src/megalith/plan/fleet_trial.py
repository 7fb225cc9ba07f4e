"""One simulated run of one candidate fleet, stopped as soon as its service level is lost, and the search for the
smallest fleet of a kind by such runs.

Knows how to run and what to read from a result; must not know which kinds compete.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from megalith.base.config import Config
from megalith.base.units import NS_PER_S
from megalith.plan.fleet_bounds import percent_of
from megalith.plan.fleet_question import FleetQuestion, Shape, Size
from megalith.sim.run import Run, SimResult
from megalith.specs.fleet import FaultSpec, PowerSpec
from megalith.specs.workload_rate import at_rate

_EVENTS_A_LOOK = 5_000
_SPLITS = 3
_SPLITS_OF_FEW = 4
"""Fleets of so many instances are tried with every split."""
_FULL_SHARE = 0.97


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one fleet under one load; simulated."""

    instances: int
    prefill: int
    """Of them, those that do prompts only."""
    rate_per_s: float
    requests: int
    stopped_early: bool
    kept: bool
    binding: str | None
    margin: float | None
    """Of the binding bound, as a share of its limit."""
    attained: float
    shares: dict[str, float]
    figures_ns: dict[str, int | None]
    """By bound on requests: the figure at the share that must keep it, over the requests that finished."""
    ratios: dict[str, float | None]
    """By promise: the figure at the share that must keep it, as a multiple of its limit."""
    used: dict[str, float | None]
    """The same by bound, each by itself; None where too few finished for a figure."""
    output_tokens_per_s: float
    busy_share: float | None
    kv_peak_share: float
    preemptions: int
    power_w: float | None
    """Mean of the whole fleet."""
    peak_power_w: float | None
    """Highest sample of it."""
    mean_instances: float
    """Over the run: paid for, so starting and draining ones too."""
    e2e_p50_ns: int | None
    brakes: int = 0
    """Of the power domain, where it has a budget."""
    row_peak_w: float | None = None
    """Highest sample of the domain, with what stands beside the devices."""

    @property
    def size(self) -> Size:
        """Its size."""
        return Size(self.instances, self.prefill)

    @property
    def tightest(self) -> str:
        """The bound with the least room."""
        rooms = {bound: float("inf") if used is None else used for bound, used in self.used.items()}
        return max(rooms, key=lambda bound: rooms[bound]) if rooms else str(self.binding)

    @property
    def breaks(self) -> str:
        """The bound that the fewest requests keep, or the one with the least margin."""
        return min(self.shares, key=lambda bound: self.shares[bound]) if self.shares else str(self.binding)


class Probe(Config, kw_only=True):
    """One run."""

    question: FleetQuestion
    shape: Shape
    size: Size
    rate_per_s: float
    times_rate: float = 1.0
    early: bool = True
    """Stop when the service level is lost."""
    slower: float = 1.0
    """Every step takes this many times as long as the cost model says."""
    seed: int | None = None
    """Other requests than those of the question, where they are drawn."""
    budget_w: float | None = None
    """The whole fleet is one power domain with this budget."""


class Settle(Config, kw_only=True):
    """A search for the smallest fleet of a kind: `start` is tried first, sizes from `least` to `most` are allowed."""

    question: FleetQuestion
    shape: Shape
    rate_per_s: float
    start: int
    least: int
    most: int
    prefill_share: float = 0.0
    least_prefill: int = 1
    least_decode: int = 1


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found."""

    found: Trial | None
    below: Trial | None
    """The largest fleet that was tried and does not keep the service level."""
    runs: int


def probe(task: Probe) -> Trial:
    """Run one fleet."""
    question = task.question
    workload = question.workload
    if task.times_rate != 1.0:
        workload = at_rate(workload, task.rate_per_s * task.times_rate)
    fleet = task.shape.fleet(task.size)
    if task.slower != 1.0:
        fleet = replace(fleet, faults=FaultSpec(straggler_share=1.0, straggler_factor=task.slower))
    if task.budget_w is not None:
        beside_w = question.beside_w * task.shape.devices
        fleet = replace(fleet, power=PowerSpec(budget_w=task.budget_w, other_w=beside_w))
    seed = question.seed if task.seed is None else task.seed
    scenario = question.scenario(fleet, workload=workload, seed=seed)
    total = workload.requests or 0
    run = Run(scenario, stop=(lambda recorder, _: recorder.lost(total)) if task.early else None)
    while run.advance(_EVENTS_A_LOOK):
        pass
    return _trial(task, run.result())


def _trial(task: Probe, result: SimResult) -> Trial:
    figures, slo = result.figures, result.figures.slo
    assert slo is not None
    times = result.series.cluster()["time_ns"]
    power_w = result.series.energy_j * NS_PER_S / float(times[-1]) if len(times) else float("nan")
    ratios = {verdict.bound: verdict.observed for verdict in slo.verdicts}
    found: dict[str, int | None] = {}
    used: dict[str, float | None] = {}
    for bound in task.question.slo.bounds:
        samples = result.samples.get(f"{bound.metric}_ns")
        figure = None
        if samples is not None:
            at = percent_of(bound, task.question.slo)
            figure = found[str(bound)] = samples.percentile(at) if samples.count else None
        if figure is not None and bound.limit_ns is not None:
            used[str(bound)] = figure / bound.limit_ns
        elif bound.percent is not None:
            used[str(bound)] = ratios.get(str(bound))
    return Trial(
        instances=task.size.instances,
        prefill=task.size.prefill,
        rate_per_s=task.rate_per_s * task.times_rate,
        requests=result.requests,
        stopped_early=result.stopped_early,
        kept=slo.kept and not result.stopped_early,
        binding=slo.binding,
        margin=slo.margin,
        attained=slo.attainment,
        shares=slo.shares,
        figures_ns=found,
        ratios=ratios,
        used=used,
        output_tokens_per_s=figures.steady.output_tokens_per_s,
        busy_share=result.series.mean("busy_share"),
        kv_peak_share=result.series.peak_used_share,
        preemptions=figures.preemptions,
        power_w=power_w if power_w == power_w else None,
        peak_power_w=result.series.peak_power_w if power_w == power_w else None,
        mean_instances=result.instance_hours * 3600 * NS_PER_S / max(result.end_ns, 1),
        e2e_p50_ns=ends.percentile(50.0) if (ends := result.samples.get("e2e_ns")) and ends.count else None,
        brakes=0 if result.power is None else result.power.brakes,
        row_peak_w=None if result.power is None else result.power.peak_w,
    )


def settle(task: Settle) -> Settled:
    """Gallop from `start` up or down until the service level changes sides, then halve.

    Takes for granted that a larger fleet of a kind keeps what a smaller one keeps.
    """
    runs = 0
    tried: dict[int, Trial] = {}

    def kept(instances: int) -> bool:
        nonlocal runs
        best: Trial | None = None
        for size in _sizes(task, instances):
            trial = probe(Probe(question=task.question, shape=task.shape, size=size, rate_per_s=task.rate_per_s))
            runs += 1
            if best is None or (trial.kept, trial.attained) > (best.kept, best.attained):
                best = trial
            if trial.kept:
                break
        if best is None:
            return False
        tried[instances] = best
        return best.kept

    low, high = _bracket(task, kept)
    while high is not None and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return Settled(found=None if high is None else tried[high], below=tried.get(low), runs=runs)


def _bracket(task: Settle, kept: object) -> tuple[int, int | None]:
    """(largest size known to fail, smallest known to do, if any)."""
    assert callable(kept)
    start = min(max(task.start, task.least), task.most)
    step = 1
    if kept(start):
        low, high = task.least - 1, start
        while high - step > low:
            if not kept(high - step):
                return high - step, high
            high -= step
            step *= 2
        return low, high
    low = start
    while low < task.most:
        following = min(low + step, task.most)
        if kept(following):
            return low, following
        low = following
        step *= 2
    return low, None


def _sizes(task: Settle, instances: int) -> list[Size]:
    most = instances if instances <= _SPLITS_OF_FEW else _SPLITS
    sizes = task.shape.sizes(instances, task.prefill_share, instances)
    allowed = [
        size
        for size in sizes
        if not size.prefill or (size.prefill >= task.least_prefill and size.decode >= task.least_decode)
    ]
    return allowed[:most]


def perform(task: Probe | Settle) -> Trial | Settled:
    """What a worker process does."""
    return probe(task) if isinstance(task, Probe) else settle(task)


def scarce(trial: Trial, bound: str, fallback: str) -> str:
    """The resource that a fleet is short of when a bound is about to break, from what a run showed."""
    if trial.preemptions or trial.kv_peak_share >= _FULL_SHARE:
        return f"KV memory (full to {trial.kv_peak_share:.0%}, {trial.preemptions:,} preemptions)"
    metric = bound.partition("=")[0]
    if metric in ("tpot", "itl"):
        return "decode speed: too many requests and prompt chunks share a step"
    if metric == "ttft" and trial.busy_share is not None:
        return f"prompt compute (instances are in a step {trial.busy_share:.0%} of the time)"
    return fallback
