"""Splitwise's clusters for throughput, cost and power: mixes of prompt and token machines under nine limits.

The set-up is that of the study `splitwise`. Every point is a search for the highest rate of one mix; mixes spend the
same power, and what they serve for other budgets follows from their cost and power. Once as the released simulator asks
for decode times (`artifact`), once by the tokens in the cache (`context_aware`): both headlines are printed for both.
"""

from __future__ import annotations

from statistics import median

import msgspec

from megalith.base.errors import CapacityError
from megalith.plan.goodput import GoodputQuestion, goodput
from megalith.plan.machine_design import Machine, Mix, Rated, choose, mix_of, valley
from megalith.report.table import Column, Table
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult
from megalith.specs import catalog
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.fleet import PolicySpec, PoolSpec
from megalith.specs.workload_catalog import workloads
from megalith.studies.results import Results
from megalith.studies.run import StudyPoint
from megalith.studies.splitwise import MOST_TOKENS, pool_of, scenario_of
from megalith.studies.study import Arm, Case, Claim, Experiment, Finding, Gate, Judgement, Picture, Simulated, Study

POWER = 40 * 44.0
"""Of forty DGX-H100, in the published relative units (24.8 for a DGX-A100)."""
OLD = Machine("a100-80gb", 2.21, 24.8)
NEW = Machine("h100-sxm", 4.76, 44.0)
CAPPED = Machine("h100-sxm", 4.76, 0.7 * 44.0, 0.7)
"""Costs per hour and machine powers of the publication; the cap takes power away and not cost."""
KINDS: dict[str, tuple[Machine, Machine | None]] = {
    "Base-A100": (OLD, None), "Base-H100": (NEW, None), "AA": (OLD, OLD), "HH": (NEW, NEW), "HA": (NEW, OLD),
    "HHcap": (NEW, CAPPED),
}  # fmt: skip
BASES = ("Base-A100", "Base-H100")
SHARES = {"artifact": (30.0, 45.0, 60.0), "context_aware": (20.0, 35.0, 50.0)}
"""Per cent of the power that prompt machines get, around the published sizes (60 to 65, and 31 to 35 by context)."""
MODES = ("artifact", "context_aware")
REQUESTS, FAST_REQUESTS = 4_000, 1_500
"""Of a run: some 40 s at the knee, as the released runs."""
ISO_RATE = 70.0
"""Requests a second of the published cost- and power-optimal designs."""
ARMS = tuple(
    Arm(
        name,
        "off" if name in BASES else "on",
        f"{name}: {'all mixed' if name in BASES else 'prompt and token machines'}",
    )
    for name in KINDS
)


def mix(arm: str, share: float) -> Mix:
    """The mix of an arm with that per cent of the power for prompts."""
    return mix_of(arm, *KINDS[arm], POWER, share / 100)


def scenario(one: Mix, mode: str, seed: int) -> Scenario:
    """Conversation lengths drawn independently, Poisson arrivals, nine limits against a lone A100."""
    if one.token is None:
        pools: tuple[PoolSpec, ...] = (pool_of("all", one.prompt, one.prompts, "mixed"),)
        router = PolicySpec(name="least-tokens")
    else:
        pools = (
            pool_of("prompt", one.prompt, one.prompts, "prefill"),
            pool_of("token", one.token, one.tokens, "decode"),
        )
        router = PolicySpec(name="splitwise", options={"transfer": "push", "lengths": "capped"})
    load = msgspec.structs.replace(
        workloads()["azure-conv"].spec, arrivals=PoissonArrivals(rate_per_s=1.0), requests=None, max_new="true"
    )
    return scenario_of(pools, router, load, f"splitwise:{mode}", seed)


