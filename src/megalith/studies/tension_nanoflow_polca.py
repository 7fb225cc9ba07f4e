"""NanoFlow x POLCA: one keeps every part of a device busy, the other lives from parts that are not.

A row of servers behind one breaker, step by step in the exact simulator: twelve servers on the budget of ten, with
nano-batches and without, under POLCA and under the brake alone, by the rate.
"""

from __future__ import annotations

from math import inf
from statistics import median

import msgspec

from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult, summarise
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec, PowerSpec
from megalith.specs.lengths import NormalLength
from megalith.specs.workload import WorkloadSpec
from megalith.studies import tension
from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Experiment, Gate, Judgement, Picture, Simulated, Study
from megalith.studies.tension import Square

BUDGET_SERVERS, SERVERS = 10, 12
RATED_W, OTHER_W = 6_500.0, 3_105.0
"""Of a DGX A100, and what it draws beside its devices (`plan/row.py` has the sources)."""
SPAN_S, FAST_SPAN_S = 180.0, 90.0
TPOT_S = 0.2
"""Mean TPOT at the 99th percentile that a rate has to keep: NanoFlow's online limit."""
RATES = (3.0, 4.0, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0, 9.0)
"""Requests a second and server."""
NEITHER = Arm("neither", "off", "brake only")
NANO = Arm("nano", "on", "nano-batches, brake only")
POLCA = Arm("polca", "on", "POLCA")
BOTH = Arm("both", "on", "nano-batches and POLCA")
ARMS = (NEITHER, NANO, POLCA, BOTH)


def _task(case: Case) -> Simulated:
    nano, polca = case.arm in ("nano", "both"), case.arm in ("polca", "both")
    low = SERVERS // 2
    pools = tuple(
        PoolSpec(name=name, device="a100-80gb", count=count, tensor_parallel=8, token_budget=2048, max_sequences=2048,
                 overlap="nanoflow" if nano else "none")
        for name, count in (("low", low), ("high", SERVERS - low))
    )  # fmt: skip
    options = {"low": ["low"], "high": ["high"], "hold_s": 40.0}
    capping = PolicySpec(name="polca", options=options) if polca else PolicySpec(name="no-cap")
    fleet = FleetSpec(
        pools=pools, router=PolicySpec(name="by-priority"), controllers=(capping,),
        power=PowerSpec(budget_w=BUDGET_SERVERS * RATED_W, other_w=OTHER_W),
    )  # fmt: skip
    span = FAST_SPAN_S if case.fast else SPAN_S
    load = WorkloadSpec(
        name="512 in, 512 out", input=NormalLength(mean=512, deviation=51), output=NormalLength(mean=512, deviation=51),
        arrivals=PoissonArrivals(rate_per_s=case.at * SERVERS), requests=round(case.at * SERVERS * span),
        priority_share=0.5,
    )  # fmt: skip
    point = Scenario(model="llama-2-70b", fleet=fleet, workload=load, timer="analytic", seed=case.seed, sample_s=2.0)
    return Simulated(scenario=point, measure=f"{__name__}:measure")


def measure(point: Point) -> PointResult:
    """A plain run's figures and those of the power domain."""
    result = simulate(point.scenario)
    assert result.power is not None
    budget_w = BUDGET_SERVERS * RATED_W
    figures: dict[str, float | None] = {
        "brakes": float(result.power.brakes),
        "peak_share": result.power.peak_w / budget_w,
        "clock_changes": float(result.power.clock_changes),
        "busy_share": result.series.mean("busy_share"),
    }
    return msgspec.structs.replace(summarise(point, result), figures=figures)


def _carried(results: Results, arm: str) -> float | None:
    """The highest rate up to which every tried one kept TPOT and never braked; median over seeds for TPOT."""
    brakes = results.curve("row", arm, "brakes")
    tpot = results.curve("row", arm, "tpot_ns.p99")
    kept = 0.0
    for at in sorted(brakes):
        if max(brakes[at]) > 0 or median(tpot.get(at, [inf])) > TPOT_S:
            break
        kept = at
    return kept or None


def judge(results: Results) -> Judgement:
    """What the row carries in each cell, and power and TPOT at every rate."""
    square = Square(*(_carried(results, arm.name) for arm in ARMS))
    table = tension.square_table(
        f"Highest rate without a brake and with TPOT p99 within {TPOT_S:g} s", ("nano-batches", "POLCA"), "servers",
        "requests/s and server", {f"{SERVERS} on a budget of {BUDGET_SERVERS}": square},
    )  # fmt: skip
    titles = {"peak over budget": "peak_share", "TPOT p99, s": "tpot_ns.p99"}
    pictures = [
        Picture("row", "Twelve servers on a budget of ten", "requests/s and server", logarithmic=False,
                panels={title: {arm.title: results.curve("row", arm.name, figure) for arm in ARMS}
                        for title, figure in titles.items()}),
    ]  # fmt: skip
    places = results.places("row")
    saved = results.middle_ratio("row", NEITHER.name, NANO.name, "busy_share", places[0])
    gates = [Gate("busy share without over with nano-batches, lowest rate", saved, 1.0, 1.5, "control: the same work")]
    note = f"rates tried: {', '.join(f'{at:g}' for at in places)} requests/s and server"
    return Judgement([tension.finding(STUDY.claim("multiply"), square, note)], gates, {"square": table}, pictures)


_SETTING = "Llama-2-70B on DGX A100, 512 in and 512 out, 2,048 rows a step, 12 servers on a budget of 10"
STUDY = Study(
    name="tension-nanoflow-polca",
    title="Tension: NanoFlow x POLCA",
    summary=(
        "POLCA puts more servers behind one breaker, because inference seldom draws what it may: decode steps leave",
        "compute idle. NanoFlow fills just that: compute, memory and links of a device run side by side.",
        "Here both are switched on and off: twelve DGX A100 on the budget of ten, half of the servers low priority,",
        "with and without nano-batches, under POLCA's two thresholds and under the brake alone, by the rate.",
        "Control: the square's other three cells. Interaction 1 would mean that published gains can be multiplied.",
    ),
    reference="NanoFlow (OSDI 2025) and POLCA (ASPLOS 2024); the square is Megalith's own question",
    claims=(tension.claim("multiply", "nano-batches", "POLCA", _SETTING),),
    experiments=(
        Experiment(
            "row", "a row by rate", ARMS, "requests/s and server", RATES, _task, 2, (4.0, 6.0),
            shown={"peak over budget": "peak_share", "brakes": "brakes", "busy share": "busy_share",
                   "TPOT p99, s": "tpot_ns.p99", "TTFT p99, s": "ttft_ns.p99", "clock changes": "clock_changes"},
        ),
    ),
    judge=judge,
    differences=(
        "No publication runs this square; the claim is what adding up published gains would take for granted.",
        "A step with prompt tokens draws what prompts draw, one of decodes alone what decodes draw. With chunks in "
        "nearly every step (2,048 rows, as NanoFlow) there are hardly steps of decodes alone, so the slack that POLCA "
        "lives from is small before nano-batches come.",
        "Three minutes of Poisson arrivals from an empty row, not weeks; the row of POLCA's own study has bursts.",
    ),
)  # fmt: skip
