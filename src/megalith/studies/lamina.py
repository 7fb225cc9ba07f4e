"""Lamina: attention on cheaper devices with much memory, batches in rotation, against H100 alone and attention at home.

Pairs of fleets as published (1 or 2 H100 with twice as many H20, against 2 or 4 H100), by trace, by context, and in the
simulated cluster over the rate. What the points compute is in lamina_cases.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, median

import msgspec

from megalith.report.table import Column, Table
from megalith.sim.scenario import Scenario
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.fleet import FleetSpec, HandoffSpec, LinkSpec, PolicySpec, PoolSpec
from megalith.specs.workload_catalog import workloads
from megalith.specs.workload_rate import at_rate
from megalith.studies.lamina_cases import CELLS, PAIRS, SLOW
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

ON = Arm("lamina", "on", "attention on H20, two batches in rotation")
HOME = Arm("home", "off", "same devices, attention at home: KV crosses the link")
ONE = Arm("one-batch", "baseline", "attention on H20, one batch")
FAST = Arm("fast", "baseline", "33 us there and back, not 66")
WIDE = Arm("wide", "baseline", "a link for each model device")
OWN = Arm("own", "baseline", "H100 alone, as many as published")
OTHER = Arm("other", "baseline", "H20 alone, as many")
EARLY = Arm("early", "on", "q before k and v, one batch")
LATE = Arm("late", "off", "q, k and v together, one batch")
ROTATION = Arm("rotation", "baseline", "q first, two batches in rotation")
CONTEXTS = (1024.0, 2048.0, 4096.0, 8192.0, 16_384.0, 32_768.0, 65_536.0, 131_072.0)
BATCHES = (1.0, 8.0, 16.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0)
RATES = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
SIM_MODEL = "llama-65b"
ETHERNET_GBPS = 400.0
GQA = "llama-3.1-70b"
_CASES = "megalith.studies.lamina_cases"


def _cell(case: Case) -> Computed:
    return Computed(call=f"{_CASES}:cell", options={"cell": case.at, "arm": case.arm})


def _context(model: str) -> Callable[[Case], Computed]:
    def task(case: Case) -> Computed:
        return Computed(call=f"{_CASES}:by_context", options={"model": model, "context": case.at, "arm": case.arm})

    return task


def _ablation(model: str) -> Callable[[Case], Computed]:
    def task(case: Case) -> Computed:
        return Computed(call=f"{_CASES}:ablation", options={"model": model, "requests": case.at, "arm": case.arm})

    return task


def _held(model: str) -> tuple[float, ...]:
    """Batches of the sweep that the H20 of the pair have room for at 1,024 tokens."""
    return tuple(at for at in BATCHES if at <= (256 if model == GQA else 128))


def _pool(name: str, arm: str) -> PoolSpec:
    model_devices, count, own = PAIRS[SIM_MODEL]
    options = {"lamina": SLOW, "home": f"at=home/batches=1/{SLOW}"}.get(arm)
    return PoolSpec(
        name=name, role="decode", device="h100-sxm", count=1, tensor_parallel=own if options is None else model_devices,
        attention=None if options is None else f"{count}xh20/{options}", max_sequences=1_000, prefix_cache=False,
        token_budget=256,
    )  # fmt: skip


def scenario(case: Case) -> Scenario:
    """One decode instance fed by prefill instances that are never the bottleneck; their cost is not counted."""
    prefill = PoolSpec(
        name="prefill", role="prefill", device="h100-sxm", count=4, tensor_parallel=8, prefix_cache=False
    )
    fleet = FleetSpec(
        pools=(prefill, _pool("decode", case.arm)), router=PolicySpec(name="shortest-queue"),
        link=LinkSpec(bytes_per_s=50e9, latency_s=10e-6), handoff=HandoffSpec(max_waiting=10**6, max_wait_s=1e9),
    )  # fmt: skip
    load = msgspec.structs.replace(
        at_rate(workloads()["azure-conv"].spec, case.at), arrivals=PoissonArrivals(rate_per_s=case.at),
        requests=400 if case.fast else 1_500,
    )  # fmt: skip
    return Scenario(model=SIM_MODEL, timer="analytic", fleet=fleet, workload=load, seed=case.seed, sample_s=0)


def _rate(case: Case) -> Simulated:
    return Simulated(scenario=scenario(case), measure=f"{_CASES}:measure")


def judge(results: Results) -> Judgement:
    """Ratios by cell, gains by context, what sending q first saves, and how much a simulated fleet takes."""
    cells = {int(at): values[0] for at, values in results.ratio("pairs", ON.name, OWN.name, "tokens_per_s").items()}
    batch = [value[0] for value in results.ratio("pairs", ON.name, OWN.name, "requests").values()]
    claim, middle = STUDY.claim, median(cells.values()) if cells else None
    long = _gains(results, GQA, OWN, 8_192.0)
    findings = [
        Finding(claim("v2"), middle, *_both(results, middle), f"median of {len(cells)} cells"),
        Finding(claim("v2-best"), max(cells.values(), default=None), "best cell", "H100 alone"),
        Finding(claim("batch"), fmean(batch) if batch else None, "H20 hold KV", "H100 hold weights and KV"),
        Finding(claim("v1"), min(long.values(), default=None), _span(long), "H100 alone", "8K to 128K, least"),
        Finding(claim("v1-h20"), *_against_h20(results), "no claim of the paper: it compares with H100", False),
        *(_saving(results, key) for key in ("overlap-65b", "overlap-70b")),
        _taken(results),
    ]
    pictures = [
        Picture("context", "Tokens for a dollar over H100 alone", "tokens", ylabel="times as many", ratios={
            model: results.ratio(f"context-{model}", ON.name, OWN.name, "tokens_per_usd") for model in _MODELS
        }),
        Picture("rate", f"{SIM_MODEL}, simulated, one decode instance", "requests/s", logarithmic=False, panels={
            "output tokens/s": {arm.title: results.curve("rate", arm.name, "tokens_per_s") for arm in (ON, OWN, HOME)},
            "TPOT P50, s": {arm.title: results.curve("rate", arm.name, "tpot_ns.p50") for arm in (ON, OWN)},
        }),
    ]  # fmt: skip
    return Judgement(findings, _gates(results, cells, middle), {"cells": _table(results)}, pictures, _notes(results))


def _gates(results: Results, cells: dict[int, float], middle: float | None) -> list[Gate]:
    home = [value[0] for value in results.ratio("pairs", HOME.name, OWN.name, "tokens_per_s").values()]
    short = next((number for number, pair in enumerate(CELLS) if pair == (GQA, "conv")), -1)
    gains = _gains(results, GQA, OWN, 0.0)
    steps = [after / before for before, after in zip(list(gains.values()), list(gains.values())[1:], strict=False)]
    links = [
        value[0] for model in _MODELS for value in results.curve(f"context-{model}", ON.name, "link_gbps").values()
    ]
    gates = [
        Gate("tokens/s over H100 of equal cost, median of the cells", middle, 1.15, 1.6, "planned gate of P1"),
        Gate("the same, attention at home: best cell", max(home, default=None), 0.0, 0.5, "control"),
        Gate("Llama 70B and short prompts: a loss, or next to it", cells.get(short), 0.5, 1.05, "compute binds"),
        Gate("Llama 70B, gain per dollar by context: least step up", min(steps, default=None), 1.0, 10.0, "P2"),
        Gate("link needed, Gb/s, worst context", max(links, default=None), 0.0, ETHERNET_GBPS, "one 400 Gb/s link"),
    ]
    if results.fast:
        return gates
    least = results.middle_ratio("rate", ON.name, OWN.name, "tokens_per_s", RATES[0])
    return [*gates, Gate("simulated, low load: same tokens/s", least, 0.9, 1.1, "nothing to gain")]


def _gains(results: Results, model: str, over: Arm, least: float) -> dict[float, float]:
    ratios = results.ratio(f"context-{model}", ON.name, over.name, "tokens_per_usd")
    return {at: values[0] for at, values in sorted(ratios.items()) if at >= least}


def _against_h20(results: Results) -> tuple[float | None, str, str]:
    gains = _gains(results, GQA, OTHER, 8_192.0)
    return median(gains.values()) if gains else None, _span(gains), "H20 alone"


def _span(values: dict[float, float]) -> str:
    return f"{min(values.values()):.2f} to {max(values.values()):.2f}x" if values else "-"


def _both(results: Results, middle: float | None) -> tuple[str, str]:
    home = [value[0] for value in results.ratio("pairs", HOME.name, OWN.name, "tokens_per_s").values()]
    shown = "-" if middle is None else f"{middle:.3g}x of H100 alone"
    return shown, f"{median(home):.2g}x (attention at home)" if home else "-"


def _saving(results: Results, key: str) -> Finding:
    """The largest saving over the sweep of batches, as the publication's `up to`."""
    name = {"overlap-65b": "early-llama-65b", "overlap-70b": "early-llama-3.1-70b"}[key]
    ratios = {at: 1.0 - value[0] for at, value in results.ratio(name, EARLY.name, LATE.name, "tbt_ms").items()}
    at = max(ratios, key=lambda place: ratios[place], default=0.0)
    on, off = (results.middle(name, arm.name, "tbt_ms", at) for arm in (EARLY, LATE))
    with_it, without = ("-" if value is None else f"{value:.1f} ms" for value in (on, off))
    return Finding(
        STUDY.claim(key),
        ratios.get(at),
        with_it,
        without,
        f"largest over the requests that there is room for, at {at:g}",
    )


