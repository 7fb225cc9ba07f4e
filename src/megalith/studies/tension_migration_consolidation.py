"""Migration x consolidation: Llumnix moves requests into slack, and a fleet that follows its load keeps none.

Llumnix's own set-up with long answers: fleets of a fixed size against one that scales itself, each with live migration
and without, at an equal P99 of the time to the first token.
"""

from __future__ import annotations

from statistics import mean, median

from megalith.studies import tension
from megalith.studies.llumnix import (
    FREENESS,
    OFF,
    ON,
    bursts,
    fleet_of,
    pool_of,
    scaling,
    scenario_of,
    task_of,
)  # fmt: skip
from megalith.studies.results import Results
from megalith.studies.study import Case, Experiment, Gate, Judgement, Picture, Simulated, Study
from megalith.studies.tension import Square

LIMITS_S = (2.0, 3.5, 5.0, 7.5, 10.0, 15.0)
"""P99 of the time to the first token that is kept."""
LIMIT_S = 5.0
SIZES = (7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 16.0)
THRESHOLDS = (*FREENESS, 110.0, 140.0)


def _fixed(case: Case) -> Simulated:
    return task_of(scenario_of(fleet_of(case.arm, pool_of(int(case.at))), bursts(case), case.seed))


def _cheapest(results: Results, experiment: str, arm: str, limit_s: float) -> float | None:
    """One over the least instance hours, over sizes or thresholds, with a median P99 within the limit."""
    hours, p99 = (results.curve(experiment, arm, figure) for figure in ("instance_hours", "ttft_ns.p99"))
    least = min((mean(hours[at]) for at in hours if median(p99[at]) <= limit_s), default=None)
    return None if least is None else 1 / least


def _square(results: Results, limit_s: float) -> Square:
    return Square(
        *(
            _cheapest(results, experiment, arm.name, limit_s)
            for experiment, arm in (("fixed", OFF), ("fixed", ON), ("scaling", OFF), ("scaling", ON))
        )
    )


def judge(results: Results) -> Judgement:
    """Instance hours at equal P99, by limit."""
    squares = {limit: _square(results, limit) for limit in LIMITS_S}
    table = tension.square_table(
        "Requests kept within the limit per instance hour, relative", ("migration", "scaling"), "P99 of TTFT", "1/h",
        {f"{limit:g} s": square for limit, square in squares.items()},
    )  # fmt: skip
    whole = squares[LIMIT_S]
    hours = {name: None if value is None else 1 / value for name, value in whole._asdict().items()}
    said = ", ".join(f"{name} {'-' if value is None else f'{value:.3g} h'}" for name, value in hours.items())
    gates = [Gate("scaling alone saves hours", whole.alone[1], 1.0, float("inf"), "control: a fleet of fixed size")]
    pictures = [
        Picture("interaction", "Migration x scaling", "P99 of the time to the first token, s",
                ratios={"gain beside over gain alone": tension.curve(squares)}, ylabel="interaction",
                claim=("gains multiply", 1.0)),
        Picture("p99", "P99 of the time to the first token", "instances (fixed) or threshold (scaling)",
                panels={f"{name} fleet: P99, s": {arm.title: results.curve(name, arm.name, "ttft_ns.p99")
                                                  for arm in (ON, OFF)} for name in ("fixed", "scaling")}),
    ]  # fmt: skip
    findings = [tension.finding(STUDY.claim("multiply"), whole, f"instance hours: {said}")]
    return Judgement(findings, [] if results.fast else gates, {"square": table}, pictures)


_SHOWN = {
    "instance hours": "instance_hours", "mean instances": "mean_instances", "TTFT P99, s": "ttft_ns.p99",
    "preemptions": "preemptions", "moves": "moves",
}  # fmt: skip
_SETTING = "LLaMA-7B on A10, lengths of mean 512/512, Gamma arrivals of CV 2, 2 requests/s, P99 of 5 s"
STUDY = Study(
    name="tension-migration-consolidation",
    title="Tension: live migration x consolidation",
    summary=(
        "Live migration (Llumnix) moves running requests to where there is room; consolidation (scaling, Mélange,",
        "HARMONY) takes away the room that is not used. Each is sold with its gain over a plain fleet.",
        "Here both are switched on and off: fleets of a fixed size and one that scales itself by mean freeness, with",
        "migration and without, each at the least instance hours that keep one P99 of the time to the first token.",
        "Control: the square's other three cells. Interaction 1 would mean that published gains can be multiplied.",
    ),
    reference="Llumnix (OSDI 2024) for both mechanisms; the square is Megalith's own question",
    claims=(tension.claim("multiply", "migration", "scaling", _SETTING),),
    experiments=(
        Experiment(
            "fixed", "fleets of a fixed size", (ON, OFF), "instances", SIZES, _fixed, 5, (10.0, 14.0), shown=_SHOWN
        ),
        Experiment(
            "scaling", "a fleet that scales itself", (ON, OFF), "mean freeness to start more", THRESHOLDS, scaling, 5,
            (25.0, 65.0), shown=_SHOWN,
        ),
    ),
    judge=judge,
    differences=(
        "No publication runs this square; the claim is what adding up published gains would take for granted.",
        "Fixed fleets are given the best size for the whole run, which nobody knows beforehand.",
        "Hours are whole fleets' hours until the last request has ended; the least that any size or threshold needs.",
    ),
)  # fmt: skip
