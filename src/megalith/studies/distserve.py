"""DistServe: prefill and decode on devices of their own, judged by goodput a device, and how that hangs on the limits.

Every point is a search for the highest rate at which nine of ten requests keep TTFT and TPOT at once, on the step times
of DistServe's simulator. Both sides of a ratio have the same step times, unless a row says otherwise.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from megalith.report.table import Column, Table
from megalith.studies.distserve_cases import SPLITFUSE, Engine, conversations, fixed, fleet_of, scenario, searched
from megalith.studies.results import Results, crossing
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

ENGINES: tuple[Engine, ...] = ("vllm", "distserve")
TPOT_MS = (30.0, 35.0, 40.0, 50.0, 60.0, 80.0, 100.0, 120.0, 150.0, 200.0)
EACH = "per_device"
COLOCATED = Arm("colocated", "off", "both phases, prefill-first")
WIDE = Arm("colocated-tp2", "baseline", "both phases, prefill-first, tp2")
CHUNKED = tuple(Arm(f"splitfuse-{n}", "baseline", f"both phases, splitfuse {n}") for n in SPLITFUSE)
PROMPTS = Arm("prefill", "baseline", "prefill alone")
TOKENS = Arm("decode", "baseline", "decode alone")
SPLIT = Arm("2p1d", "on", "2 prefill, 1 decode")
PAIR = Arm("1p1d", "on", "1 prefill, 1 decode")
WIDE_PAIR = Arm("tp2-1p1d", "on", "1 prefill tp2, 1 decode")
OWN_PAIR = Arm("tp2-1p1d-own", "on", "1 prefill tp2, 1 decode, DistServe's engine")
OWN = Arm("colocated-own", "baseline", "both phases, DistServe's engine")
SEARCH, ALL = Arm("search", "on", "search with bounds"), Arm("enumeration", "off", "every candidate")
Curves = dict[float, list[float]]


def _figure1(engine: Engine) -> Experiment:
    def task(case: Case) -> Simulated:
        point = scenario(fleet_of(case.arm), fixed(), engine, 400, case.at, case.seed)
        return searched(point, case.fast, case.arm)

    arms = (SPLIT, COLOCATED, *CHUNKED, PROMPTS, TOKENS)
    title = f"512 in, 64 out, TTFT 400 ms, step times of {engine}"
    return Experiment(f"figure1-{engine}", title, arms, "TPOT limit, ms", TPOT_MS, task, 3, (40.0, 100.0), shown=_SHOWN)


def _conv(engine: Engine) -> Experiment:
    def task(case: Case) -> Simulated:
        point = scenario(fleet_of(case.arm), conversations(), engine, 250, case.at, case.seed)
        return searched(point, case.fast, case.arm)

    arms = (PAIR, COLOCATED, WIDE, *CHUNKED, PROMPTS, TOKENS)
    title = f"Azure conversations up to 2,048 tokens, TTFT 250 ms, step times of {engine}"
    return Experiment(f"conv-{engine}", title, arms, "TPOT limit, ms", (40.0, 100.0), task, 2, (40.0,), shown=_SHOWN)


def _engines(case: Case) -> Simulated:
    own = case.arm.endswith("-own")
    arm = case.arm.removesuffix("-own")
    point = scenario(fleet_of(arm), conversations(), "distserve" if own else "vllm", case.at, 100, case.seed)
    return searched(point, case.fast)


def _horizon(case: Case) -> Simulated:
    point = scenario(fleet_of(case.arm), conversations(), "distserve", 200, 100, case.seed)
    return searched(point, case.fast, least=round(case.at), residences=0.0)


def _place(case: Case) -> Computed:
    options: dict[str, float | str] = {
        "tpot_ms": case.at, "seed": case.seed, "step": 1.05, "exhaustive": case.arm == ALL.name,
    }  # fmt: skip
    return Computed(call="megalith.studies.distserve_cases:place", options=options)


def judge(results: Results) -> Judgement:
    """The ratios by engine and limit, where they cross 1, and what the published ones are made of."""
    claim = STUDY.claim
    ratios = {engine: gains(results, f"figure1-{engine}", SPLIT.name) for engine in ENGINES}
    ideals = {engine: gains(results, f"figure1-{engine}") for engine in ENGINES}
    findings = [
        _row(results, claim("figure1"), ratios[engine].get(40.0), f"figure1-{engine}", SPLIT.name, 40.0,
             engine == "vllm", f"2P+1D, both sides with the step times of {engine}")
        for engine in ENGINES
    ]  # fmt: skip
    findings += _findings(results)
    pictures = [
        Picture(
            "tightness", "Split over colocated, same step times, 512 in and 64 out", "TPOT limit, ms",
            ratios={
                f"{engine}: {title}": curve
                for engine in ENGINES
                for title, curve in (("ideal P:D over prefill-first", ideals[engine]),
                                     ("ideal P:D over splitfuse", gains(results, f"figure1-{engine}", chunked=True)))
            },
            ylabel="goodput a device", claim=("published, 40 ms", 2.1), logarithmic=False,
        ),
        Picture(
            "goodput", "Goodput a device, step times of vLLM, 512 in and 64 out", "TPOT limit, ms", logarithmic=False,
            panels={"requests/s and device": {
                arm.title: results.curve("figure1-vllm", arm.name, EACH)
                for arm in (SPLIT, COLOCATED, *CHUNKED, PROMPTS, TOKENS)
            }},
        ),
    ]  # fmt: skip
    tables = {"rows": _rows(results), "tightness": _tightness(results), "crossover": _crossovers(results)}
    if not results.fast:
        tables["horizon"] = _horizons(results)
    return Judgement(findings, _gates(results, ratios["vllm"]), tables, pictures)


def _findings(results: Results) -> list[Finding]:
    """Rows beside figure 1: another load, another engine on one side, and the same rate at a tighter limit."""
    claim, found = STUDY.claim, []
    at = 40.0 if results.fast else 100.0
    conv = {engine: gains(results, f"conv-{engine}").get(at) for engine in ENGINES}
    found += [
        _row(results, claim("rate"), conv[engine], f"conv-{engine}", "", at, engine == "vllm",
             f"conversations, TPOT {at:g} ms, ideal P:D, both sides with the step times of {engine}")
        for engine in ENGINES
    ]  # fmt: skip
    if results.fast:
        return found
    mixed = results.ratio("engines", OWN_PAIR.name, COLOCATED.name, EACH)
    place = min((one for one in mixed if mixed[one]), default=250.0)
    note = "DistServe's step times over vLLM's: engines and mechanism mixed"
    low = results.middle("engines", COLOCATED.name, EACH, 200.0)
    if low == 0:
        note += "; at TTFT 200 ms vLLM's cannot keep the limits at all and the ratio has no bound"
    ours = mixed.get(place)
    row = _row(results, claim("rate"), ours, "engines", OWN_PAIR.name, place, False, f"{note}; TTFT {place:g} ms")
    tight = _tighter(results)
    on, off = (f"{value:.3g} ms" if value else "-" for value in (tight, 100.0))
    note = "at the goodput that colocated vLLM step times have at 100 ms; TPOT only, ideal P:D"
    return [*found, row, Finding(claim("slo"), 100.0 / tight if tight else None, on, off, note, False)]


def _row(
    results: Results,
    claim: Claim,
    values: list[float] | None,
    experiment: str,
    arm: str,
    at: float,
    counts: bool,
    note: str,
) -> Finding:
    with_it = (
        median(ideal(results, experiment).get(at, [0.0])) if not arm else results.middle(experiment, arm, EACH, at)
    )
    off = results.middle(experiment, COLOCATED.name, EACH, at)
    texts = ["-" if value is None else f"{value:.3g} req/s a device" for value in (with_it, off)]
    return Finding(claim, median(values) if values else None, texts[0], texts[1], note, counts)


def ideal(results: Results, experiment: str) -> Curves:
    """Goodput a device with as many instances of each phase as it takes to match their rates, seed by seed."""
    found: Curves = {}
    for case in results.cases[experiment]:
        if case.arm == PROMPTS.name:
            pair = [results.get(experiment, case._replace(arm=arm.name)) for arm in (PROMPTS, TOKENS)]
            rates = [None if one is None else one.figures[EACH] for one in pair]
            if all(rates):
                found.setdefault(case.at, []).append(1 / sum(1 / rate for rate in rates if rate))
    return found


def best(results: Results, experiment: str, chunked: bool) -> Curves:
    """Goodput of an instance that does both: prefill-first, or the better budget of splitfuse, seed by seed."""
    names = [arm.name for arm in CHUNKED] if chunked else [COLOCATED.name]
    have = {case.arm for case in results.cases[experiment]}
    curves = [results.curve(experiment, name, EACH) for name in names if name in have]
    return {at: [max(pair) for pair in zip(*(curve[at] for curve in curves), strict=True)]
            for at in curves[0] if all(at in curve for curve in curves)}  # fmt: skip


def gains(results: Results, experiment: str, arm: str = "", chunked: bool = False) -> Curves:
    """Of the split `arm` (without a name: the ideal one) over one instance that does both, where that has any."""
    over = results.curve(experiment, arm, EACH) if arm else ideal(results, experiment)
    under = best(results, experiment, chunked)
    return {
        at: [a / b for a, b in zip(over[at], under[at], strict=True)]
        for at in over
        if at in under and len(over[at]) == len(under[at]) and all(under[at])
    }


def crossover(curve: Curves) -> float | None:
    """Where the ratio first falls to 1; None where it does not."""
    return crossing(curve, rising=False)


def _tighter(results: Results) -> float | None:
    """The TPOT limit at which the ideal split still has what colocated has at 100 ms."""
    wanted = results.middle("figure1-vllm", COLOCATED.name, EACH, 100.0)
    points = [(at, median(values)) for at, values in sorted(ideal(results, "figure1-vllm").items())]
    for (low, before), (high, after) in pairwise(points):
        if wanted is not None and before < wanted <= after:
            return low + (high - low) * (wanted - before) / (after - before)
    return None


def _gates(results: Results, ratios: Curves) -> list[Gate]:
    first, second = (median(ratios[at]) if ratios.get(at) else None for at in (40.0, 100.0))
    fall = first - second if first is not None and second is not None else None
    pairs = [
        abs(a / b - 1) for at in results.places("placement")
        for a, b in zip(*(results.curve("placement", arm.name, EACH).get(at, []) for arm in (SEARCH, ALL)), strict=True)
        if b
    ]  # fmt: skip
    resident = [
        value for engine in ENGINES for arm in (SPLIT, COLOCATED)
        for values in results.curve(f"figure1-{engine}", arm.name, "residences").values() for value in values if value
    ]  # fmt: skip
    return [
        Gate(
            "figure 1: 2P+1D over colocated, a device, TPOT 40 ms, vLLM's step times", first, 1.8, 2.5, "published 2.1"
        ),
        Gate("the gain falls from TPOT 40 to 100 ms", fall, 0.1, 10.0, "tightness curve"),
        Gate("placement search against enumeration, largest difference", max(pairs, default=None), 0.0, 0.0, "equal"),
        Gate("shortest run behind a goodput, in mean residence times", min(resident, default=None), 10.0, 1e9, "10"),
    ]


def _rows(results: Results) -> Table:
    """The table of both loads, both sets of step times and both limits."""
    columns = [
        Column("load", "load"),
        Column("engine", "step times of"),
        Column("tpot_ms", "TPOT limit, ms", "count"),
        Column("colocated", "colocated", "number", "simulated"),
        Column("chunked", "splitfuse", "number", "simulated"),
        Column("prefill", "prefill alone", "number", "simulated"),
        Column("decode", "decode alone", "number", "simulated"),
        Column("split", "split as said, a device", "number", "simulated"),
        Column("ideal", "ideal P:D, a device", "number", "simulated"),
        Column("ratio", "split / colocated", "number", "simulated"),
        Column("ideal_ratio", "ideal / colocated", "number", "simulated"),
        Column("chunked_ratio", "ideal / splitfuse", "number", "simulated"),
    ]
    table = Table(columns, "Requests a second and device, both sides with the same step times (medians over seeds)")
    loads = (
        ("figure1", "512/64, TTFT 400 ms, 2P+1D", SPLIT.name),
        ("conv", "conversations, TTFT 250 ms, 1P+1D", PAIR.name),
    )
    for load, title, arm in loads:
        for engine in ENGINES:
            experiment = f"{load}-{engine}"
            for at in (40.0, 100.0):
                if at in results.places(experiment):
                    curves = (
                        best(results, experiment, False), best(results, experiment, True),
                        results.curve(experiment, PROMPTS.name, EACH), results.curve(experiment, TOKENS.name, EACH),
                        results.curve(experiment, arm, EACH), ideal(results, experiment),
                        gains(results, experiment, arm), gains(results, experiment),
                        gains(results, experiment, chunked=True),
                    )  # fmt: skip
                    values = [median(curve[at]) if curve.get(at) else None for curve in curves]
                    table.add(title, engine, round(at), *values)
    return table


def _tightness(results: Results) -> Table:
    """Gains by limit."""
    columns = [Column("tpot_ms", "TPOT limit, ms", "count")]
    curves = []
    for engine in ENGINES:
        for key, title, arm, chunked in (
            ("split", "2P+1D / colocated", SPLIT.name, False), ("ideal", "ideal / colocated", "", False),
            ("chunked", "ideal / splitfuse", "", True),
        ):  # fmt: skip
            columns.append(Column(f"{engine}_{key}", f"{engine}: {title}", "number", "simulated"))
            curves.append(gains(results, f"figure1-{engine}", arm, chunked))
    table = Table(columns, "Gain by the limit on TPOT (512/64, TTFT 400 ms, medians over seeds)")
    for at in results.places("figure1-vllm"):
        table.add(round(at), *(median(curve[at]) if curve.get(at) else None for curve in curves))
    return table


def _crossovers(results: Results) -> Table:
    """From which limit on splitting does not pay."""
    columns = [
        Column("engine", "step times of"),
        Column("split", "split"),
        Column("against", "against"),
        Column("crossover_ms", "the gain is gone from a TPOT limit of, ms", "number", "simulated"),
        Column("loosest", "gain at the loosest limit", "number", "simulated"),
    ]
    table = Table(columns, "Where splitting stops to pay (512/64, TTFT 400 ms)")
    for engine in ENGINES:
        for split, arm in (("2P+1D", SPLIT.name), ("ideal P:D", "")):
            for against, chunked in (("prefill-first", False), ("splitfuse", True)):
                curve = gains(results, f"figure1-{engine}", arm, chunked)
                loosest = median(curve[max(curve)]) if curve else None
                table.add(engine, split, against, crossover(curve), loosest)
    return table


def _horizons(results: Results) -> Table:
    """The goodput of the project's README, by how many requests a run has."""
    columns = [
        Column("requests", "requests of a run", "count"),
        Column("split", "(2,1 | 1,1), a device", "number", "simulated"),
        Column("colocated", "colocated, a device", "number", "simulated"),
        Column("residences", "mean residence times", "number", "simulated"),
        Column("published", "published", "number"),
    ]
    table = Table(columns, "Finite horizon: conversations, TTFT 200 ms, TPOT 100 ms, DistServe's step times")
    for at in results.places("horizon"):
        values = [results.middle("horizon", arm.name, EACH, at) for arm in (WIDE_PAIR, COLOCATED)]
        table.add(round(at), *values, results.middle("horizon", WIDE_PAIR.name, "residences", at), 1.56)
    return table


