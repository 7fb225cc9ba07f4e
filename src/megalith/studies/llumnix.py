"""Llumnix: live migration of running requests between instances, against dispatch by the same load figure alone.

Sixteen instances of LLaMA-7B on A10 under power-law lengths, swept over the rate; one request moved at several lengths;
a fleet that scales itself. "Prefill latency" in Llumnix's words is the time from arrival to the first token.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean, median

import msgspec

from megalith.base.config import Config
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Command, Event, Migrate, MigrationMode, View
from megalith.report.table import Column, Table
from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult, summarise
from megalith.specs import catalog
from megalith.specs.arrivals import GammaArrivals, PoissonArrivals
from megalith.specs.fleet import FleetSpec, LinkSpec, MigrationSpec, PolicySpec, PoolSpec
from megalith.specs.lengths import FixedLength
from megalith.specs.workload import WorkloadSpec
from megalith.specs.workload_catalog import workloads
from megalith.studies.results import Results, read
from megalith.studies.study import Arm, Case, Claim, Experiment, Finding, Gate, Judgement, Picture, Simulated, Study

INSTANCES, KV_BLOCKS, BLOCK_TOKENS = 16, 851, 16
THRESHOLD, SCALING_THRESHOLD = 10.0, 3.0
"""T of the published runs with these lengths, and of those that scale."""
COPY_BYTES_PER_S, STAGE_S = 2.58e9, 0.016
"""Straight line through the published blocking copies (256 to 8,192 tokens of 0.5 MiB: 68 to 1,682 ms): 0.2 ms a token
and 16 ms beside. Downtime, the claim, is not fitted."""
STAGES: dict[str, float] = {"max_stages": 2, "last_blocks": 0}
"""As in the artifact: everything complete, then what is new since."""
RATES = (8.0, 8.5, 9.0, 9.5, 10.0, 10.5, 11.0, 11.5, 12.0, 13.0)
TOKENS = (256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
FREENESS = (5.0, 10.0, 25.0, 45.0, 65.0, 85.0)
"""T of the published runs that scale, and 10."""
OLD_S = 1.0
"""The published dispatcher learns of an instance once a step: what was there as the step began. An assumption."""
KEEPS_UP_S = 10.0
"""A fleet with a longer P99 to the first token is overloaded: then migration has nowhere to move to."""
_UNLOADED = f"while P99 without migration is below {KEEPS_UP_S:g} s"
EQUAL_P99_S = 5.0
"""The published saving is read at this P99 of the time to the first token."""

ON = Arm("llumnix", "on", "with migration")
OFF = Arm("dispatch-only", "off", "dispatch by freeness only")
LIVE = Arm("live", "on", "live, in stages")
BLOCKING = Arm("blocking", "off", "blocking copy")


class MoveOnceOptions(Config):
    """When and how."""

    every_s: float = 0.05
    mode: MigrationMode = "live"
    max_stages: int = 2
    last_blocks: int = 0


class MoveOnce:
    """A controller that moves the first request that decodes to the other instance, once."""

    name = "move-once"
    listens = frozenset({"tick"})
    Options = MoveOnceOptions

    def __init__(self, options: MoveOnceOptions, seed: int = 0) -> None:  # noqa: ARG002
        self.options = options
        self.period_ns: int | None = round(options.every_s * NS_PER_S)
        self._done = False

    def act(self, event: Event, view: View) -> Iterable[Command]:  # noqa: ARG002
        """One Migrate, on the first tick on which somebody decodes."""
        for instance in () if self._done else view.instances:
            for request in instance.requests():
                if request.decoding:
                    self._done = True
                    target = next(other.id for other in view.instances if other.id != instance.id)
                    options = self.options
                    order = options.mode, options.max_stages, options.last_blocks
                    return [Migrate(request.id, instance.id, target, *order)]
        return []


def measure(point: Point) -> PointResult:
    """A plain run's figures, and those of migrations. The model's context is what the KV cache holds, as published."""
    spec = msgspec.structs.replace(catalog.model(point.scenario.model), max_context=KV_BLOCKS * BLOCK_TOKENS)
    result = simulate(point.scenario, spec)
    moves = result.migrations
    figures: dict[str, float | None] = {
        "moves": float(moves.done),
        "moves_aborted": float(moves.aborted),
        "downtime_s": moves.downtime_ns / moves.done / NS_PER_S if moves.done else None,
        "instance_hours": result.instance_hours,
        "mean_instances": result.instance_hours * 3600 * NS_PER_S / result.end_ns,
    }
    return msgspec.structs.replace(summarise(point, result), figures=figures)


def task_of(scenario: Scenario) -> Simulated:
    """A point with the figures of `measure`."""
    return Simulated(scenario=scenario, measure=f"{__name__}:measure")


def scenario_of(fleet: FleetSpec, load: WorkloadSpec, seed: int) -> Scenario:
    """LLaMA-7B under that load."""
    return Scenario(model="llama-2-7b", timer="llumnix-7b", fleet=fleet, workload=load, seed=seed, sample_s=0)


def pool_of(count: int = INSTANCES, max_count: int | None = None, start_s: float = 0.0) -> PoolSpec:
    """Instances on A10 as published."""
    return PoolSpec(
        name="all", device="a10g", count=count, policy="prefill-first", token_budget=12_800, kv_blocks=KV_BLOCKS,
        block_tokens=BLOCK_TOKENS, prefix_cache=False, max_count=max_count, start_s=start_s,
    )  # fmt: skip


def fleet_of(arm: str, pool: PoolSpec, *more: PolicySpec) -> FleetSpec:
    """Dispatch by freeness; with migration in the arm that is on; with further controllers."""
    threshold = SCALING_THRESHOLD if more else THRESHOLD
    rebalance = PolicySpec(name="rebalance", options={"threshold": threshold, "period_s": 0.1, **STAGES})
    return FleetSpec(
        pools=(pool,),
        router=PolicySpec(name="freeness"),
        controllers=((rebalance,) if arm == ON.name else ()) + more,
        link=LinkSpec(bytes_per_s=COPY_BYTES_PER_S),
        migration=MigrationSpec(stage_s=STAGE_S, slowdown=1.01),
    )


def _rate(case: Case) -> Simulated:
    arrivals, requests = PoissonArrivals(rate_per_s=case.at), 8000 if case.fast else 10_000
    load = msgspec.structs.replace(workloads()["llumnix-m"].spec, arrivals=arrivals, requests=requests)
    return task_of(scenario_of(fleet_of(case.arm, pool_of()), load, case.seed))


def _move(case: Case) -> Simulated:
    load = WorkloadSpec(
        name=f"one request of {case.at:g} tokens", input=FixedLength(tokens=int(case.at)),
        output=FixedLength(tokens=400), arrivals=PoissonArrivals(rate_per_s=10.0), requests=1,
    )  # fmt: skip
    once = PolicySpec(name=f"{__name__}:MoveOnce", options={"mode": case.arm, **STAGES})
    return task_of(scenario_of(fleet_of("", pool_of(2), once), load, case.seed))


def bursts(case: Case) -> WorkloadSpec:
    """Long lengths in bursts: what fleets that scale are run under."""
    arrivals, requests = GammaArrivals(rate_per_s=2.0, cv=2.0), 500 if case.fast else 2500
    return msgspec.structs.replace(workloads()["llumnix-l"].spec, arrivals=arrivals, requests=requests)


def scaling(case: Case, heartbeat_s: float = 0.0, victim: str = "fewest") -> Simulated:
    """A fleet that starts more instances below a mean freeness of `case.at`."""
    options: dict[str, float | str] = {"up_below": case.at, "down_above": case.at + 50, "victim": victim}
    pool = pool_of(INSTANCES // 2, INSTANCES, 10.0)
    fleet = fleet_of(case.arm, pool, PolicySpec(name="freeness-scaling", options=options))
    return task_of(scenario_of(msgspec.structs.replace(fleet, heartbeat_s=heartbeat_s), bursts(case), case.seed))


def _scaling_artifact(case: Case) -> Simulated:
    return scaling(case, OLD_S, "last")


def judge(results: Results) -> Judgement:
    """The largest ratio of each seed's sweep, downtime by length, preemptions, the cost of a fleet that scales."""
    ratios = {title: results.ratio("rate", OFF.name, ON.name, figure) for _, title, figure in _GAINS}
    seeds = results.by_seed("rate", OFF.name, ON.name, "ttft_ns.p99")
    lines = {f"seed {seed}": {at: [value] for at, value in curve.items()} for seed, curve in seeds.items()}
    pause, copy = (results.middle("downtime", arm.name, "downtime_s", TOKENS[-1]) for arm in (LIVE, BLOCKING))
    claim = STUDY.claim
    before, after = _preempted(results)
    findings = [
        *(_gain(results, claim(key), figure) for key, _, figure in _GAINS[:3]),
        Finding(
            claim("preemptions"), _change(before, after), f"{after:,.0f}", f"{before:,.0f}", "rates up to the knee"
        ),
        Finding(claim("downtime"), copy / pause if copy and pause else None, _ms(pause), _ms(copy)),
    ]
    if not results.fast:
        findings += [_cost(results, "scaling"), _cost(results, "scaling-artifact", _ARTIFACT, False)]
    pictures = [
        Picture("knee", "Prefill P99, dispatch only over migration", "requests/s", ratios=lines,
                ylabel="times lower with migration", claim=("published", 14.8)),
        Picture("ratios", "Dispatch only over migration, median and range of seeds", "requests/s", ratios=ratios,
                ylabel="times lower with migration"),
        Picture("latency", "Time to first token", "requests/s",
                panels={f"TTFT {name}, s": _both(results, "rate", f"ttft_ns.{name}") for name in ("mean", "p99")}),
        Picture("downtime", "Pause of the request that moves", "tokens",
                panels={"s": {a.title: results.curve("downtime", a.name, "downtime_s") for a in (LIVE, BLOCKING)}}),
        Picture("cost", "A fleet that scales itself, by its threshold", "mean freeness to start more",
                logarithmic=False,
                panels={"instance hours": _both(results, "scaling", "instance_hours"),
                        "TTFT P99, s": _both(results, "scaling", "ttft_ns.p99"),
                        "TTFT P99, s, as the artifact": _both(results, "scaling-artifact", "ttft_ns.p99")}),
    ]  # fmt: skip
    return Judgement(findings, _gates(results), {"seeds": _by_seed(results)}, pictures)