def _most(results: Results, arm: Arm) -> float | None:
    curve = results.curve("rate", arm.name, "tokens_per_s")
    return max((median(values) for values in curve.values()), default=None)


def _taken(results: Results) -> Finding:
    on, own, home = (_most(results, arm) for arm in (ON, OWN, HOME))
    with_it, without = ("-" if value is None else f"{value:,.0f} tokens/s" for value in (on, own))
    note = f"simulated, most over the rates; attention at home {home:,.0f}" if home else "simulated"
    return Finding(STUDY.claim("simulated"), on / own if on and own else None, with_it, without, note)


def _table(results: Results) -> Table:
    columns = [Column("cell", "model, lengths")]
    columns += [Column(arm.name, arm.title, "number", "predicted") for arm in (ON, FAST, WIDE, ONE, HOME, OTHER)]
    columns += [
        Column("usd", "per dollar", "number", "predicted"),
        Column("batch", "requests", "number", "predicted"),
        Column("tbt", "TBT, ms; H100 alone", "text", "predicted"),
        Column("link", "link needed, Gb/s", "number", "predicted"),
    ]
    table = Table(columns, "Decode throughput over H100 alone")
    for number, (model, trace) in enumerate(CELLS):
        at = float(number)
        values = [
            results.middle_ratio("pairs", arm.name, OWN.name, "tokens_per_s", at)
            for arm in (ON, FAST, WIDE, ONE, HOME, OTHER)
        ]
        per_usd, batch = (
            results.middle_ratio("pairs", ON.name, OWN.name, name, at) for name in ("tokens_per_usd", "requests")
        )
        on, own = (results.middle("pairs", arm.name, "tbt_ms", at) for arm in (ON, OWN))
        times = "-" if on is None or own is None else f"{on:.1f}; {own:.1f}"
        table.add(f"{model} {trace}", *values, per_usd, batch, times, results.middle("pairs", ON.name, "link_gbps", at))
    table.notes.append("Without prefill. Rates, not a measurement; prices of H20 are an assumption.")
    return table


