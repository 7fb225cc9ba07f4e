"""POLCA: more servers in a row's power budget, because a policy slows low priority before the breaker opens.

Rows are simulated at the fidelity `fluid`, over a week, with the policy objects that exact runs have. What the points
compute is in polca_cases.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from megalith.report.table import Column, Table
from megalith.studies.polca_cases import (
    ACTUATIONS_S,
    COUNTS,
    FAST_COUNTS,
    FAST_DELAY_S,
    PUBLISHED,
    SECONDS,
    span_s,
)
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
        "bursts": "traces", "span_s": span_s(case.fast), "seed": case.seed, "exponent": 2.2,
        "grid": "few" if case.fast else "all",
        "servers": PUBLISHED, "policy": case.arm, "second": 0.89, "actuation_s": 40.0, **given,
    }  # fmt: skip
    return Computed(call=f"{_CASES}:row", options=options)


def _servers(case: Case) -> Computed:
    return _week(case, servers=case.at)


def _delay(case: Case) -> Computed:
    if case.arm == OFF.name:
        return _week(case)
    return _week(case, policy="polca", second=float(case.arm.removeprefix("second-")), actuation_s=case.at)


def _busy(case: Case) -> Computed:
    options: dict[str, float | str] = {
        "policy": OFF.name, "second": 0.89, "actuation_s": 40.0, "seed": case.seed,
        "calibration_s": span_s(case.fast),
    }  # fmt: skip
    if case.arm != OFF.name:
        options |= {"policy": "polca", "second": float(case.arm.removeprefix("second-")), "actuation_s": case.at}
    return Computed(call=f"{_CASES}:busy", options=options)


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
    """Servers without a brake, brakes at 52, what latencies lose, slow clocks, training, fluid against exact."""
    findings = [_most(results), _brakes(results), _within(results)]
    least = results.places("servers")[0]
    notes = [
        "Nobody at the clocks, the largest rise of power was "
        f"{_largest(results, 'free_rise_2', least)} of the budget in 2 s and "
        f"{_largest(results, 'free_rise_40', least)} in 40 s with {least:.0f} servers. Recalled of the paper's "
        "production row, with 40: 9 % and 11.8 %. Nothing was fitted "
        "to these.",
        f"At {PUBLISHED} servers POLCA serves {_share(results, ON, 'served')} fewer requests within the week than with "
        "nobody at the clocks: arrivals do not wait for answers here, so what is lost is latency.",
    ]
    pictures = [
        Picture(
            "servers", "Servers in a budget of 40", _TITLE, logarithmic=False,
            panels={
                "peak of the budget": {arm.title: results.curve("servers", arm.name, "peak") for arm in ARMS},
                "low priority, p99 lost": {arm.title: results.curve("servers", arm.name, "low_p99") for arm in ARMS},
                "high priority, p50 lost": {arm.title: results.curve("servers", arm.name, "high_p50") for arm in ARMS},
            },
        ),
        Picture(
            "training", "A row that trains", _TITLE, logarithmic=False,
            panels={
                "brakes in two hours": {arm.title: results.curve("training", arm.name, "brakes") for arm in ARMS},
                "training step, longer by": {
                    arm.title: results.curve("training", arm.name, "slowdown") for arm in ARMS
                },
            },
        ),
    ]  # fmt: skip
    return Judgement(
        findings,
        _gates(results),
        {f"thresholds-{name}": _thresholds(results, name) for name in ("delay", "busy")},
        pictures,
        notes,
    )


def _gates(results: Results) -> list[Gate]:
    at = float(PUBLISHED)
    gates = [
        Gate(f"brakes without capping at {PUBLISHED}, least seed", _over(results, OFF, "brakes", at, min), 1.0,
             float("inf"), "published: 10 to 10,000"),
        Gate(f"brakes with POLCA at {PUBLISHED}, most seed", _over(results, ON, "brakes", at), 0.0, 0.0,
             "published: 0"),
        Gate(f"high priority, p99 lost at {PUBLISHED}", _over(results, ON, "high_p99", at), -1.0, 0.05, "brief, S1"),
        Gate(f"high priority, p50 lost at {PUBLISHED}", _over(results, ON, "high_p50", at), -1.0, 0.01, "brief, S1"),
        Gate(f"low priority, p50 lost at {PUBLISHED}", _over(results, ON, "low_p50", at), -1.0, 0.05, "brief, S1"),
        Gate("training, more servers without a brake", _trained(results), 0.0, 0.05, "brief, S3"),
        Gate("fluid against exact, mean power", _disagreement(results, "power"), 0.0, 0.03, "brief, section 3.4"),
        Gate("fluid against exact, p99", _disagreement(results, "p99"), 0.0, 0.05, "brief, section 3.4"),
    ]  # fmt: skip
    if not results.fast:
        curves = [results.curve(name, SECOND_ARMS[SECONDS.index(0.89)].name, "brakes") for name in ("delay", "busy")]
        slow = [value for curve in curves for value in curve.get(120.0, ())]
        gates.append(
            Gate("brakes with POLCA when a clock takes 120 s, all runs", sum(slow) if slow else None, 1.0,
                 float("inf"), "brief, S2: else the model is too kind")
        )  # fmt: skip
    return gates


def _over(
    results: Results, arm: Arm, figure: str, at: float, worst: Callable[[list[float]], float] = max
) -> float | None:
    values = results.curve("servers", arm.name, figure).get(at)
    return worst(values) if values else None


def _unbraked(results: Results, arm: Arm, experiment: str = "servers") -> float | None:
    """Most servers up to which no seed braked."""
    found = None
    for count, values in sorted(results.curve(experiment, arm.name, "brakes").items()):
        if max(values) > 0:
            break
        found = count
    return found


def _most(results: Results) -> Finding:
    counts = [_unbraked(results, arm) for arm in (ON, OFF, SINGLE)]
    texts = ["-" if count is None else f"{count:.0f} servers" for count in counts]
    ours = None if counts[0] is None else counts[0] / BUDGET_SERVERS - 1.0
    tried = ", ".join(f"{count:.0f}" for count in results.places("servers"))
    note = f"no brake with any seed; one threshold for all: {texts[2]}; counts tried: {tried}"
    return Finding(STUDY.claim("servers"), ours, texts[0], texts[1], note)


def _brakes(results: Results) -> Finding:
    values = [results.curve("servers", arm.name, "brakes").get(float(PUBLISHED)) for arm in (ON, OFF, SINGLE)]
    texts = ["-" if not found else f"{median(found):g} ({min(found):g} to {max(found):g})" for found in values]
    return Finding(
        STUDY.claim("brakes"), median(values[1]) if values[1] else None, texts[0], texts[1],
        f"published of the baselines; POLCA's are in `with`; one threshold for all: {texts[2]}",
    )  # fmt: skip


def _within(results: Results) -> Finding:
    """Most servers within all four recalled limits on latency."""
    limits = {"high_p50": 0.01, "high_p99": 0.05, "low_p50": 0.05, "low_p99": 0.5}
    found: dict[str, float | None] = {}
    for arm in (ON, OFF):
        found[arm.name] = None
        for count in results.places("servers"):
            worst = {figure: _over(results, arm, figure, count) for figure in (*limits, "brakes")}
            bounds = {**limits, "brakes": 0.0}
            if not all((value := worst[figure]) is not None and value <= bound for figure, bound in bounds.items()):
                break
            found[arm.name] = count
    texts = ["-" if count is None else f"{count:.0f} servers" for count in found.values()]
    most = found[ON.name]
    ours = None if most is None else most / BUDGET_SERVERS - 1.0
    note = "no brake, and limits recalled of the paper: high p50 1 %, p99 5 %, low p50 5 %, p99 50 %; worst seed"
    return Finding(STUDY.claim("within"), ours, texts[0], texts[1], note, False)


def _trained(results: Results) -> float | None:
    """Most servers of a training row without a brake and without capping, as a share above the budget's."""
    most = _unbraked(results, OFF, "training")
    return None if most is None else most / BUDGET_SERVERS - 1.0