def _gates(results: Results) -> list[Gate]:
    pauses, copies = (results.curve("downtime", arm.name, "downtime_s") for arm in (LIVE, BLOCKING))
    largest = _best(results, "ttft_ns.p99")
    gates = [
        Gate("prefill P99 ratio, largest over the sweep, mean of seeds", largest, 5.0, float("inf"), "published 14.8"),
        Gate("downtime, longest over shortest, 256 to 8,192 tokens", _growth(pauses), 1.0, 2.0, "constant"),
        Gate("blocking copy, 8,192 over 256 tokens", _growth(copies), 20.0, 30.0, "published 24.7"),
    ]
    if results.fast:
        return gates
    low, high = (results.middle_ratio("rate", OFF.name, ON.name, "ttft_ns.p99", at) for at in (RATES[0], RATES[-1]))
    return [
        *gates,
        Gate(f"prefill P99 ratio at {RATES[0]:g}/s: nothing to gain", low, 0.9, 1.1, "low load: 1.0"),
        Gate(f"prefill P99 ratio at {RATES[-1]:g}/s: nobody has room", high, 0.8, 3.0, "overload: 1 to 2"),
        Gate(f"preemptions, change, {_UNLOADED}", _change(*_preempted(results)), -1.0, -0.5, "published -70 %"),
    ]  # fmt: skip


