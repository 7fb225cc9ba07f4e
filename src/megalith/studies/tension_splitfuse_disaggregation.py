"""SplitFuse x disaggregation: both keep prompts from stalling decodes, one inside an instance and one by a pool.

DistServe's figure 1 as a square: goodput a device with whole prompts first or SplitFuse, on instances that do both or
on two prefill instances and a decode instance, by the limit on TPOT. Step times are the same in all four cells.
"""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from msgspec.structs import replace

from megalith.specs.fleet import FleetSpec
from megalith.studies import tension
from megalith.studies.distserve_cases import SPLITFUSE, colocated, fixed, scenario, searched, split
from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Experiment, Gate, Judgement, Picture, Simulated, Study
from megalith.studies.tension import Square

TTFT_MS, LIMIT_MS = 400.0, 40.0
LIMITS_MS = (40.0, 60.0, 80.0, 100.0, 150.0)
EACH = "per_device"


class _Cell(NamedTuple):
    """The arms of one cell: budgets are tried, the best counts."""

    arms: tuple[Arm, ...]


PLAIN = Arm("plain", "off", "colocated, whole prompts first")
FUSED = tuple(Arm(f"fused-{budget}", "on", f"colocated, SplitFuse {budget}") for budget in SPLITFUSE)
APART = Arm("apart", "on", "2P+1D, whole prompts first")
BOTH = tuple(Arm(f"both-{budget}", "on", f"2P+1D, SplitFuse {budget}") for budget in SPLITFUSE)
CELLS = (_Cell((PLAIN,)), _Cell(FUSED), _Cell((APART,)), _Cell(BOTH))


def _fleet(arm: str) -> FleetSpec:
    name, _, budget = arm.partition("-")
    if name == "fused":
        return colocated("splitfuse", int(budget))
    if name == "plain":
        return colocated()
    fleet = split(2, 1)
    if name == "apart":
        return fleet
    pools = tuple(replace(pool, policy="splitfuse", token_budget=int(budget)) for pool in fleet.pools)
    return replace(fleet, pools=pools)


def _task(case: Case) -> Simulated:
    point = scenario(_fleet(case.arm), fixed(), "vllm", TTFT_MS, case.at, case.seed)
    return searched(point, case.fast)


def _square(results: Results, limit_ms: float) -> Square:
    """The best budget of each cell, median over seeds."""
    cells = []
    for cell in CELLS:
        found = [results.curve("square", arm.name, EACH).get(limit_ms) for arm in cell.arms]
        cells.append(max((median(values) for values in found if values), default=None))
    return Square(*cells)


def judge(results: Results) -> Judgement:
    """The square by limit."""
    places = results.places("square")
    squares = {limit: _square(results, limit) for limit in places}
    table = tension.square_table(
        "Goodput a device", ("SplitFuse", "disaggregation"), "TPOT limit", "requests/s",
        {f"{limit:g} ms": square for limit, square in squares.items()},
    )  # fmt: skip
    whole = squares[LIMIT_MS]
    fused_alone, apart_alone = whole.alone
    gates = [
        Gate("SplitFuse alone gains at 40 ms", fused_alone, 1.05, float("inf"), "control: whole prompts first"),
        Gate("disaggregation alone gains at 40 ms", apart_alone, 1.8, 2.5, "figure 1: 2.1, same engine"),
    ]
    panels = {
        "requests/s and device": {
            title: {limit: [value] for limit, square in squares.items() if (value := square[place]) is not None}
            for place, title in enumerate(("neither", "SplitFuse", "disaggregation", "both"))
        }
    }
    pictures = [
        Picture("interaction", "SplitFuse x disaggregation", "TPOT limit, ms",
                ratios={"gain beside over gain alone": tension.curve(squares)}, ylabel="interaction",
                claim=("gains multiply", 1.0)),
        Picture("goodput", "Goodput a device", "TPOT limit, ms", panels=panels, logarithmic=False),
    ]  # fmt: skip
    findings = [tension.finding(STUDY.claim("multiply"), whole, "the better of two token budgets in each cell")]
    return Judgement(findings, gates, {"interaction": table}, pictures)


_SETTING = "OPT-13B on A100, step times of vLLM, 512 in and 64 out, TTFT 400 ms, TPOT 40 ms"
STUDY = Study(
    name="tension-splitfuse-disaggregation",
    title="Tension: SplitFuse x disaggregation",
    summary=(
        "A long prompt stalls all who decode beside it. SplitFuse (FastGen) cuts prompts so that no pass is long;",
        "disaggregation (DistServe, Splitwise) computes prompts on other devices. Each is sold for the same stall.",
        "Here both are switched on and off at equal step times: goodput a device of an instance that does both, and of",
        "two prefill instances and a decode instance, with whole prompts first and with cut ones, by the TPOT limit.",
        "Control: the square's other three cells. Interaction 1 would mean that published gains can be multiplied.",
    ),
    reference="DeepSpeed-FastGen (arXiv:2401.08671) and DistServe (OSDI 2024); the square is Megalith's own question",
    claims=(tension.claim("multiply", "SplitFuse", "disaggregation", _SETTING),),
    experiments=(
        Experiment(
            "square", "goodput by TPOT limit", (PLAIN, *FUSED, APART, *BOTH), "TPOT limit, ms", LIMITS_MS, _task, 2,
            (40.0,), shown={"goodput a device": EACH, "requests/s": "rate"},
        ),
    ),
    judge=judge,
    differences=(
        "No publication runs this square; the claim is what adding up published gains would take for granted.",
        "Prefill and decode instances are two and one, as in DistServe's figure 1, whatever the limit.",
        "Step times are the straight lines that DistServe's simulator has for vLLM, where a token costs the same in a "
        "small chunk as in a large one; real kernels make small chunks dearer, which is against SplitFuse.",
    ),
)  # fmt: skip