def _disagreement(results: Results, figure: str) -> float | None:
    values = [
        value
        for arm in ("polca", "")
        for values in results.curve("agreement", arm, figure).values()
        for value in values
    ]
    return max(values, default=None)


def _thresholds(results: Results, name: str) -> Table:
    """Brakes by second threshold and delay."""
    delays = results.places(name)
    columns = [Column("second", "second threshold", "share")]
    columns += [Column(f"at_{delay:g}_s", f"clocks in {delay:g} s", nature="simulated") for delay in delays]
    span = {"delay": "in the week", "busy": "in six busy hours"}[name]
    table = Table(columns, f"Brakes of {PUBLISHED} servers under POLCA {span}, each seed")
    for arm, second in zip(SECOND_ARMS, SECONDS, strict=True):
        curve = results.curve(name, arm.name, "brakes")
        cells = [", ".join(f"{value:g}" for value in curve.get(delay, ())) or "-" for delay in delays]
        table.add(second, *cells)
    table.notes.append("The hold before high priority is slowed is the delay, and 2 s at least.")
    return table


def _largest(results: Results, figure: str, at: float) -> str:
    value = _over(results, OFF, figure, at)
    return "-" if value is None else f"{value:.1%}"


def _share(results: Results, arm: Arm, figure: str) -> str:
    value = _over(results, arm, figure, float(PUBLISHED), min)
    return "-" if value is None else f"{-value:.2%}"