def _knees(results: Results, figure: str) -> dict[int, tuple[float, float]]:
    """By seed: where the ratio is largest, and that ratio. Every sequence of requests has its own knee."""
    curves = results.by_seed("rate", OFF.name, ON.name, figure)
    return {seed: max(curve.items(), key=lambda point: (point[1], -point[0])) for seed, curve in curves.items()}


def _best(results: Results, figure: str) -> float | None:
    knees = _knees(results, figure)
    return mean(ratio for _, ratio in knees.values()) if knees else None


def _gain(results: Results, claim: Claim, figure: str) -> Finding:
    """Each seed at its own largest ratio; the figures of both arms are medians of these."""
    sides: dict[str, list[float]] = {ON.name: [], OFF.name: []}
    knees = _knees(results, figure)
    for seed, (at, _) in knees.items():
        for arm, values in sides.items():
            result = results.get("rate", Case(arm, at, seed, results.fast))
            value = None if result is None else read(result, figure)
            if value is not None:
                values.append(value)
    on, off = (f"{median(values):.3g} s" if values else "-" for values in sides.values())
    places = sorted(at for at, _ in knees.values()) or [0.0]
    note = f"largest of each sweep, at {places[0]:g} to {places[-1]:g} requests/s; mean of {len(knees)} seeds"
    return Finding(claim, _best(results, figure), on, off, note)


