"""NanoFlow: nano-batches that overlap compute, memory and links inside a device, against operators one by one.

The pipeline search on Llama-2-70B over eight A100 (predicted), swept over the batch, the assumed shares, and the timer;
then the same engine in the simulator with the overlap on and off, by workload and by rate.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

import msgspec

from megalith.cost.nano import Enough
from megalith.cost.timer_choice import choose_timer
from megalith.plan.nano import NanoPlan, Traffic, optimum_per_s, plan_nano, step_of, times_of
from megalith.plan.nano_search import QUICK, Effort
from megalith.report.table import Column, Table
from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult, summarise
from megalith.specs.arrivals import ClosedLoop, PoissonArrivals
from megalith.specs.fleet import FleetSpec, PoolSpec
from megalith.specs.lengths import NormalLength
from megalith.specs.workload import WorkloadSpec
from megalith.specs.workload_catalog import workload
from megalith.studies.nanoflow_published import ENGINES, FLOPS_PER_S, OWN, PARAMETERS
from megalith.studies.results import Results
from megalith.studies.study import (
    Arm,
    Case,
    Claim,
    Computed,
    Experiment,
    Finding,
    Gate,
    Judgement,
    Picture,
    Simulated,
    Study,
)

MODEL, DEVICE, GROUP, BATCH = "llama-2-70b", "a100-80gb", 8, 2048
SEQUENTIAL = Arm("sequential", "off", "one operator after the other")
SPLIT = Arm("split", "off", "nano-batches, nothing overlapped")
LINKS = Arm("links", "on", "collectives overlapped")
BOTH = Arm("both", "on", "collectives and attention overlapped")
WAYS = (SEQUENTIAL, SPLIT, LINKS, BOTH)
ON, OFF = Arm("on", "on", "nano-batches overlapped"), Arm("off", "off", "the same engine, no nano-batches")
ANSWERS = Arm("answers", "on", "answers of that length")
PROMPTS = Arm("prompts", "off", "control: answers of one token")
BATCHES = (512.0, 768.0, 1024.0, 2048.0, 4096.0)
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
TIMERS = ("analytic", "operators")
LENGTHS = {"512/512": (512, 512), "1024/512": (1024, 512), "512/1024": (512, 1024)}
WORKLOADS = (*LENGTHS, "azure-conv", "lmsys", "sharegpt")
RATES = (30.0, 34.0, 38.0, 42.0, 46.0, 50.0)
NORMALIZED_S = 0.2
"""Limit on seconds per token of an answer, waiting included, as in the publication."""
CLIENTS = 2048
SHOWN = {"tokens/s of a device": "tokens_per_s", "of the optimum": "share", "over sequential": "gain", "W": "power_w"}
SERVED = {"tokens/s of a device": "tokens_per_s", "s per token, mean": "normalized_ns.mean", "W": "mean_power_w"}


@functools.lru_cache(maxsize=64)
def _plan(timer: str, batch: int, memory: int, link: int, thorough: bool) -> NanoPlan:
    found = choose_timer(timer, MODEL, DEVICE, GROUP)
    effort = Effort() if thorough else QUICK
    return plan_nano(found, Traffic(512, 512, batch), enough=Enough(memory, link), effort=effort)


def pipeline(options: Mapping[str, Any]) -> dict[str, float | None]:
    """One way to run the step."""
    shares = round(float(options["memory"]) * 1000), round(float(options["link"]) * 1000)
    plan = _plan(str(options["timer"]), int(options["batch"]), *shares, bool(options["thorough"]))
    way = plan.ways[[arm.name for arm in WAYS].index(str(options["arm"]))]
    return {
        "tokens_per_s": way.tokens_per_s, "share": way.share, "gain": way.gain, "power_w": way.power_w,
        "step_ms": way.step_ns / 1e6, "optimum": plan.optimum,
        "fullest": max(most for _, _, most in plan.busy.values()),
        **{f"busy_{name}": mean for name, (_, mean, _) in plan.busy.items()},
        **{f"before_{name}": mean for name, (mean, _, _) in plan.busy.items()},
    }  # fmt: skip


def classes(options: Mapping[str, Any]) -> dict[str, float | None]:
    """T_memory / T_compute and T_links / T_compute of a traffic: prompts of 512 and answers of `at` tokens."""
    timer = choose_timer("analytic", MODEL, DEVICE, GROUP)
    answer = int(options["at"]) if options["arm"] == ANSWERS.name else 1
    work, _ = step_of(timer.cost, Traffic(512, answer, BATCH))  # type: ignore[attr-defined]
    times = times_of(timer.cost, work)  # type: ignore[attr-defined]
    return {
        "memory": times.memory_ns / times.compute_ns,
        "links": times.link_ns / times.compute_ns,
        "rows": float(work.rows),
    }


def measure(point: Point) -> PointResult:
    """A plain run's figures, and prompt and answer tokens a second of a device."""
    result = simulate(point.scenario)
    found = summarise(point, result)
    steady = result.figures.steady
    tokens = steady.prompt_tokens_per_s + steady.output_tokens_per_s
    return msgspec.structs.replace(found, figures={"tokens_per_s": tokens / found.devices})


