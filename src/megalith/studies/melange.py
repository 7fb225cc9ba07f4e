"""Mélange: the cheapest mix of GPU types for a load under a limit on TPOT, against the best single type.

Fleets are sized by the integer program with the published number of slices, over throughput that Megalith's cost model
predicts, and then replayed in the simulator. What the points compute is in melange_cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, median

from megalith.report.table import Column, Table
from megalith.studies.melange_cases import DEVICES
from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Claim, Computed, Experiment, Finding, Gate, Judgement, Picture, Study

ON = Arm("sizes", "on", "mix, eight slices a group")
UNCUT = Arm("uncut", "baseline", "mix, groups not cut")
PROMPT = Arm("prompt", "baseline", "mix, the router knows the prompt only")
OFF = Arm("single", "off", "best single type")
WORST = tuple(Arm(device, "baseline", f"{device} only") for device in DEVICES)
RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Published."""
SCALE = 8.0
"""The published ratios at 4 and 8 requests/s are those of 2 and 3 A100: one serves 2.7 to 4 a second. Here it is
predicted to serve 24, about eight times as many."""
ALL_RATES = (*RATES, *(rate * SCALE for rate in RATES if rate * SCALE > RATES[-1]))
LIMITS_MS = (25.0, 30.0, 35.0, 40.0, 50.0, 60.0, 80.0, 100.0, 120.0, 160.0, 200.0)
CASES = 60
SPAN_S, FAST_SPAN_S = 200.0, 30.0
"""Of a replay; the longest mean stay is 20 s."""
LEAST_REQUESTS = 1_000
"""Of a replay."""
WITHIN = 0.95
_REPLAYS = (("replay-120", "within"), ("replay-40", "within-40"))
_PLAYED = {
    "within the limit": "within", "USD an hour": "cost", "USD an hour to keep it": "kept_cost",
    "sized for, times the load": "kept_factor",
}  # fmt: skip
_CASES = "megalith.studies.melange_cases"
_SHOWN = {"USD an hour": "cost", "types in it": "types", **{f"{device}": f"n_{device}" for device in DEVICES}}


def _cost(load: str, tpot_ms: float) -> Callable[[Case], Computed]:
    def task(case: Case) -> Computed:
        options: dict[str, float | str] = {
            "arm": case.arm,
            "load": load,
            "tpot_ms": tpot_ms,
            "rate": case.at,
            "seed": case.seed,
        }
        return Computed(call=f"{_CASES}:cost", options=options)

    return task


def _limit(case: Case) -> Computed:
    options: dict[str, float | str] = {
        "arm": case.arm,
        "load": "lmsys",
        "tpot_ms": case.at,
        "rate": 64.0,
        "seed": case.seed,
    }
    return Computed(call=f"{_CASES}:cost", options=options)


def _replay(tpot_ms: float) -> Callable[[Case], Computed]:
    def task(case: Case) -> Computed:
        requests = max(LEAST_REQUESTS, round(case.at * (FAST_SPAN_S if case.fast else SPAN_S)))
        options: dict[str, float | str] = {
            "arm": case.arm, "load": "lmsys", "tpot_ms": tpot_ms, "rate": case.at, "seed": case.seed,
            "requests": requests, "keep": WITHIN,
        }  # fmt: skip
        return Computed(call=f"{_CASES}:replay", options=options)

    return task


def _worked(case: Case) -> Computed:
    return Computed(call=f"{_CASES}:worked", options={"arm": case.arm, "slices": case.at})


def _cells(case: Case) -> Computed:
    return Computed(call=f"{_CASES}:cells", options={"arm": case.arm, "host_ms": case.at})


def _exact(case: Case) -> Computed:
    return Computed(call=f"{_CASES}:exact", options={"arm": case.arm, "case": case.at})