def _preempted(results: Results) -> tuple[float, float]:
    """Preemptions (without, with) migration, over all seeds and the rates that dispatch only keeps up with."""
    before = after = 0.0
    for case in results.cases["rate"]:
        pair = [results.get("rate", case._replace(arm=arm.name)) for arm in (OFF, ON)]
        if case.arm == OFF.name and pair[0] is not None and pair[1] is not None:
            waited = read(pair[0], "ttft_ns.p99")
            if results.fast or (waited is not None and waited < KEEPS_UP_S):
                before, after = before + pair[0].preemptions, after + pair[1].preemptions
    return before, after


def _change(before: float, after: float) -> float | None:
    return after / before - 1 if before else None


def _by_seed(results: Results) -> Table:
    columns = [
        Column("seed", "seed", "count"),
        Column("knee_per_s", "largest ratio at, requests/s", "number"),
        Column("on_s", "P99 with, s", "number", "simulated"),
        Column("off_s", "P99 without, s", "number", "simulated"),
        Column("ratio", "ratio", "number", "simulated"),
    ]
    table = Table(columns, "Time to first token of each sequence of requests at its own knee")
    for seed, (at, ratio) in sorted(_knees(results, "ttft_ns.p99").items()):
        pair = [results.get("rate", Case(arm.name, at, seed, results.fast)) for arm in (ON, OFF)]
        table.add(seed, at, *(None if one is None else read(one, "ttft_ns.p99") for one in pair), ratio)
    return table


def _cheapest(results: Results, experiment: str, arm: str) -> float | None:
    """The least instance hours, over thresholds, with a P99 of at most 5 s."""
    hours, p99 = (results.curve(experiment, arm, figure) for figure in ("instance_hours", "ttft_ns.p99"))
    return min((mean(hours[at]) for at in hours if median(p99[at]) <= EQUAL_P99_S), default=None)


def _cost(results: Results, experiment: str, note: str = "", counts: bool = True) -> Finding:
    on, off = (_cheapest(results, experiment, arm.name) for arm in (ON, OFF))
    hours_on, hours_off = (f"{hours:.3g} h" if hours else "-" for hours in (on, off))
    return Finding(STUDY.claim("cost"), on / off if on and off else None, hours_on, hours_off, note, counts)


def _growth(curve: dict[float, list[float]]) -> float | None:
    values = [median(found) for found in curve.values()]
    return max(values) / min(values) if values else None


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.0f} ms"


def _both(results: Results, experiment: str, figure: str) -> dict[str, dict[float, list[float]]]:
    return {arm.title: results.curve(experiment, arm.name, figure) for arm in (ON, OFF)}