def _fleet(arm: str) -> FleetSpec:
    pool = PoolSpec(
        name="all", device=DEVICE, count=1, tensor_parallel=GROUP, token_budget=BATCH, max_sequences=CLIENTS,
        overlap="nanoflow" if arm == ON.name else "none", prefix_cache=False,
    )  # fmt: skip
    return FleetSpec(pools=(pool,))


def serving(case: Case) -> Simulated:
    """Offline: as many clients as keep every step full."""
    name = WORKLOADS[int(case.at)]
    requests = (3 if case.fast else 5) * CLIENTS
    if name in LENGTHS:
        prompt, answer = LENGTHS[name]
        load = WorkloadSpec(
            name=name, input=NormalLength(mean=prompt, deviation=0.1 * prompt),
            output=NormalLength(mean=answer, deviation=0.1 * answer), arrivals=ClosedLoop(clients=CLIENTS),
            requests=requests,
        )  # fmt: skip
    else:
        load = msgspec.structs.replace(workload(name), arrivals=ClosedLoop(clients=CLIENTS), requests=requests)
    return _simulated(case, load)


def online(case: Case) -> Simulated:
    """LMSYS lengths at a Poisson rate."""
    requests = 4_000 if case.fast else 20_000
    rate = PoissonArrivals(rate_per_s=case.at)
    return _simulated(case, msgspec.structs.replace(workload("lmsys"), arrivals=rate, requests=requests))


def _simulated(case: Case, load: WorkloadSpec) -> Simulated:
    scenario = Scenario(model=MODEL, fleet=_fleet(case.arm), workload=load, seed=case.seed, timer="analytic")
    return Simulated(scenario=scenario, measure=f"{__name__}:measure")


def _computed(case: Case, **changed: float | str) -> Computed:
    options: dict[str, float | str] = {
        "arm": case.arm, "timer": "analytic", "batch": BATCH, "memory": 0.4, "link": 0.2, "thorough": 0.0, **changed,
    }  # fmt: skip
    return Computed(call=f"{__name__}:pipeline", options=options)


def _class(case: Case) -> Computed:
    return Computed(call=f"{__name__}:classes", options={"arm": case.arm, "at": case.at})


def judge(results: Results) -> Judgement:
    """The ablation, the share of the optimum, the timers; then serving, and the published engines beside it."""

    def ours(arm: Arm, figure: str, experiment: str = "batch", at: float = BATCH) -> float | None:
        return results.middle(experiment, arm.name, figure, at)

    def finding(key: str, value: float | None, on: str, off: str, note: str = "", counts: bool = True) -> Finding:
        return Finding(STUDY.claim(key), value, on, off, note, counts)

    def rate(arm: Arm, experiment: str = "batch", at: float = BATCH) -> str:
        value = results.middle(experiment, arm.name, "tokens_per_s", at)
        return "-" if value is None else f"{value:,.0f} tokens/s"

    tables = float(TIMERS.index("operators"))
    served = results.middle_ratio("serving", ON.name, OFF.name, "tokens_per_s", 0.0)
    theirs = ENGINES["TensorRT-LLM"]["512/512"]
    against = results.middle("serving", ON.name, "tokens_per_s", 0.0)
    findings = [
        finding("both", ours(BOTH, "gain"), rate(BOTH), rate(SEQUENTIAL)),
        finding("links", ours(LINKS, "gain"), rate(LINKS), rate(SEQUENTIAL)),
        finding("split", ours(SPLIT, "gain"), rate(SPLIT), rate(SEQUENTIAL), "rates of the data sheet"),
        finding("split", ours(SPLIT, "gain", "timers", tables), rate(SPLIT, "timers", tables),
                rate(SEQUENTIAL, "timers", tables), "measured operator tables", False),
        finding("both", ours(BOTH, "gain", "timers", tables), rate(BOTH, "timers", tables),
                rate(SEQUENTIAL, "timers", tables), "measured operator tables", False),
        finding("share", ours(BOTH, "share"), rate(BOTH), rate(SEQUENTIAL), "optimum of our own profile"),
        finding("served", served, rate(ON, "serving", 0.0), rate(OFF, "serving", 0.0), "simulated, same engine"),
        finding("engines", None if against is None else against / theirs, rate(ON, "serving", 0.0),
                f"{theirs:,.0f} tokens/s (published)", "engine mixed in: ours simulated, theirs measured", False),
        finding("online", _online(results), *_limits(results), "same engine; published against TensorRT-LLM", False),
    ]  # fmt: skip
    pictures = [
        Picture("batch", "Gain over sequential by batch", "rows of a step",
                ratios={arm.title: results.curve("batch", arm.name, "gain") for arm in WAYS[1:]},
                ylabel="over sequential", claim=("published, both", 1.17)),
        Picture("shares", "Gain by the assumed share of attention", "share of the device", logarithmic=False,
                panels={"over sequential": {arm.title: results.curve("shares", arm.name, "gain") for arm in WAYS[1:]}}),
        Picture("online", "LMSYS lengths", "requests/s", logarithmic=False,
                panels={"s per token, mean": {
                    arm.title: results.curve("online", arm.name, "normalized_ns.mean") for arm in (ON, OFF)}}),
    ]  # fmt: skip
    return Judgement(findings, _gates(results), {"workloads": _served(results)}, pictures)