def judge(results: Results) -> Judgement:
    """Savings over single types, the worked example, the published cells; fleets rate by rate."""
    far = [rate * SCALE for rate in RATES]
    loads = [("arena-120", "worst", "best"), ("arena-40", "worst-40", "best-40")]
    findings = [_worked_finding(results)]
    for name, worst, best in loads:
        findings.append(_largest(results, name, STUDY.claim(worst)))
        findings.append(_mean(results, name, STUDY.claim(best), RATES, "the published rates"))
        note = f"{SCALE:g} times their rates: as many instances as they had"
        findings.append(_mean(results, name, STUDY.claim(best), far, note, False))
        played = name.replace("arena", "replay")
        findings += [_kept(results, played, STUDY.claim(best), arm, far, note) for arm in (ON, PROMPT)]
    for played, claim in _REPLAYS:
        findings.append(_within(results, played, STUDY.claim(claim), RATES, "the published rates", True))
        findings.append(_within(results, played, STUDY.claim(claim), far, f"{SCALE:g} times their rates", False))
    findings += [_agreement(results, at) for at in results.places("cells")]
    pictures = [
        _savings(results, "arena-120", "Chat, TPOT 120 ms"),
        _savings(results, "arena-40", "Chat, TPOT 40 ms"),
        _savings(results, "conv-120", "Conversations of mean 1,100 prompt tokens, TPOT 120 ms"),
        Picture(
            "tpot", "Chat at 64 requests/s by the limit on TPOT", "TPOT limit, ms", logarithmic=False,
            panels={"USD an hour": {arm.title: results.curve("tpot", arm.name, "cost") for arm in (ON, OFF, *WORST)}},
        ),
    ]  # fmt: skip
    return Judgement(findings, _gates(results), {"fleets": _fleets(results)}, pictures)


def _gates(results: Results) -> list[Gate]:
    over = [value for values in results.curve("exact", ON.name, "over").values() for value in values]
    dearer = [
        max(values) for name in ("arena-120", "arena-40", "conv-120")
        for values in results.ratio(name, ON.name, OFF.name, "cost").values()
    ]  # fmt: skip
    uncut = results.middle("worked", ON.name, "cost", 0.0)
    counts = [results.middle("worked", ON.name, f"n_{device}", 0.0) for device in ("a10g", "a100-80gb")]
    right = 1.0 if counts == [1.0, 2.0] else 0.0
    gates = [
        Gate("program over brute force, worst small case", max(over, default=None), 1 - 1e-9, 1 + 1e-9, "exact"),
        Gate("mix over best single type, worst point", max(dearer, default=None), 0.0, 1 + 1e-9, "never dearer"),
        Gate("worked example, USD an hour", uncut, 8.345, 8.355, "published: 8.35"),
        Gate("worked example is 2 A100 and 1 A10G", right, 1.0, 1.0, "published"),
    ]
    share = _least_within(results, "replay-120", ON, RATES)
    gates.append(Gate("requests within 120 ms, worst rate of 1 to 32", share, WITHIN, 1.0, "at least 95 % of them"))
    return gates


def _least_within(results: Results, name: str, arm: Arm, rates: Sequence[float]) -> float | None:
    """The least share of the requests within the limit, over rates; medians over seeds."""
    curve = results.curve(name, arm.name, "within")
    return min((median(values) for rate, values in curve.items() if rate in rates), default=None)


def _within(results: Results, name: str, claim: Claim, rates: Sequence[float], note: str, counts: bool) -> Finding:
    found = [_least_within(results, name, arm, rates) for arm in (ON, OFF)]
    texts = ["-" if value is None else f"{value:.1%}" for value in found]
    return Finding(claim, found[0], texts[0], texts[1], f"simulated, worst of {note}", counts)


def _kept(results: Results, name: str, claim: Claim, arm: Arm, rates: Sequence[float], note: str) -> Finding:
    """The mean saving where mix and best single type are both over-provisioned until they keep the limit."""
    ratios = {rate: median(values) for rate, values in results.ratio(name, arm.name, OFF.name, "kept_cost").items()}
    chosen = [rate for rate in rates if rate in ratios]
    costs = [
        fmean(results.middle(name, one.name, "kept_cost", rate) or 0.0 for rate in chosen) if chosen else None
        for one in (arm, OFF)
    ]  # fmt: skip
    saved = fmean(1 - ratios[rate] for rate in chosen) if chosen else None
    word = f"{arm.title}; simulated, both larger until {WITHIN:.0%} of the requests keep the limit; {note}"
    return Finding(claim, saved, _usd(costs[0]), _usd(costs[1]), word, False)


def _worked_finding(results: Results) -> Finding:
    claim, found = STUDY.claim("worked"), None
    costs = [results.middle("worked", arm.name, "cost", 0.0) for arm in (ON, OFF)]
    if costs[0] and costs[1]:
        found = 1 - costs[0] / costs[1]
    return Finding(claim, found, _usd(costs[0]), _usd(costs[1]), "groups not cut")


def _saved(results: Results, name: str, over: Sequence[Arm], rates: Sequence[float]) -> dict[float, list[float]]:
    """By rate and seed the share that the mix costs less than the dearest of some arms."""
    found: dict[float, list[float]] = {}
    for arm in over:
        for rate, ratios in results.ratio(name, ON.name, arm.name, "cost").items():
            if rate in rates:
                before = found.get(rate, [0.0] * len(ratios))
                found[rate] = [max(a, 1 - ratio) for a, ratio in zip(before, ratios, strict=True)]
    return found


