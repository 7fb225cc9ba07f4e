"""POLCA: more servers in a row's power budget, because a policy slows low priority before the breaker opens.

Rows are simulated at the fidelity `fluid`, over a week, with the policy objects that exact runs have. What the points
compute is in polca_cases.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from megalith.report.table import Column, Table
from megalith.studies.polca_cases import ACTUATIONS_S, COUNTS, PUBLISHED, SECONDS, span_s
from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Claim, Computed, Experiment, Finding, Gate, Judgement, Picture, Study

ON = Arm("polca", "on", "POLCA")
OFF = Arm("no-cap", "off", "no capping, brake only")
SINGLE = Arm("single-threshold", "baseline", "one threshold for all")
ARMS = (ON, SINGLE, OFF)
SECOND_ARMS = tuple(
    Arm(f"second-{second:g}", "on" if second == 0.89 else "baseline", f"POLCA, second threshold {second:.0%}")
    for second in SECONDS
)
TRAINED = (36.0, 38.0, 40.0, 41.0, 42.0, 44.0, 48.0, 52.0)
EXPONENTS = (1.5, 2.2, 3.0)
BURSTS = ("none", "conversation", "traces")
HOURS = (4.0, 15.0)
BUDGET_SERVERS = 40
_CASES = "megalith.studies.polca_cases"
_SHOWN = {
    "brakes": "brakes", "peak of budget": "peak", "mean of budget": "mean", "low capped": "capped_low",
    "high capped": "capped_high", "high p50 lost": "high_p50", "high p99 lost": "high_p99", "low p50 lost": "low_p50",
    "low p99 lost": "low_p99", "requests served lost": "served", "rise in 40 s": "rise_40",
}  # fmt: skip


def _week(case: Case, **given: float | str) -> Computed:
    options: dict[str, float | str] = {
        "bursts": "traces", "span_s": span_s(case.fast), "seed": case.seed, "exponent": 2.2, "grid": "all",
        "servers": PUBLISHED, "policy": case.arm, "second": 0.89, "actuation_s": 40.0, **given,
    }  # fmt: skip
    return Computed(call=f"{_CASES}:row", options=options)


def _servers(case: Case) -> Computed:
    return _week(case, servers=case.at)


def _delay(case: Case) -> Computed:
    if case.arm == OFF.name:
        return _week(case)
    return _week(case, policy="polca", second=float(case.arm.removeprefix("second-")), actuation_s=case.at)


def _exponent(case: Case) -> Computed:
    return _week(case, exponent=case.at, grid="one", span_s=span_s(case.fast, 2.0))


def _bursts(case: Case) -> Computed:
    return _week(case, bursts=BURSTS[int(case.at)], grid="one", span_s=span_s(case.fast, 2.0))


def _agreement(case: Case) -> Computed:
    options: dict[str, float | str] = {
        "policy": "polca" if case.arm == ON.name else "", "hour": case.at, "seed": case.seed,
        "span_s": 600.0 if case.fast else 3600.0, "calibration_s": span_s(case.fast),
    }  # fmt: skip
    return Computed(call=f"{_CASES}:agreement", options=options)


def _training(case: Case) -> Computed:
    return Computed(call=f"{_CASES}:training", options={"policy": case.arm, "servers": case.at})


def judge(results: Results) -> Judgement:
    return Judgement([], [])


_TITLE = "servers in a budget of 40"
STUDY = Study(
    name="polca",
    title="POLCA: more servers in one power budget",
    summary=(
        "Inference draws less than what is provisioned for it, and the prompt spikes of different servers seldom meet.",
        "So a row's budget carries more servers, if somebody slows them down before the breaker opens.",
        "POLCA reads the row's power every 2 s, slows low priority at 80 % and more at 89 % of the budget, then high",
        "priority a little; a clock takes 40 s to change. Above 100 % the hardware brakes everything at once.",
        "Controls: the brake alone, one threshold for all, and a row that trains, whose servers peak together.",
    ),
    reference="Patel et al., ASPLOS 2024",
    claims=(
        Claim("servers", "more servers without a brake", "a week, budget for 40", 0.30, (0.30, 0.40), 0.0, ""),
    ),
    experiments=(
        Experiment("servers", f"A week by {_TITLE}", ARMS, _TITLE, tuple(map(float, COUNTS)), _servers, 3,
                   shown=_SHOWN),
        Experiment("delay", f"{PUBLISHED} servers by the time a clock takes", (*SECOND_ARMS, OFF), "actuation, s",
                   ACTUATIONS_S, _delay, 3, shown={"brakes": "brakes", "peak of budget": "peak"}),
        Experiment("exponent", f"{PUBLISHED} servers, two days, by the exponent of the clock in the power", (ON, OFF),
                   "exponent", EXPONENTS, _exponent, 1, shown=_SHOWN),
        Experiment("bursts", f"{PUBLISHED} servers, two days, by bursts: {', '.join(BURSTS)}", (ON, OFF), "bursts",
                   tuple(map(float, range(len(BURSTS)))), _bursts, 1, shown=_SHOWN),
        Experiment("training", "A row that trains", (ON, SINGLE, OFF), _TITLE, TRAINED, _training, 1,
                   shown={"brakes": "brakes", "peak of budget": "peak", "slower": "slowdown", "swing in 2 s": "swing"}),
        Experiment("agreement", "Fluid against exact over an hour of a Tuesday",
                   (ON, Arm("", "off", "nobody at the clocks")), "hour", HOURS, _agreement, 2,
                   shown={"power off by": "power", "worst sample off by": "sample", "low p99 off by": "low_p99",
                          "high p99 off by": "high_p99", "low p50 off by": "low_p50", "high p50 off by": "high_p50",
                          "requests": "requests", "brakes more": "brakes"}),
    ),
    judge=judge,
    differences=(),
)  # fmt: skip