def _gates(results: Results) -> list[Gate]:
    gain = results.middle("batch", BOTH.name, "gain", BATCH)
    share = results.middle("batch", BOTH.name, "share", BATCH)
    full = [one for values in results.curve("batch", BOTH.name, "fullest").values() for one in values]
    full += [one for values in results.curve("shares", BOTH.name, "fullest").values() for one in values]
    short, long = (results.curve("class", ANSWERS.name, name) for name in ("memory", "links"))
    compute = [short.get(512.0, [9.0])[0], long.get(512.0, [9.0])[0]]
    formula = optimum_per_s(FLOPS_PER_S, PARAMETERS)
    gains = [
        median(values)
        for values in results.ratio("serving", ON.name, OFF.name, "tokens_per_s").values()
    ]  # fmt: skip
    return [
        Gate("optimum, tokens/s of a device", formula, 1857 * 0.99, 1857 * 1.01, "F / (2 P), 260 TFLOP/s, 70e9"),
        Gate("larger of T_memory, T_links over T_compute, 512/512", max(compute), 0.0, 1.0, "bound by compute"),
        Gate("T_memory over T_compute, 512/32,768", short.get(32768.0, [0.0])[0], 1.0, 1e9, "bound by memory"),
        Gate("overlapped over own sequential", gain, 1.05, 1.25, "the paper's ablation: 1.07 to 1.17"),
        Gate("share of the optimum", share, 0.59, 0.80, "the paper: 59 to 72 %, 68.5 % here"),
        Gate("fullest resource at any moment", max(full, default=None), 0.0, 1.0 + 1e-9, "graph.check"),
        Gate("least gain of the workloads, simulated", min(gains, default=None), 1.0, 1.35, "same engine"),
    ]


def _reach(results: Results, arm: Arm) -> float | None:
    """The largest rate with which the mean stays within the limit, on straight lines between rates."""
    curve = {at: median(values) for at, values in results.curve("online", arm.name, "normalized_ns.mean").items()}
    best = None
    points = sorted(curve.items())
    for (r0, s0), (r1, s1) in pairwise(points):
        if s0 <= NORMALIZED_S < s1:
            return r0 + (r1 - r0) * (NORMALIZED_S - s0) / (s1 - s0)
    if points and points[-1][1] <= NORMALIZED_S:
        best = points[-1][0]
    return best


def _online(results: Results) -> float | None:
    on, off = _reach(results, ON), _reach(results, OFF)
    return on / off if on is not None and off else None


def _limits(results: Results) -> tuple[str, str]:
    on, off = ("-" if value is None else f"{value:.3g} req/s" for value in (_reach(results, ON), _reach(results, OFF)))
    return on, off


def _served(results: Results) -> Table:
    """By workload: simulated on and off, and what was published of NanoFlow and of other engines."""
    table = Table(
        [
            Column("workload", "workload"),
            Column("on", "overlapped", "count", "simulated"),
            Column("off", "same engine without", "count", "simulated"),
            Column("gain", "gain", "number", "simulated", 4),
            Column("watts", "W, on over off", "number", "simulated"),
            Column("nanoflow", "NanoFlow, published", "count"),
            Column("tensorrt", "TensorRT-LLM, published", "count"),
        ],
        "Tokens/s of a device (prompts and answers), every step full",
    )
    power = results.ratio("serving", ON.name, OFF.name, "mean_power_w")
    for at in results.places("serving"):
        name = WORKLOADS[int(at)]
        on, off = (results.middle("serving", arm.name, "tokens_per_s", at) for arm in (ON, OFF))
        gain = results.middle_ratio("serving", ON.name, OFF.name, "tokens_per_s", at)
        watts = median(power[at]) if power.get(at) else None
        table.add(name, on, off, gain, watts, OWN.get(name), ENGINES["TensorRT-LLM"].get(name))
    table.notes.append("azure-conv (published: Splitwise), lmsys, sharegpt: lengths of the catalogue; else normal.")
    return table