def _largest(results: Results, name: str, claim: Claim) -> Finding:
    """The largest saving over any type, at any of the published rates."""
    saved = {rate: median(values) for rate, values in _saved(results, name, WORST, RATES).items()}
    if not saved:
        return Finding(claim, None, "-", "-")
    rate = max(saved, key=lambda at: saved[at])
    mix, one = (results.middle(name, arm.name, "cost", rate) for arm in (ON, OFF))
    note = f"at {rate:g} requests/s"
    if mix is not None and one is not None and one <= mix * (1 + 1e-9):
        note += ", where the best single type saves as much: no mix is needed"
    return Finding(claim, saved[rate], _usd(mix), _usd(one), note)


def _mean(results: Results, name: str, claim: Claim, rates: Sequence[float], note: str, counts: bool = True) -> Finding:
    """The mean saving over the best single type."""
    saved = [median(values) for values in _saved(results, name, (OFF,), rates).values()]
    costs = [
        fmean(median(values) for rate, values in results.curve(name, arm.name, "cost").items() if rate in rates)
        if saved else None
        for arm in (ON, OFF)
    ]  # fmt: skip
    return Finding(claim, fmean(saved) if saved else None, _usd(costs[0]), _usd(costs[1]), note, counts)


def _agreement(results: Results, host_ms: float) -> Finding:
    ours, control = (results.middle("cells", arm.name, "agreement", host_ms) for arm in (ON, OFF))
    note = "the cost model's own engine" if not host_ms else f"{host_ms:g} ms of host time a step: an assumption"
    texts = ["-" if value is None else f"{value:.0%}" for value in (ours, control)]
    return Finding(STUDY.claim("cells"), ours, texts[0], texts[1], note, not host_ms)


def _savings(results: Results, name: str, title: str) -> Picture:
    arms = next(experiment.arms for experiment in STUDY.experiments if experiment.name == name)
    return Picture(
        name, title, "requests/s",
        panels={
            "USD an hour": {arm.title: results.curve(name, arm.name, "cost") for arm in (ON, OFF, *WORST)},
            "cost over that of the mix": {
                arm.title: results.ratio(name, arm.name, ON.name, "cost") for arm in arms if arm not in (ON, *WORST)
            },
        },
    )  # fmt: skip


def _fleets(results: Results) -> Table:
    """What is bought, rate by rate (first seed)."""
    columns = [
        Column("load", "load"), Column("rate_per_s", "requests/s", "count"),
        *(Column(device, device, "count", "predicted") for device in DEVICES),
        Column("cost", "mix, USD an hour", "number", "predicted", 4),
        Column("single", "best single type", "number", "predicted", 4),
        Column("saves", "saves", "share", "predicted"),
        Column("within", "within TPOT", "share", "simulated"),
    ]  # fmt: skip
    table = Table(columns, "Fleets of the integer program (medians over seeds)")
    for name in ("arena-120", "arena-40", "conv-120"):
        for rate in results.places(name):
            counts = [results.middle(name, ON.name, f"n_{device}", rate) for device in DEVICES]
            mix, one = (results.middle(name, arm.name, "cost", rate) for arm in (ON, OFF))
            if mix is None:
                continue
            played = name.replace("arena", "replay")
            within = results.middle(played, ON.name, "within", rate) if played != name else None
            table.add(name, rate, *counts, mix, one, 1 - mix / one if one else None, within)
    return table


def _usd(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} $/h"


def _rates(name: str, title: str, load: str, tpot_ms: float, arms: tuple[Arm, ...]) -> Experiment:
    return Experiment(
        name, title, arms, "requests/s", ALL_RATES, _cost(load, tpot_ms), 3, (4.0, 32.0), nature="predicted",
        shown=_SHOWN,
    )  # fmt: skip