_SHOWN = {"goodput, requests/s": "rate", "a device": EACH, "residence times": "residences"}
STUDY = Study(
    name="distserve",
    system="DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving",
    title="DistServe: prefill and decode on devices of their own",
    summary=(
        "A prompt holds up every decode of its batch, and decodes keep prompts waiting: to keep both TTFT and TPOT, a",
        "device that does both must run far below what it could. DistServe gives each phase instances of its own, cut",
        "as suits it, and lets the decode side fetch KV when it has room. The measure is goodput: the highest rate at",
        "which nine of ten requests keep both limits, a device.",
        "Control: the same step times on instances that do both, whole prompts first; and with prompts in chunks.",
    ),
    reference="Zhong et al., DistServe, OSDI 2024; step times and KV capacities of LLMServe/DistServe",
    claims=(
        Claim("figure1", "goodput a device, 2P+1D over colocated", "OPT-13B on A100, 512/64, TTFT 400 ms, TPOT 40 ms",
              2.1, (1.8, 2.5)),
        Claim("rate", "request rate within the limits over colocated", "conversations (ShareGPT as published), OPT-13B",
              4.48, (3.8, 5.2)),
        Claim("slo", "tighter limit at the same rate", "OPT-13B; recorded in the project's notebook for ShareGPT",
              1.74, (1.5, 2.0)),
    ),
    experiments=(
        *(_figure1(engine) for engine in ENGINES),
        *(_conv(engine) for engine in ENGINES),
        Experiment(
            "engines", "Step times of different engines on the two sides, conversations, TPOT 100 ms",
            (OWN_PAIR, COLOCATED, OWN, WIDE_PAIR), "TTFT limit, ms", (200.0, 250.0, 400.0), _engines, 2, (250.0,),
            shown=_SHOWN,
        ),
        Experiment(
            "horizon", "How long a run has to be, conversations, TTFT 200 ms, TPOT 100 ms", (WIDE_PAIR, COLOCATED),
            "requests of a run", (100.0, 300.0, 1000.0, 3000.0), _horizon, 2, (300.0,), shown=_SHOWN,
        ),
        Experiment(
            "placement", "Placement in a node of four, 512/64, TTFT 400 ms", (SEARCH, ALL), "TPOT limit, ms",
            (40.0, 100.0), _place, 1, (40.0,),
            shown={"goodput a device": EACH, "units simulated": "units", "prefill instances": "prefills",
                   "prefill tp": "prefill_tp", "decode instances": "decodes", "decode tp": "decode_tp"},
        ),
    ),
    judge=judge,
    differences=(
        "Step times include the dispatch overhead of the published simulator (2 ms and 0.1 us a token of every step); "
        "a step with prompts and decodes, which neither had, costs the tokens of both and the larger fixed part.",
        "KV goes over NVLink here (300 GB/s); the published simulator has no transfer at all.",
        "Goodput is searched on a ladder of 2 % with at least 1,000 requests and ten mean residence times a run; the "
        "published search takes 300 requests, and a short run never sees its steady state (see `horizon`).",
        "ShareGPT's prepared lengths are not public: Azure conversations up to 2,048 tokens (the built-in load "
        "azure-conv, prompts and answers drawn each on their own) stand in for them, as Poisson arrivals.",
        "The published 4.48x compares engines: DistServe's own step times are a third shorter than vLLM's then were. "
        "Rows with the same step times on both sides are what the mechanism does; the mixed row is not to be quoted "
        "alone.",
        "Replanning on drift is not reproduced. One search in a node stands for both algorithms; high affinity is "
        "`megalith plan placement --affinity high`.",
    ),
)  # fmt: skip
"""See the module."""