def _notes(results: Results) -> list[str]:
    gains = _gains(results, GQA, OTHER, 0.0)
    return [
        f"Against H20 alone, at the same prices, {GQA} gives {_span(gains)} tokens for a dollar over 1K to 128K: where "
        "a device that costs 0.42 of an H100 streams weights as fast, the cheap fleet of one kind wins at long "
        "contexts. The publication compares with H100 only; with a limit on TPOT or little room the order may turn.",
    ]


_MODELS = ("llama-65b", GQA)
_SHOWN = {
    "tokens/s": "tokens_per_s", "tokens/$": "tokens_per_usd", "TBT, ms": "tbt_ms", "requests": "requests",
    "link needed, Gb/s": "link_gbps",
}  # fmt: skip
STUDY = Study(
    name="lamina",
    system="Efficient and Economic Large Language Model Inference with Attention Offloading",
    title="Lamina: attention on other devices",
    summary=(
        "A decode is matrices, which want batches, and attention, which wants memory and its bandwidth.",
        "Lamina keeps KV and attention on cheaper devices with much memory and sends q, k, v and o over a network:",
        "(2 + 2/G) e d bytes a layer and request, whatever the context. Batches rotate, so that both sides are busy.",
        "Baseline: H100 alone at about the same cost. Control: the same devices with attention at home.",
        "Beside it H20 alone, which the publication does not compare with.",
    ),
    reference="Chen et al., Lamina, arXiv:2405.01814 (v1: attention offloading; v2: model-attention disaggregation)",
    claims=(
        Claim("v2", "tokens/s over H100 of equal cost", "+16.1 to +90.1 %", 1.161, (1.161, 1.901)),
        Claim("v2-best", "the same, best cell", "+90.1 %", 1.901, (1.7, 2.1)),
        Claim("batch", "requests at once over H100 alone", "mean", 2.39, (1.91, 2.87)),
        Claim("v1", "tokens for a dollar over H100 alone", "1.48 to 12.1x, Llama 70B, least at 8K and more", 1.48,
              (1.48, 12.1)),
        Claim("v1-h20", "tokens for a dollar over H20 alone", "Llama 70B, 8K and more", 1.48, (1.48, 12.1)),
        Claim("overlap-65b", "TBT saved by sending q first, LLaMA-65B", "up to", 0.132, (0.106, 0.158), 0.0, ""),
        Claim("overlap-70b", "TBT saved by sending q first, Llama 70B", "up to", 0.035, (0.028, 0.042), 0.0, ""),
        Claim("simulated", "most tokens/s of one decode instance", "LLaMA-65B, Azure conversation lengths, Poisson",
              1.161, (1.161, 1.901)),
    ),
    experiments=(
        Experiment(
            "pairs", "pairs by model and trace: " + ", ".join(f"{i} {m} {t}" for i, (m, t) in enumerate(CELLS)),
            (ON, HOME, OWN, OTHER, ONE, FAST, WIDE), "cell", tuple(float(number) for number in range(len(CELLS))),
            _cell, 1, nature="predicted", shown=_SHOWN,
        ),
        *(
            Experiment(
                f"context-{model}", f"{model} by context", (ON, HOME, OWN, OTHER), "tokens", CONTEXTS, _context(model),
                1, nature="predicted", shown=_SHOWN,
            ) for model in _MODELS
        ),
        *(
            Experiment(
                f"early-{model}", f"{model}, 1,024 tokens, by requests", (EARLY, LATE, ROTATION), "requests",
                _held(model),
                _ablation(model), 1, (32.0, _held(model)[-1]), nature="predicted",
                shown={"TBT, ms": "tbt_ms"},
            ) for model in _MODELS
        ),
        Experiment(
            "rate", f"{SIM_MODEL} on the simulated cluster", (ON, OWN, HOME), "requests/s", RATES, _rate, 3, (10.0,),
            shown={"output tokens/s": "tokens_per_s", "TPOT P50, s": "tpot_ns.p50", "E2E mean, s": "e2e_ns.mean"},
        ),
    ),
    judge=judge,
    profiles=("h100-sxm and h20 of the catalogue: 80 % of 3.35 and 4.0 TB/s; one link of 45.7 GB/s each way, 66 us",),
    differences=(
        "Both sides have the same cost model: the published gain also holds what vLLM of 2024 lost elsewhere.",
        "One link for an instance, as in the planned gate; a link for each model device is a column. The fast network "
        "of the publication (33 us) is another.",
        "The H20's rates are carried over from H100, its price is 0.42 of the catalogue's H100: an assumption.",
        "KV held: prompt and half of the answer, mean of each trace. Decode only; prefill is elsewhere on both sides.",
        "A step of a rotation is its steady state; when requests come and go the rotation does not stumble here.",
        "Bands of claims without a published range are 20 % either way.",
        "More than two batches on several replicas are supported (batches=3), and not in the pairs.",
    ),
)  # fmt: skip