_ARENA = "Llama-2-7B on L4, A10G, A100, H100, chat lengths"
_MIXES = (ON, UNCUT, PROMPT, OFF, *WORST)
STUDY = Study(
    name="melange",
    system="Mélange: Cost Efficient Large Language Model Serving by Exploiting GPU Heterogeneity",
    title="Mélange: the cheapest mix of GPU types",
    summary=(
        "Which GPU gives most tokens for a dollar depends on the size of requests, the rate and the limit on TPOT.",
        "Mélange cuts the load into groups of similar requests, looks up how many of each a GPU type serves within the",
        "limit, and an integer program buys the cheapest instances that serve every slice of every group.",
        "Control: the best single type, bought by the same throughput table.",
        "Two things save: each size on the type that is best for it, and a remainder on a small type instead of a big.",
    ),
    reference="Griggs et al., Mélange, arXiv:2404.14527; figures of its web page, solver of its release",
    claims=(
        Claim("worked", "saving of the worked example", "4.3 requests/s, A10G 0.37, A100 2.0", 0.242, (0.235, 0.25),
              0.0, ""),
        Claim("worst", "largest saving over a single type", f"{_ARENA}, 120 ms, 1 to 32/s", 0.77, (0.5, 0.8), 0.0, ""),
        Claim("best", "mean saving over the best single type", f"{_ARENA}, 120 ms", 0.25, (0.05, 0.3), 0.0, ""),
        Claim("worst-40", "largest saving over a single type", f"{_ARENA}, 40 ms, 1 to 32/s", 0.68, (0.5, 0.8), 0.0,
              ""),
        Claim("best-40", "saving over the best single type", f"{_ARENA}, 40 ms", 0.09, (0.05, 0.3), 0.0, ""),
        Claim("within", "requests within the limit", f"{_ARENA}, 120 ms", 0.995, (WITHIN, 1.0), 0.0, ""),
        Claim("within-40", "requests within the limit", f"{_ARENA}, 40 ms", 0.995, (WITHIN, 1.0), 0.0, ""),
        Claim("cells", "sizes at which A10G or A100 is better, as published", "28 of 36 cells, Llama-2-7B", 1.0,
              (0.8, 1.0), 16 / 28, ""),
    ),
    experiments=(
        _rates("arena-120", "chat (LMSYS lengths), TPOT 120 ms", "lmsys", 120.0, _MIXES),
        _rates("arena-40", "chat (LMSYS lengths), TPOT 40 ms", "lmsys", 40.0, _MIXES),
        _rates("conv-120", "conversations (Azure lengths), TPOT 120 ms, no claim", "azure-conv", 120.0, _MIXES),
        Experiment("tpot", "chat at 64 requests/s by the limit on TPOT", (ON, OFF, *WORST), "TPOT limit, ms", LIMITS_MS,
                   _limit, 3, (40.0, 120.0), nature="predicted", shown=_SHOWN),
        Experiment("replay-120", "the fleets of 120 ms under their load", (ON, PROMPT, OFF), "requests/s", ALL_RATES,
                   _replay(120.0), 2, (4.0, 32.0), nature="simulated",
                   shown=_PLAYED),
        Experiment("replay-40", "the fleets of 40 ms under their load", (ON, PROMPT, OFF), "requests/s", ALL_RATES,
                   _replay(40.0), 2, (4.0, 32.0), nature="simulated",
                   shown=_PLAYED),
        Experiment("worked", "the worked example by slices of a group (0: not cut)", (ON, OFF), "slices",
                   (0.0, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 32.0), _worked, 1, nature="predicted",
                   shown={"USD an hour": "cost", "a10g": "n_a10g", "a100-80gb": "n_a100-80gb"}),
        Experiment("cells", "published cells by host time of a step", (ON, OFF), "host time, ms",
                   (0.0, 10.0, 20.0, 40.0), _cells, 1, nature="predicted",
                   shown={"cells as published": "agreement", "cells where A10G is better": "a10g_cells"}),
        Experiment("exact", "random small cases over brute force", (ON, OFF), "case",
                   tuple(map(float, range(CASES))), _exact, 1, nature="predicted", shown={"over the optimum": "over"}),
    ),
    judge=judge,
    differences=(
        "The publication's throughput tables were not released. Ours are predicted from data sheets and from the share "
        "of them that measured operators reach; the shares of L4 and A10G are assumptions. The engine is a later one: "
        "an A100 serves about eight times as many chat requests as theirs, so rates of 1 to 32 leave most fleets at "
        "one or two instances. Rows in brackets stand at eight times the rate.",
        "Chat lengths are first turns of LMSYS-Chat (means 92 and 207); PubMed's lengths are not at hand, and "
        "conversations of Azure stand beside them without a claim.",
        "ORACLE: the router of `sizes` knows the answer's length, as the published program takes for granted; the arm "
        "`prompt` groups by the prompt alone, which a router does know.",
        "A table of mean TPOT promises nothing about single requests: `within` says what became of these in the "
        "simulator. No limit on TTFT is asked, as published.",
        "Published savings over the best single type are means of ratios read off a figure (120 ms), or the lower end "
        "of a range (40 ms: 9 to 68 % over types and rates). Bands are those of the planned gates: 5 to 30 % over the "
        "best type, 50 to 80 % over the worst, 80 % of the cells.",
        "Host time of a step is one number on all devices: stated, not fitted; its rows have no say.",
    ),
)  # fmt: skip
