"""SambaNova SN40L (arXiv:2405.07518): a composition of 150 experts behind one node, weights in three tiers of memory.

Predicted with `plan coe` and simulated with turns by model: switch times, the latency of the published requests on
SN40L and DGX nodes with what of it is switching and what decode, the footprint, hit rates of the cache against Che's
approximation, grouping against the order of arrival. The chip is a profile; fusion is a cost factor, not executed.
"""

from __future__ import annotations

from statistics import mean

from megalith.cost.expert_cache import lru_hit_rate, popularity
from megalith.plan.experts import nodes_for
from megalith.report.table import Column, Table
from megalith.specs.node import node
from megalith.studies import sn40l_cases as cases
from megalith.studies.results import Results, quotient
from megalith.studies.sn40l_cases import (
    A100,
    A100_ALL,
    AFFINE,
    AHEAD,
    ARRIVAL,
    EXPERTS,
    GROUPED,
    H100,
    H100_ALL,
    IDEAL,
    KERNELS,
    NO_DDR,
    PLANNED,
    REQUESTS,
    RUN,
    SKEWS,
    SN40L,
    SPREAD,
    Platform,
)
from megalith.studies.study import Arm, Claim, Experiment, Finding, Gate, Judgement, Picture, Study

COUNTS = (1.0, 10.0, 20.0, 30.0, 35.0, 40.0, 45.0, 50.0, 75.0, 100.0, 150.0, 300.0, 850.0)
RUN_COUNTS = (1.0, 20.0, 35.0, 50.0, 75.0, 100.0, 150.0)
SLOTS = (5.0, 10.0, 20.0, 35.0, 50.0, 75.0, 100.0, 125.0)
CLIENTS = (1.0, 4.0, 16.0, 64.0)
RATES = (8.0, 16.0, 24.0, 32.0)
RECALLED_EXPERTS = 850
"""Experts of the published footprint, from memory and not read again."""
BAND = 0.25
CACHE_ARMS = tuple(
    Arm(f"zipf-{skew:g}", "on" if skew else "off", f"Zipf {skew:g}" if skew else "uniform") for skew in SKEWS
)
TITLES = [f"{output} tokens, batch {batch}" for output, batch in REQUESTS]


def judge(results: Results) -> Judgement:
    """Switching, overall ratios and their parts, footprint, hit rates."""
    findings = [*_switching(results), *_overall(results), *_footprint()]
    tables = {
        "parts": _parts_table(results), "counts": _counts_table(results), "cache": _cache_table(results),
        "grouping": _grouping_table(results), "affinity": _affinity_table(results),
    }  # fmt: skip
    return Judgement(findings, _gates(results), tables, _pictures(results), _notes(results))


def _planned(results: Results, platform: Platform, figure: str, at: float, experiment: str = "experts") -> float | None:
    return results.middle(experiment, platform.arm.name, figure, at)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"


def _switching(results: Results) -> list[Finding]:
    ours, all_findings = _planned(results, SN40L, "switch_ms", EXPERTS), []
    for key, one, links in (("switch-a100", A100, A100_ALL), ("switch-h100", H100, H100_ALL)):
        theirs, wide = (_planned(results, other, "switch_ms", EXPERTS) for other in (one, links))
        all_findings += [
            Finding(STUDY.claim(key), quotient(theirs, ours), _ms(ours), _ms(theirs), "13.48 GB, one model"),
            Finding(STUDY.claim(key), quotient(wide, ours), _ms(ours), _ms(wide), "all eight links of the DGX", False),
        ]
    return all_findings


def _overall(results: Results) -> list[Finding]:
    """The published setting is not said: 20 tokens for one request counts, the others stand beside it."""
    found = []
    for key, one, links in (("overall-a100", A100, A100_ALL), ("overall-h100", H100, H100_ALL)):
        claim = STUDY.claim(key)
        for at, title in enumerate(TITLES):
            ours, theirs = (_planned(results, other, "ms", at, "requests") for other in (SN40L, one))
            found.append(Finding(claim, quotient(theirs, ours), _ms(ours), _ms(theirs), title, counts=at == 0))
        for title, mine, other in (
            ("20 tokens, ideal fusion", IDEAL, one), ("20 tokens, SN40L without fusion", KERNELS, one),
            ("20 tokens, all eight links of the DGX", SN40L, links), ("20 tokens, SN40L without its DDR", NO_DDR, one),
        ):  # fmt: skip
            ours, theirs = (_planned(results, platform, "ms", 0, "requests") for platform in (mine, other))
            found.append(Finding(claim, quotient(theirs, ours), _ms(ours), _ms(theirs), title, counts=False))
        ratio = results.middle_ratio("run-requests", one.arm.name, SN40L.arm.name, "e2e_ns.mean", 0)
        ours_s, theirs_s = (
            results.middle("run-requests", platform.arm.name, "e2e_ns.mean", 0) for platform in (SN40L, one)
        )
        on, off = (_ms(None if value is None else value * 1e3) for value in (ours_s, theirs_s))
        found.append(Finding(claim, ratio, on, off, "20 tokens, simulated", False))
    return found