def measure(point: Point) -> PointResult:
    """The highest rate of a mix within the nine limits; 0 where there is none."""
    assert isinstance(point, StudyPoint)
    options = point.options
    spec = msgspec.structs.replace(catalog.model(point.scenario.model), max_context=MOST_TOKENS)
    found = goodput(
        GoodputQuestion(
            scenario=point.scenario,
            guess_per_s=float(options["guess"]),
            step=float(options["step"]),
            least_requests=int(options["requests"]),
            residences=0.0,
            spec=spec,
        )
    )
    return PointResult(
        key=point.key, labels=point.labels, requests=found.requests, devices=found.devices, binding=found.breaks,
        figures={"rate": found.rate_per_s, "residences": found.residences, "runs": float(found.runs)},
    )  # fmt: skip


def _experiment(mode: str, fast_at: tuple[float, ...]) -> Experiment:
    def task(case: Case) -> Simulated:
        options: dict[str, float | str] = {
            "step": 1.1 if case.fast else 1.06, "requests": FAST_REQUESTS if case.fast else REQUESTS,
            "guess": 90.0 if mode == "artifact" else 50.0,
        }  # fmt: skip
        point = scenario(mix(case.arm, case.at), mode, case.seed)
        return Simulated(scenario=point, measure=f"{__name__}:measure", options=options)

    words = "blind to context" if mode == "artifact" else "by the tokens in the cache"
    title = f"highest rate at equal power, decode {words}"
    return Experiment(
        mode, title, ARMS, "per cent of the power for prompts", SHARES[mode], task, 1, fast_at,
        shown={"requests/s": "rate", "residence times": "residences"},
    )  # fmt: skip


def rated(results: Results, mode: str) -> list[Rated]:
    """Every mix with the median of its rates."""
    found: dict[Mix, Rated] = {}
    for arm in ARMS:
        for share, rates in results.curve(mode, arm.name, "rate").items():
            one = mix(arm.name, share)
            found[one] = Rated(one, median(rates))
    return list(found.values())


def judge(results: Results) -> Judgement:
    """Both headline pairs in both modes, the chosen clusters, and how broad the valleys are."""
    findings = []
    for mode in MODES:
        have = rated(results, mode)
        for key, base, cost_share, power_share in _PAIRS:
            findings.append(_finding(have, mode, key, base, cost_share, power_share))
    tables = {"designs": _designs(results), "chosen": _chosen(results)}
    rates = {
        mode: {one.mix.design: one.rate for one in sorted(rated(results, mode), key=lambda r: r.rate)} for mode in MODES
    }
    blind = rates["artifact"]
    gain = blind["AA"] / blind["Base-A100"] if blind.get("AA") and blind.get("Base-A100") else None
    gates = [Gate("AA over Base-A100 at equal power, decode blind to context", gain, 1.9, 2.3, "published 2.15")]
    pictures = [
        Picture(mode, f"Highest rate at equal power ({mode})", "per cent of the power for prompts", logarithmic=False,
                panels={"requests/s": {arm.title: results.curve(mode, arm.name, "rate") for arm in ARMS}})
        for mode in MODES
    ]  # fmt: skip
    return Judgement(findings, gates, tables, pictures)


_PAIRS = (
    ("cheaper", "Base-H100", 0.8, None),
    ("equal", "Base-A100", 1.0, 1.0),
    ("equal-h100", "Base-H100", 1.0, 1.0),
)
"""(claim, baseline, share of its cost, share of its power that a design may have)."""


def _finding(
    have: list[Rated], mode: str, key: str, base: str, cost_share: float, power_share: float | None
) -> Finding:
    claim = STUDY.claim("equal" if key == "equal-h100" else key)
    note = f"{mode}; against {base}"
    control = next((one for one in have if one.mix.design == base), None)
    if control is None or not control.rate:
        return Finding(claim, None, "-", "-", f"{note}, which keeps the limits at no rate", mode == "artifact")
    limits = {"cost": cost_share * control.mix.cost}
    if power_share is not None:
        limits["power"] = power_share * control.mix.power
    try:
        best = choose([one for one in have if one.mix.token is not None], "rate", **limits)
    except CapacityError:
        return Finding(claim, None, "-", f"{control.rate:.3g} req/s", note, mode == "artifact")
    on = f"{best.rate:.3g} req/s: {best.mix.design} {best.mix.sizes} x {best.times:.2f}"
    off = f"{control.rate:.3g} req/s"
    return Finding(claim, best.rate / control.rate, on, off, note, mode == "artifact" and key != "equal-h100")