_GAINS = (
    ("p99", "prefill P99", "ttft_ns.p99"),
    ("mean", "prefill mean", "ttft_ns.mean"),
    ("decode", "decode P99", "tpot_ns.p99"),
    ("", "end to end P99", "e2e_ns.p99"),
)
_SETTING = "LLaMA-7B on 16 A10, 851 blocks each, lengths of mean 256/256 up to 6,144, Poisson"
_SHOWN = {
    "TTFT mean, s": "ttft_ns.mean", "TTFT P99, s": "ttft_ns.p99", "TPOT P99, s": "tpot_ns.p99",
    "E2E P99, s": "e2e_ns.p99", "preemptions": "preemptions", "moves": "moves", "mean downtime, s": "downtime_s",
}  # fmt: skip
_ARTIFACT = f"facts up to {OLD_S:g} s old, the newest instance goes"
_SHOWN_SCALING = {"instance hours": "instance_hours", "mean instances": "mean_instances", **_SHOWN}
STUDY = Study(
    name="llumnix",
    system="Llumnix: Dynamic Scheduling for Large Language Model Serving",
    title="Llumnix: live migration of running requests",
    summary=(
        "Outputs are unpredictable, so instances fill up unevenly: some preempt while others have room.",
        "Llumnix gives every instance one figure, freeness: free blocks for each request, with virtual usage.",
        "Requests are dispatched by it, and moved by it while they run: KV is copied in stages while the request goes",
        "on decoding, and only what was produced during the last stage is copied while it stands still.",
        "Control: the same dispatch without migration; for the pause, one blocking copy of everything.",
    ),
    reference="Sun et al., Llumnix, OSDI 2024, with the released artifact (branch osdi24ae)",
    claims=(
        Claim("p99", "prefill P99 over dispatch only", _SETTING, 14.8, (5.0, 45.0)),
        Claim("mean", "prefill mean over dispatch only", _SETTING, 7.7, (4.0, 16.0)),
        Claim("decode", "decode P99 over dispatch only", _SETTING, 2.0, (1.5, 2.5)),
        Claim("preemptions", "preemptions", _SETTING, -0.704, (-0.95, -0.5), 0.0, ""),
        Claim("downtime", "pause of a blocking copy over a live one", "LLaMA-7B, 8,192 tokens", 64.7, (32.0, 130.0)),
        Claim(
            "cost", "instance hours at a prefill P99 of 5 s",
            "lengths of mean 512/512, Gamma arrivals of CV 2, 2 requests/s, scaling by freeness", 0.73, (0.5, 0.75),
        ),
    ),
    experiments=(
        Experiment("rate", "rate sweep", (ON, OFF), "requests/s", RATES, _rate, 5, (11.5,), shown=_SHOWN),
        Experiment(
            "downtime", "one request moved", (LIVE, BLOCKING), "tokens", TOKENS, _move, 1, (256.0, 8192.0),
            shown={"pause, s": "downtime_s"},
        ),
        Experiment(
            "scaling", "a fleet that scales itself", (ON, OFF), "mean freeness to start more", FREENESS, scaling, 5,
            (25.0,), shown=_SHOWN_SCALING,
        ),
        Experiment(
            "scaling-artifact", f"the same, {_ARTIFACT}", (ON, OFF), "mean freeness to start more", FREENESS,
            _scaling_artifact, 5, (25.0,), shown=_SHOWN_SCALING,
        ),
    ),
    judge=judge,
    differences=(
        "The knee lies at 8.5 to 11 requests/s here and at 7.4 to 8.0 in the publication: a step here is a straight "
        "line (25 ms + 2.2 us a token in the cache) without the host time of an engine of 2023.",
        "Lengths have so long a tail that every sequence of 10,000 requests has its own knee, up to 30 % apart, and "
        "the gain is large in a narrow band about it. So each seed is taken at the largest ratio of its own sweep, as "
        "the publication took its one sequence, and the mean over seeds is the figure; at one common rate the median "
        "of the ratios stays below 3 (second picture).",
        "The publication reports the time lost to preemptions; here they are counted. Past the knee migration "
        "preempts as often, or more: there is no room to move to.",
        "Copies run at the speed of the published blocking copies and slow both ends by 1 %, as published; the two "
        "stages are those of the artifact. Later versions send 16 blocks or fewer at once, which pauses short requests "
        "for longer than long ones.",
        "Scaling starts an instance within 10 s, an assumption. Hours are the least that any threshold needs for a "
        "median P99 of at most 5 s.",
        "The published saving of 36 % is 14.25 instances over 10.44, less 1 (so 0.73 as a ratio), at thresholds of 65 "
        "and 5; their P99 in the same figure is 4.6 s and 11.4 s. Read as the hours here, at most 5 s, the published "
        "points give 11.39 over 14.25, 0.80; at equal thresholds they give 0.90 to 0.93.",
        "Policies see exact facts here, and the instance with the fewest requests is drained, as in the paper. In the "
        "artifact they see what each instance reports once a step, so a burst goes to one instance, and the instance "
        "started last is drained, which dispatch alone waits for: the row in brackets.",
    ),
)  # fmt: skip