_SETTING = "Llama-2-70B on 8 A100, 512/512, 2,048 rows"
_PIPELINES = (
    Experiment("batch", "Batches", WAYS, "rows of a step", BATCHES,
               lambda case: _computed(case, batch=case.at, thorough=float(case.at == BATCH and not case.fast)), 1,
               (2048.0,), nature="predicted", shown=SHOWN),
    Experiment("shares", "Share of a device with which attention of decodes is fastest", WAYS, "share", SHARES,
               lambda case: _computed(case, memory=case.at), 1, (0.4,), nature="predicted", shown=SHOWN),
    Experiment("link-shares", "Share with which a collective is fastest", WAYS, "share", (0.1, 0.2, 0.4),
               lambda case: _computed(case, link=case.at), 1, (0.2,), nature="predicted", shown=SHOWN),
    Experiment("timers", f"Timers: {', '.join(TIMERS)}", WAYS, "timer", (0.0, 1.0),
               lambda case: _computed(case, timer=TIMERS[int(case.at)]), 1, nature="predicted", shown=SHOWN),
    Experiment("class", "What binds, prompts of 512", (ANSWERS, PROMPTS), "answer tokens",
               (64.0, 512.0, 2048.0, 8192.0, 32768.0), _class, 1, nature="predicted",
               shown={"T_memory / T_compute": "memory", "T_links / T_compute": "links", "rows": "rows"}),
)  # fmt: skip
STUDY = Study(
    name="nanoflow",
    system="NanoFlow: Towards Optimal Large Language Model Serving Throughput",
    title="NanoFlow: nano-batches inside a device",
    summary=(
        "A full step is bound by compute, but operators that wait for memory or links come in between.",
        "Its rows are cut into nano-batches, so that operators of one run beside those of another on the same device.",
        "Which order, which sizes, and which share of the device each gets is searched beforehand, by shape of a step.",
        "Controls: one operator after the other; and the same nano-batches with nothing overlapped.",
        "How fast an operator is with a share of the device is assumed, and swept.",
    ),
    reference="Zhu et al., NanoFlow, arXiv:2408.12757; figures of github.com/efeslab/Nanoflow, pipeline/eval",
    claims=(
        Claim("both", "overlap of links and attention over sequential", f"{_SETTING}; published decode-heavy", 1.17,
              (1.05, 1.25)),
        Claim("links", "overlap of collectives alone", f"{_SETTING}; published prefill only", 1.07, (1.03, 1.12)),
        Claim("split", "nano-batches with nothing overlapped", _SETTING, 0.868, (0.84, 0.9)),
        Claim("share", "share of the optimum", _SETTING, 0.685, (0.59, 0.8), 0.0, ""),
        Claim("served", "throughput over the same engine", "simulated, 512/512, every step full", 1.17, (1.05, 1.25)),
        Claim("engines", "throughput over TensorRT-LLM's", "512/512, engine and mechanism together", 1.91, (1.7, 2.1)),
        Claim("online", "rate within 0.2 s per token", "LMSYS lengths", 1.64, (1.5, 1.8)),
    ),
    experiments=(
        *_PIPELINES,
        Experiment("serving", f"Every step full: {', '.join(WORKLOADS)}", (ON, OFF), "workload",
                   tuple(map(float, range(len(WORKLOADS)))), serving, 3, (0.0,), shown=SERVED),
        Experiment("online", "LMSYS lengths by rate", (ON, OFF), "requests/s", RATES, online, 3, (34.0, 42.0),
                   shown=SERVED),
    ),
    judge=judge,
    profiles=("rates of the data sheet of a100-80gb, and its operator tables where said so",),
    differences=(
        "NanoFlow measured how operators slow each other down and published no table. Here P(R) = min(1, R / r*) with "
        " r* of 1.0 for products, 0.4 for attention of decodes and 0.2 for collectives, swept; attention beside a "
        "product also leaves it the bandwidth of its weights.",
        "Stage 1 is an integer program over one layer in steady state, with sizes and lags tried one by one, not one "
        "over all operators; the solver's branches are bounded. Simulated steps take the best of four fixed orders.",
        "A cost model by rates has no kernels that waste part of a wave: halves cost 1.6 % more, where 13.2 % were "
        "measured. Operator tables have them, between few measured sizes.",
        "All-reduces are not rewritten as all-gathers, and the cache of ended conversations is not moved to the host.",
        "One token too many for each request (asynchronous end) is charged when its prompt ends. That the host's time "
        "is hidden by it is not credited.",
    ),
)  # fmt: skip