def _designs(results: Results) -> Table:
    """Every mix that was measured."""
    columns = [
        Column("mode", "decode times"), Column("design", "design"), Column("sizes", "machines"),
        Column("cost", "cost an hour", "number"), Column("power", "power", "number"),
        Column("rate", "highest rate, requests/s", "number", "simulated"),
        Column("valley", "within 5 % of its best", nature="simulated"),
    ]  # fmt: skip
    table = Table(columns, "Mixes at equal power")
    for mode in MODES:
        have = rated(results, mode)
        for one in have:
            broad = one.mix in valley(have, one.mix.design)
            table.add(mode, one.mix.design, one.mix.sizes, one.mix.cost, one.mix.power, one.rate, broad)
    return table


def _chosen(results: Results) -> Table:
    """Min cost, min power and max rate, by mode."""
    columns = [
        Column("mode", "decode times"), Column("objective", "cluster"), Column("design", "design"),
        Column("sizes", "machines as measured"), Column("times", "times that size", "number"),
        Column("rate", "requests/s", "number", "simulated"), Column("cost", "cost an hour", "number", "simulated"),
        Column("power", "power", "number", "simulated"),
    ]  # fmt: skip
    table = Table(columns, "Chosen clusters, mixed ones among them")
    for mode in MODES:
        have = rated(results, mode)
        for title, objective, limits in (
            (f"least cost at {ISO_RATE:g}/s", "cost", {"rate": ISO_RATE}),
            (f"least power at {ISO_RATE:g}/s", "power", {"rate": ISO_RATE}),
            ("most at the power of 40 H100 machines", "rate", {"power": POWER}),
            ("most at the cost of 40 H100 machines", "rate", {"cost": 40 * NEW.cost}),
        ):
            try:
                one = choose(have, objective, **limits)  # type: ignore[arg-type]
            except CapacityError:
                continue
            table.add(mode, title, one.mix.design, one.mix.sizes, one.times, one.rate, one.cost, one.power)
    return table


_LOAD = "BLOOM-176B, conversation lengths drawn independently, Poisson"
STUDY = Study(
    name="splitwise-designs",
    title="Splitwise: clusters of prompt and token machines for throughput, cost and power",
    summary=(
        "Given what machines cost and draw, Splitwise sizes the pool of prompt machines and that of token machines, of",
        "the same or of different kinds, by simulation under nine limits, for the least cost, the least power or the",
        "highest rate. Here: four designs, several splits of the same power, and the two published pairs.",
        "Control: the same power in machines that do both.",
    ),
    reference="Patel et al., Splitwise, ISCA 2024; step times, costs and limits of splitwise-sim (commit 8f99e7d)",
    claims=(
        Claim("cheaper", "throughput at 20 % lower cost", _LOAD, 1.4, (1.19, 1.61)),
        Claim("equal", "throughput at equal cost and power", _LOAD, 2.35, (2.0, 2.7)),
    ),
    experiments=(_experiment("artifact", (60.0,)), _experiment("context_aware", (35.0,))),
    judge=judge,
    differences=(
        "ORACLE: as in the released simulator, split designs reserve memory for the true length of each answer.",
        "The abstract does not say against which cluster its pairs stand: 1.4x at 20 % lower cost is taken against "
        "Base-H100, 2.35x at equal cost and power against Base-A100, and the latter against Base-H100 as well.",
        "Mixes are measured at one power; other budgets scale their size, rate, cost and power together.",
        "Runs have 4,000 requests, some 40 s at the knee as the released ones; rates lie on a ladder of 6 %.",
        "With decode steps blind to context token machines are nearly free to load. The rows `context_aware` do not "
        "count for the verdict: they are what is left when decode steps feel what is in the cache.",
    ),
)  # fmt: skip
"""See the module."""