_TITLE = "servers in a budget of 40"
STUDY = Study(
    name="polca",
    system="POLCA: Power Oversubscription in LLM Cloud Providers",
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
        Claim("brakes", "brakes in a week without POLCA", "52 servers", 10.0, (10.0, 10_000.0), 0.0, ""),
        Claim("within", "more servers within limits on latency", "a week, budget for 40", 0.30, (0.30, 0.40), 0.0, ""),
    ),
    experiments=(
        Experiment("servers", f"A week by {_TITLE}", ARMS, _TITLE, tuple(map(float, COUNTS)), _servers, 3,
                   tuple(map(float, FAST_COUNTS)), shown=_SHOWN),
        Experiment("delay", f"{PUBLISHED} servers by the time a clock takes", (*SECOND_ARMS, OFF), "actuation, s",
                   ACTUATIONS_S, _delay, 3, (FAST_DELAY_S,), shown={"brakes": "brakes", "peak of budget": "peak"}),
        Experiment("busy", f"{PUBLISHED} servers in the busiest six hours of ten Tuesdays, by the time a clock takes",
                   (*SECOND_ARMS, OFF), "actuation, s", ACTUATIONS_S, _busy, 10, fast_seeds=1,
                   shown={"brakes": "brakes", "peak of budget": "peak", "rise in 40 s": "rise_40"}),
        Experiment("exponent", f"{PUBLISHED} servers, two days, by the exponent of the clock in the power", (ON, OFF),
                   "exponent", EXPONENTS, _exponent, 1, (3.0,), shown=_SHOWN),
        Experiment("bursts", f"{PUBLISHED} servers, two days, by bursts: {', '.join(BURSTS)}", (ON, OFF), "bursts",
                   tuple(map(float, range(len(BURSTS)))), _bursts, 1, (2.0,), shown=_SHOWN),
        Experiment("training", "A row that trains", (ON, SINGLE, OFF), _TITLE, TRAINED, _training, 1,
                   (40.0, 41.0, 42.0),
                   shown={"brakes": "brakes", "peak of budget": "peak", "slower": "slowdown", "swing in 2 s": "swing"}),
        Experiment("agreement", "Fluid against exact over an hour of a Tuesday",
                   (ON, Arm("", "off", "nobody at the clocks")), "hour", HOURS, _agreement, 2,
                   (15.0,),
                   shown={"power off by": "power", "worst sample off by": "sample", "low p99 off by": "low_p99",
                          "high p99 off by": "high_p99", "low p50 off by": "low_p50", "high p50 off by": "high_p50",
                          "requests": "requests", "brakes more": "brakes"}),
    ),
    judge=judge,
    profiles=(
        "splitwise-sim's medians of BLOOM-176B on 8 A100, decode steps by tokens in the cache; 400, 250 and 63 W a "
        "device in prompts, decodes and idle, and what is above idle falls with the clock to the power 2.2 (an "
        "assumption, swept); 3,105 W a server beside the devices, of 6,500 W provisioned",
    ),
    differences=(
        "The six weeks of production telemetry are not public. Requests are drawn: Poisson with a rate that follows "
        "the week (valley 0.3 of the peak, weekends 0.75) and wanders within minutes and seconds as those of the "
        "public Azure traces of 2023 do: summaries like the code trace (long prompts, short answers), searches and "
        "chats like the conversation trace. The experiment `bursts` has none, and the conversation's for all.",
        "Only the rate is calibrated: 40 servers draw 79 % of their budget at most in one drawn week, and other weeks "
        "are reported. How fast power rises comes from the model.",
        "Low and high priority have half of the servers each, and a request goes to any server of its half.",
        "Shares of the kinds, lengths and limits on latency are recalled of the paper by the accounts of it.",
        "Latency is the end-to-end time over that of the same request alone, so that kinds of different length can be "
        "taken together; lost is against the same row with nobody at the clocks. The paper has throughput: here "
        "arrivals do not wait for answers.",
        "A brake takes effect at the next sample and ends at the first one after its 5 s, that is after 6 s.",
        "The training row is a square wave of the two published figures, 97 % and 37.5 %; its phases of 16 and 4 s are "
        "assumptions. The whole row is one job and one scope.",
    ),
)  # fmt: skip