def _footprint() -> list[Finding]:
    """DGX nodes, HBM only, for what one SN40L node holds in its DDR; each also holds its router."""
    claim, dgx = STUDY.claim("footprint"), node("dgx-a100")
    plan = cases.plan_of(SN40L)
    found = []
    for count, note, counts in (
        (plan.host_slots, f"{plan.host_slots} models: what 12 TiB of DDR hold", True),
        (RECALLED_EXPERTS, f"{RECALLED_EXPERTS} models, a number recalled and not read again", False),
        (EXPERTS, f"{EXPERTS} models", False),
    ):
        nodes = nodes_for(count, plan.weight_bytes, dgx.published_capacity_bytes)
        host = -(-count // (dgx.host_memory_bytes // plan.weight_bytes))
        found.append(Finding(claim, float(nodes), "1 node", f"{host} DGX by host memory", note, counts))
    return found


def _gates(results: Results) -> list[Gate]:
    switch = {one.arm.name: _planned(results, one, "switch_ms", EXPERTS) for one in (SN40L, A100, H100)}
    gates = [
        Gate(f"one switch, {one.arm.title}, s", None if (ms := switch[one.arm.name]) is None else ms / 1e3,
             0.98 * seconds, 1.02 * seconds, "13.48 GB over the published path, within 2 %")
        for one, seconds in ((SN40L, 0.0135), (H100, 0.211), (A100, 0.421))
    ]  # fmt: skip
    for one, published in ((A100, 6.6), (H100, 3.7)):
        name, low, high = one.arm.title, (1 - BAND) * published, (1 + BAND) * published
        ours, theirs = (_planned(results, other, "ms", 0, "requests") for other in (SN40L, one))
        run = results.middle_ratio("run-requests", one.arm.name, SN40L.arm.name, "e2e_ns.mean", 0)
        source = f"published {published}, within 25 %"
        gates += [
            Gate(f"{name} over SN40L, 20 tokens, predicted", quotient(theirs, ours), low, high, source),
            Gate(f"{name} over SN40L, 20 tokens, simulated", run, low, high, source),
        ]
    without = results.middle_ratio("run-requests", A100.arm.name, NO_DDR.arm.name, "e2e_ns.mean", 0)
    gates += [
        Gate("control: DGX A100 over SN40L without its DDR, simulated", without, 0.8, 1.25, "the gain is gone"),
        Gate("control: share of time in switching, 20 models, DGX A100, simulated",
             results.middle("run-experts", A100.arm.name, "switching", 20), 0.0, 0.0, "all on the device"),
        Gate("simulated over predicted latency, worst of platforms and requests", _worst(results), 0.9, 1.1,
             "one arithmetic; a batch is as many clients in the simulation"),
        Gate("hit rate of LRU, simulated, from Che's approximation, worst of all cells", _deviation(results), 0.0, 0.02,
             "2 points"),
        Gate("footprint, DGX nodes", float(_footprint()[0].ours or 0), 19 * (1 - BAND), 19 * (1 + BAND),
             "published 19, within 25 %"),
        Gate("requests/s, grouped over order of arrival, 64 clients",
             results.middle_ratio("grouping", GROUPED.name, ARRIVAL.name, "per_s", CLIENTS[-1]), 1.05, float("inf"),
             "steps are shared; switches are not fewer"),
        Gate("the same, one client", results.middle_ratio("grouping", GROUPED.name, ARRIVAL.name, "per_s", 1.0),
             0.999, 1.001, "nothing to group"),
    ]  # fmt: skip
    return gates


def _worst(results: Results) -> float | None:
    """The simulated latency over the predicted one where they are furthest apart."""
    found = []
    for platform in RUN:
        for at in results.places("run-requests"):
            batch = REQUESTS[int(at)][1]
            ours = results.middle("run-requests", platform.arm.name, "per_s", at)
            plan = _planned(results, platform, "ms", at, "requests")
            if ours and plan:
                found.append(batch / ours * 1e3 / plan)
    return max(found, key=lambda ratio: abs(ratio - 1.0), default=None)


def _cells(results: Results) -> list[tuple[Arm, float, float, float]]:
    """(arm, slots, simulated hit rate, Che's)."""
    found = []
    for arm, skew in zip(CACHE_ARMS, SKEWS, strict=True):
        shares = popularity(EXPERTS, skew)
        for slots, rates in results.curve("cache", arm.name, "hit").items():
            found.append((arm, slots, mean(rates), lru_hit_rate(shares, int(slots))))
    return found


def _deviation(results: Results) -> float | None:
    return max((abs(ours - theirs) for _, _, ours, theirs in _cells(results)), default=None)


def _parts_table(results: Results) -> Table:
    """Where the time of a batch goes, and which part of what SN40L saves is switching."""
    figures = ("router_ms", "switching_ms", "prompts_ms", "decode_ms", "ms")
    table = Table(
        [Column("request", "request"), Column("platform", "platform"),
         *[Column(name, f"{name.removesuffix('_ms') if name != 'ms' else 'all'}, ms", "number", "predicted")
           for name in figures],
         Column("ratio", "over SN40L", "number", "predicted", 2),
         Column("of_switching", "of the difference: switching", "share", "predicted"),
         Column("of_decode", "decode", "share", "predicted")],
        "Where the time of a batch goes",
    )  # fmt: skip
    for at, title in enumerate(TITLES):
        base = {name: _planned(results, SN40L, name, at, "requests") or 0.0 for name in figures}
        for platform in PLANNED:
            own = {name: _planned(results, platform, name, at, "requests") or 0.0 for name in figures}
            more = own["ms"] - base["ms"]
            parts = [(own[name] - base[name]) / more if more > 0 else None for name in ("switching_ms", "decode_ms")]
            table.add(title, platform.arm.title, *own.values(), own["ms"] / base["ms"], *parts)
    return table


def _counts_table(results: Results) -> Table:
    """The share of time that is switching by the number of models: predicted, and simulated where that was run."""
    run = {platform.arm.name: results.curve("run-experts", platform.arm.name, "switching") for platform in RUN}
    table = Table(
        [Column("count", "models", "count"),
         *[Column(f"p-{p.arm.name}", p.arm.title, "share", "predicted") for p in RUN],
         *[Column(f"s-{p.arm.name}", p.arm.title, "share", "simulated") for p in RUN]],
        "Share of the time of a request that is switching, 20 tokens",
        notes=[f"Switching is the larger half {_dominates(results)}."],
    )  # fmt: skip
    for at in results.places("experts"):
        planned = [_planned(results, platform, "switching", at) for platform in RUN]
        simulated = [mean(values) if (values := run[platform.arm.name].get(at)) else None for platform in RUN]
        table.add(int(at), *planned, *simulated)
    return table


def _dominates(results: Results) -> str:
    """From how many models on, by platform."""
    texts = []
    for platform in (SN40L, A100, H100, A100_ALL, H100_ALL):
        curve = results.curve("experts", platform.arm.name, "switching")
        first = min((at for at, values in curve.items() if values[0] > 0.5), default=None)
        texts.append(f"{'never' if first is None else f'from {first:g} models'} on {platform.arm.title}")
    return "; ".join(texts)


def _cache_table(results: Results) -> Table:
    table = Table(
        [Column("arm", "popularity"), Column("slots", "models on the device", "count"),
         Column("ours", "hit rate", "share", "simulated"), Column("che", "Che", "share", "predicted"),
         Column("off", "difference", "share", "simulated")],
        f"Hit rate of LRU, {EXPERTS} models",
    )  # fmt: skip
    for arm, slots, ours, che in _cells(results):
        table.add(arm.title, int(slots), ours, che, ours - che)
    return table


def _grouping_table(results: Results) -> Table:
    table = Table(
        [Column("clients", "clients", "count"), Column("arm", "turns"),
         Column("per_s", "requests/s", "number", "simulated"),
         Column("turn", "requests a turn", "number", "simulated"),
         Column("hit", "hits", "share", "simulated"),
         Column("p99", "E2E P99, s", "number", "simulated")],
        "Grouping by model on one DGX A100, Zipf 0.8",
    )  # fmt: skip
    for at in results.places("grouping"):
        for arm in (GROUPED, ARRIVAL, AHEAD):
            figures = ("per_s", "requests_a_turn", "hit", "e2e_ns.p99")
            table.add(int(at), arm.title, *[results.middle("grouping", arm.name, name, at) for name in figures])
    return table


def _affinity_table(results: Results) -> Table:
    table = Table(
        [Column("rate", "requests/s", "number"), Column("arm", "router"), Column("hit", "hits", "share", "simulated"),
         Column("mean", "E2E mean, s", "number", "simulated"), Column("p99", "E2E P99, s", "number", "simulated")],
        "Routers over eight DGX A100, Zipf 0.8",
    )  # fmt: skip
    for at in results.places("affinity"):
        for arm in (AFFINE, SPREAD):
            figures = ("hit", "e2e_ns.mean", "e2e_ns.p99")
            table.add(at, arm.title, *[results.middle("affinity", arm.name, name, at) for name in figures])
    return table


def _pictures(results: Results) -> list[Picture]:
    latency = {p.arm.title: results.curve("run-experts", p.arm.name, "e2e_ns.mean") for p in RUN}
    ratios = {p.arm.title: results.ratio("experts", p.arm.name, SN40L.arm.name, "ms") for p in (A100, H100, A100_ALL)}
    hits = {arm.title: results.curve("cache", arm.name, "hit") for arm in CACHE_ARMS}
    hits |= {
        f"{arm.title}, Che": {at: [lru_hit_rate(popularity(EXPERTS, skew), int(at))] for at in results.places("cache")}
        for arm, skew in zip(CACHE_ARMS, SKEWS, strict=True)
    }
    grouping = {arm.title: results.curve("grouping", arm.name, "per_s") for arm in (GROUPED, ARRIVAL, AHEAD)}
    return [
        Picture("latency", "Latency of one request of 20 tokens, simulated", "models", panels={"E2E mean, s": latency}),
        Picture("ratios", "Latency over that of SN40L, predicted", "models", ratios=ratios,
                ylabel="times as long as on SN40L", claim=("published, A100", 6.6)),
        Picture("cache", "Hit rate of LRU, simulated and by Che", "models on the device", panels={"hits": hits},
                logarithmic=False),
        Picture("grouping", "Grouping by model, one DGX A100", "clients", panels={"requests/s": grouping}),
    ]  # fmt: skip


def _notes(results: Results) -> list[str]:
    ideal, kernels = (_planned(results, one, "decode_ms", 0, "requests") for one in (IDEAL, KERNELS))
    gain = quotient(kernels, ideal)
    return [
        "The published switch ratios are those of the paths: 1 TB/s of the whole SN40L node against one PCIe link of a "
        "DGX. Steps are cut over eight GPUs in both, so eight links could carry the eight shares of a model.",
        f"Grouping at {CLIENTS[-1]:g} clients: {_switches(results, GROUPED)} switches for 100 requests, in the order "
        f"of arrival {_switches(results, ARRIVAL)}. What it gains is shared steps: a model comes round once a cycle, "
        "and LRU has let it go by then; in the order of arrival popular ones are asked for again sooner.",
        f"Fusion is a cost factor here: decode of {'-' if gain is None else f'{gain:.2f}'} times the speed between "
        "kernel by kernel and ideal on the same chip; the published 2 to 13 times are not reproduced.",
    ]


def _switches(results: Results, arm: Arm) -> str:
    hit = results.middle("grouping", arm.name, "hit", CLIENTS[-1])
    return "-" if hit is None else f"{100 * (1 - hit):.1f}"


def _experiment(
    name: str, title: str, arms: tuple[Arm, ...], at: tuple[float, ...], task: object, fast: tuple[float, ...]
) -> Experiment:
    """A simulated one."""
    shown = {"E2E mean, s": "e2e_ns.mean", "hits": "hit", "switching": "switching", "requests/s": "per_s"}
    axis = {"run-experts": "models", "run-requests": "request", "cache": "models on the device",
            "grouping": "clients"}.get(name, "requests/s")  # fmt: skip
    return Experiment(name, title, arms, axis, at, task, 3, fast, 1, "simulated", shown)  # type: ignore[arg-type]


_ALL, _RUN = (tuple(one.arm for one in which) for which in (PLANNED, RUN))
_SHOWN = {"ms": "ms", "switching, ms": "switching_ms", "decode, ms": "decode_ms", "hits": "hit"}
_PLACES = tuple(map(float, range(len(REQUESTS))))
STUDY = Study(
    name="sn40l",
    system="SambaNova SN40L: Scaling the AI Memory Wall with Dataflow and Composition of Experts",
    title="SambaNova SN40L: a composition of experts in three tiers of memory",
    summary=(
        "150 models of Llama-2-7B's shape answer together: a router names one for each prompt. Device memory holds 35;",
        "the others wait in slower memory and are copied when their turn comes, the longest unused makes room.",
        "An SN40L node has 12 TiB of DDR behind its HBM with 1 TB/s between them; a DGX has host memory behind PCIe.",
        "Requests are grouped by model and executed model by model; weights are only read, so nothing is written back.",
        "Controls: the same node with models over 32 GB/s; few enough models to be all on the device; no grouping.",
    ),
    reference="Prabhakar et al., SambaNova SN40L, MICRO 2024 (arXiv:2405.07518)",
    claims=(
        Claim("switch-a100", "switching a model, over DGX A100", "13.48 GB, 1 TB/s against 32 GB/s", 31.2,
              (0.98 * 31.2, 1.02 * 31.2)),
        Claim("switch-h100", "switching a model, over DGX H100", "13.48 GB, 1 TB/s against 64 GB/s", 15.6,
              (0.98 * 15.6, 1.02 * 15.6)),
        Claim("overall-a100", "latency, over DGX A100", "150 models, uniform", 6.6,
              ((1 - BAND) * 6.6, (1 + BAND) * 6.6)),
        Claim("overall-h100", "latency, over DGX H100", "150 models, uniform", 3.7,
              ((1 - BAND) * 3.7, (1 + BAND) * 3.7)),
        Claim("footprint", "DGX nodes whose HBM holds the models of one SN40L node", "80 GB a GPU", 19.0,
              ((1 - BAND) * 19, (1 + BAND) * 19)),
    ),
    experiments=(
        Experiment("experts", "One request of 20 tokens, by the number of models", _ALL, "models", COUNTS,
                   cases.planned_experts, 1, nature="predicted", shown=_SHOWN),
        Experiment("requests", f"Published requests: {'; '.join(TITLES)}", _ALL, "request", _PLACES,
                   cases.planned_requests, 1, nature="predicted", shown=_SHOWN),
        _experiment("run-experts", "One client, 20 tokens, by the number of models", _RUN, RUN_COUNTS,
                    cases.run_experts, (20.0, 150.0)),
        _experiment("run-requests", f"Published requests: {'; '.join(TITLES)}", _RUN, _PLACES, cases.run_requests,
                    _PLACES),
        _experiment("cache", "LRU by room and popularity, small models", CACHE_ARMS, SLOTS, cases.run_cache,
                    (50.0,)),
        _experiment("grouping", "Turns on one DGX A100", (GROUPED, ARRIVAL, AHEAD), CLIENTS, cases.run_grouping,
                    (1.0, 64.0)),
        _experiment("affinity", "Routers over eight DGX A100", (AFFINE, SPREAD), RATES, cases.run_affinity, (16.0,)),
    ),
    judge=judge,
    profiles=("nodes sn40l-node, dgx-a100 and dgx-h100 of the catalogue: published figures, none measured",),
    differences=(
        "The chip is a profile: 1.8 TB/s of HBM of which 85 % are reached, and a layer runs without launches, as the "
        "catalogue had it before this study. Nothing is fitted to a headline. Its collectives and host time are not "
        "hidden in that; with ideal fusion, where they are, the ratios go beyond the published ones (in brackets).",
        "The paper says neither the length of its prompts nor the time of its router: 512 tokens, and a model of the "
        "experts' size that reads each prompt, are assumptions.",
        "DGX nodes copy a model over one link, as published. With all eight, the ratios are those in brackets.",
        "More models than host memory holds are read from disk at 7 GB/s, one drive by data sheet: an assumption.",
        "A batch is as many clients that ask again at once, in simulation; requests at once in the plan.",
    ),
)  # fmt: skip
