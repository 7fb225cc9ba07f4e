"""EnergonAI (arXiv:2209.02341): packed batches, a pipeline that does not block, layers borrowed from a peer.

Three mechanisms on one engine, each against itself switched off: batches computed as rectangles by how full they are;
pipelines that block by stages and by batch; borrowed layers by their share, against the host's memory. The published
figures are against another engine, FasterTransformer, so the rows of the mechanisms stand apart from the row of the
engine, which is what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

from megalith.base.errors import DoesNotFit
from megalith.cost.borrow import BorrowingTimer, layer_bytes, loan, loans
from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.padding import linear_flops, padded, waste
from megalith.cost.profile import from_device
from megalith.cost.timer import Prompt
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.sim.build import Builder
from megalith.sim.scenario import Scenario
from megalith.specs import catalog
from megalith.specs.arrivals import ClosedLoop
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from megalith.specs.lengths import FixedLength, UniformLength
from megalith.specs.model import ModelSpec
from megalith.specs.workload import WorkloadSpec
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

MODEL, DEVICE, LAYERS = "opt-13b", "a100-80gb", 40
"""One that a single device holds, so that a pipeline of one stage can be compared."""
LARGER, LENT = "opt-66b", 40
"""One that it does not hold, and how many of its 64 layers a peer lends."""
BATCH, LONGEST = 32, 128
"""Requests of a batch and tokens of the longest; an assumption of the order of the publication's."""
FILLS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Mean length over the longest."""
HALF = 0.5
STAGES, BATCHES, DEPTHS = (1.0, 2.0, 4.0, 8.0), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), 4
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
"""Of the layers, those that are borrowed."""
PROMPT_ROWS, DECODES, CONTEXT = 2048, 16, 512

PACKED, PADDED = Arm("packed", "on", "real tokens only"), Arm("padded", "off", "rectangles")
FREE, BLOCKS = Arm("non-blocking", "on", "non-blocking"), Arm("blocking", "off", "blocking")
QUEUE = Arm("queue", "baseline", "sender waits for its bytes, receiver does not")
TIGHT = Arm("non-blocking-tight", "baseline", "non-blocking, as many steps as stages")
PEER, HOST = Arm("peer", "on", "from a peer"), Arm("host", "off", "from the host")


def _task(pool: PoolSpec, load: WorkloadSpec, seed: int) -> Simulated:
    scenario = Scenario(
        model=MODEL, timer="analytic", fleet=FleetSpec(pools=(pool,), router=PolicySpec(name="round-robin")),
        workload=load, seed=seed, sample_s=0, max_context=LONGEST + 16,
    )  # fmt: skip
    return Simulated(scenario=scenario)


def _load(fill: float, clients: int, requests: int) -> WorkloadSpec:
    """One forward pass a request, as published. Lengths lie evenly about their mean, up to LONGEST."""
    most = LONGEST if fill >= HALF else round(2 * fill * LONGEST)
    least = max(1, round(2 * fill * LONGEST) - LONGEST) if fill > HALF else 1
    lengths = FixedLength(tokens=LONGEST) if fill >= 1.0 else UniformLength(low=least, high=most)
    return WorkloadSpec(
        name=f"lengths {fill:g} of {LONGEST}", input=lengths, output=FixedLength(tokens=1),
        arrivals=ClosedLoop(clients=clients), requests=requests,
    )  # fmt: skip


def _pool(rows: int, under_way: int = 1, **more: Any) -> PoolSpec:
    return PoolSpec(
        name="all", device=DEVICE, count=1, token_budget=rows * LONGEST, max_sequences=rows * under_way,
        prefix_cache=False, kv_blocks=rows * under_way * (LONGEST // 16 + 2), **more,
    )  # fmt: skip


def filled(options: Mapping[str, Any]) -> dict[str, float | None]:
    """Batches of one fill on one engine, by tensor parallel degree: seconds a batch, and FLOPs as computed."""
    random = Random(int(options["seed"]))
    fill, arm = float(options["fill"]), options["arm"]
    lengths = [_batch(random, fill) for _ in range(50 if options["fast"] else 400)]
    model, profile = catalog.model(MODEL), from_device(catalog.device(DEVICE))
    figures: dict[str, float | None] = {}
    batches = [[Prompt(tokens, 0, True) for tokens in batch] for batch in lengths]
    if arm == PADDED.name:
        batches = [padded(batch) for batch in batches]
    for degree in (1, 2, 4, 8):
        cost = CostModel(model, profile, weight_bytes(model, "bf16"), "bf16", degree)
        timer = AnalyticTimer(cost)
        figures[f"s_{degree}"] = sum(timer.step_ps(batch, 0, 0, 0) for batch in batches) / len(batches) / 1e12
    figures["flops"] = float(sum(linear_flops(model, batch) for batch in batches))
    real = sum(map(sum, lengths))
    figures["flops_formula"] = (
        2.0
        * _macs(model)
        * (real if arm == PACKED.name else sum(round(waste(batch) * sum(batch)) for batch in lengths))
    )
    return figures


def _macs(model: ModelSpec) -> int:
    """Multiply-adds of one row, from the shape alone: 4 d^2 of attention and 2 d f of the feed-forward a layer."""
    return model.num_layers * model.hidden * (4 * model.hidden + 2 * model.ffn)


def _batch(random: Random, fill: float) -> list[int]:
    """The longest is always there, so that `fill` is what it says; the others lie evenly about what is left."""
    if fill >= 1.0:
        return [LONGEST] * BATCH
    mean = (fill * BATCH - 1) / (BATCH - 1) * LONGEST
    spread = min(mean - 1, LONGEST - mean)
    return [LONGEST, *(max(1, round(random.uniform(mean - spread, mean + spread))) for _ in range(BATCH - 1))]


def _filled(case: Case) -> Computed:
    options: dict[str, float | str] = {"fill": case.at, "arm": case.arm, "seed": case.seed, "fast": float(case.fast)}
    return Computed(call=f"{__name__}:filled", options=options)


def _stages(case: Case) -> Simulated:
    return _piped(case, int(case.at), BATCH)


def _even(case: Case) -> Simulated:
    return _piped(case, int(case.at), BATCH, 1.0)


def _batches(case: Case) -> Simulated:
    return _piped(case, DEPTHS, int(case.at))


def _piped(case: Case, stages: int, rows: int, fill: float = HALF) -> Simulated:
    """Always a backlog: the rate is what the pipeline can do."""
    tight = case.arm in (TIGHT.name, QUEUE.name, BLOCKS.name)
    under_way = 1 if stages == 1 else stages * (1 if tight else 2)
    mode = FREE.name if case.arm == TIGHT.name else case.arm
    more: dict[str, Any] = {"pipeline_parallel": stages}
    if stages > 1:
        more |= {"pipeline": mode, "steps_under_way": under_way}
    requests = rows * (200 if case.fast else 1000)
    return _task(_pool(rows, under_way, **more), _load(fill, rows * 4 * stages, requests), case.seed)


def borrowed(options: Mapping[str, Any]) -> dict[str, float | None]:
    """Step times with a share of the layers borrowed, over those without; and whether the model fits then."""
    model, profile = catalog.model(MODEL), from_device(catalog.device(DEVICE))
    weights, number = weight_bytes(model, "bf16"), round(float(options["share"]) * LAYERS)
    timer = AnalyticTimer(CostModel(model, profile, weights))
    peer, host = (number, 0) if options["arm"] == PEER.name else (0, number)
    pool = PoolSpec(name="all", device=DEVICE, count=1)
    slow = BorrowingTimer(timer, LAYERS, loans(weights, LAYERS, 1, profile, peer, host, pool.host_bytes_per_s))
    prompts = [Prompt(PROMPT_ROWS, 0, True)]
    decode = (DECODES, DECODES * CONTEXT, CONTEXT)
    free = LAYERS * loan(1, layer_bytes(weights, LAYERS), profile.peer_bytes_per_s, 0.0, "peer").fetch_ps
    return {
        "prompt": slow.step_ps(prompts, 0, 0, 0) / timer.step_ps(prompts, 0, 0, 0),
        "decode": slow.step_ps((), *decode) / timer.step_ps((), *decode),
        "fetch_over_compute": free / timer.step_ps(prompts, 0, 0, 0),
    }


def _borrowed(case: Case) -> Computed:
    return Computed(call=f"{__name__}:borrowed", options={"share": case.at, "arm": case.arm})


def fits(peer_layers: int) -> bool:
    """Whether LARGER runs on one device with so many of its layers on a peer."""
    pool = PoolSpec(name="all", device=DEVICE, count=1, peer_layers=peer_layers, max_sequences=16)
    scenario = Scenario(
        model=LARGER, timer="analytic", fleet=FleetSpec(pools=(pool,)), workload=_load(HALF, 1, 1),
        max_context=LONGEST + 16,
    )  # fmt: skip
    try:
        Builder(scenario)
    except DoesNotFit:
        return False
    return True


def judge(results: Results) -> Judgement:
    """Mechanisms first, then what is left of the published figures: the engine."""
    claim = STUDY.claim
    cut = {at: _cut(results, at) for at in results.places("fill")}
    half = cut.get(HALF)
    findings = [
        Finding(claim("tp"), half, *_sides(results, "fill", PACKED, PADDED, "s_4", HALF, "s"), "mechanism: packing"),
        Finding(claim("tp-even"), cut.get(1.0), *_sides(results, "fill", PACKED, PADDED, "s_4", 1.0, "s"),
                "mechanism, nothing to pack: what is left of the published figure is the engine", False),
        Finding(claim("pp"), _gain(results, "stages", 4.0), *_rates(results, 4.0), "mechanism: non-blocking"),
        Finding(claim("pp-queue"), _gain(results, "stages", 4.0, QUEUE), *_rates(results, 4.0, QUEUE),
                "against sends that hold the sender alone", False),
    ]  # fmt: skip
    gates = [
        *(Gate(f"FLOPs of rectangles over real, fill {at:g}", _flops(results, at), 1 - 1e-9, 1 + 1e-9,
               "B * max / sum, exactly") for at in results.places("fill")),
        Gate("packing, fill 1: nothing to gain", cut.get(1.0), -1e-9, 1e-9, "control"),
        Gate("packing gains more the emptier batches are", _falls(cut), 1.0, 1.0, "sign"),
        Gate("non-blocking over blocking, one stage", _gain(results, "stages", 1.0), 1 - 1e-9, 1 + 1e-9, "control"),
        Gate("non-blocking over blocking, least over stages and batches", _least(results), 1.0, float("inf"), "sign"),
        Gate("from the host over from a peer, decode, least over shares", _host(results), 1.0, float("inf"), "sign"),
        Gate(f"{LARGER} on one device, no layer borrowed", float(fits(0)), 0.0, 0.0, "control: does not fit"),
        Gate(f"{LARGER} on one device, {LENT} layers on a peer", float(fits(LENT)), 1.0, 1.0, "runs when it borrows"),
    ]  # fmt: skip
    return Judgement(findings, gates, {}, _pictures(results, cut), _notes(results, cut))


def _notes(results: Results, cut: Mapping[float, float | None]) -> list[str]:
    """Engine and mechanism, told apart."""
    published, half = STUDY.claim("tp").published, cut.get(HALF)
    notes = []
    if half is not None:
        left = (1.0 + published) / (1.0 + half)
        notes.append(
            f"Engine: the published latency is {1.0 + published:.2f} of FasterTransformer's. Packing alone gives "
            f"{1.0 + half:.2f} on half-full batches, so {left:.2f} is left for the engine; on full batches packing "
            f"gives 1 and all of {1.0 + published:.2f} is the engine. How full the published batches were is not known."
        )
    values = sorted((at, value) for at, value in cut.items() if value is not None)
    for (low, more), (high, less) in pairwise(values):
        if more <= published <= less and more < less:
            at = low + (high - low) * (published - more) / (less - more)
            notes.append(f"Packing alone gives {published:.0%} where batches are {at:.2f} full.")
    tight, even = _gain(results, "stages", 4.0, TIGHT), _gain(results, "even", 4.0)
    if tight is not None and even is not None:
        notes.append(
            f"Of the gain of the pipeline at 4 stages, {tight - 1.0:.1%} comes from steps that wait in queues, two for "
            f"each stage, while lengths differ. With batches of equal length it is {even - 1.0:.1%}: bytes on the wire."
        )
    return notes


def _pictures(results: Results, cut: Mapping[float, float | None]) -> list[Picture]:
    arms = (FREE, TIGHT, QUEUE, BLOCKS)

    def rates(experiment: str) -> dict[str, dict[float, list[float]]]:
        return {arm.title: results.curve(experiment, arm.name, "requests_per_s") for arm in arms}

    seconds = {arm.title: results.curve("fill", arm.name, "s_4") for arm in (PACKED, PADDED)}
    changes = {at: [value] for at, value in cut.items() if value is not None}
    slow = {
        f"{what} steps, times longer": {arm.title: results.curve("peer", arm.name, what) for arm in (PEER, HOST)}
        for what in ("prompt", "decode")
    }
    return [
        Picture("fill", "Batches of 32, tensor parallel 4", "mean length over the longest", logarithmic=False,
                panels={"s a batch": seconds, "change of latency": {"packing": changes}}),
        Picture("stages", "Rate of a pipeline, batches of 32", "stages", panels={"requests/s": rates("stages")}),
        Picture("batch", "Rate of a pipeline of 4 stages", "requests a batch", panels={"requests/s": rates("batch")}),
        Picture("peer", "Layers that live elsewhere", "share of the layers", logarithmic=False, panels=slow),
    ]  # fmt: skip


def _cut(results: Results, at: float) -> float | None:
    """Change of the latency of a batch by packing, tensor parallel 4."""
    ratio = results.middle_ratio("fill", PACKED.name, PADDED.name, "s_4", at)
    return None if ratio is None else ratio - 1.0


def _flops(results: Results, at: float) -> float | None:
    """Counted FLOPs of rectangles over real ones, divided by the same from lengths alone."""
    counted = results.middle_ratio("fill", PADDED.name, PACKED.name, "flops", at)
    formula = results.middle_ratio("fill", PADDED.name, PACKED.name, "flops_formula", at)
    return counted / formula if counted and formula else None


def _falls(cut: Mapping[float, float | None]) -> float | None:
    values = [value for _, value in sorted(cut.items()) if value is not None]
    return float(values == sorted(values)) if len(values) > 1 else None


def _gain(results: Results, experiment: str, at: float, under: Arm = BLOCKS) -> float | None:
    return results.middle_ratio(experiment, FREE.name, under.name, "requests_per_s", at)


def _least(results: Results) -> float | None:
    gains = [_gain(results, name, at) for name in ("stages", "even", "batch") for at in results.places(name) if at > 1]
    return min((gain for gain in gains if gain is not None), default=None)


def _host(results: Results) -> float | None:
    ratios = results.ratio("peer", HOST.name, PEER.name, "decode")
    return min((median(values) for at, values in ratios.items() if at), default=None)


def _sides(results: Results, experiment: str, on: Arm, off: Arm, figure: str, at: float, unit: str) -> tuple[str, str]:
    values = [results.middle(experiment, arm.name, figure, at) for arm in (on, off)]
    texts = ["-" if value is None else f"{value:.3g} {unit}" for value in values]
    return texts[0], texts[1]


def _rates(results: Results, at: float, under: Arm = BLOCKS) -> tuple[str, str]:
    return _sides(results, "stages", FREE, under, "requests_per_s", at, "req/s")


_SHOWN = {"requests/s": "requests_per_s"}
_PIPES = (FREE, BLOCKS, QUEUE, TIGHT)
_CUT = "published against FasterTransformer; here one engine, half-full batches of 32, TP 4"
_PP = "published against FasterTransformer; here one engine, 4 stages, batches of 32"
STUDY = Study(
    name="energonai",
    system="EnergonAI: An Inference System for 10-100 Billion Parameter Transformer Models",
    title="EnergonAI: inference for models of 10 to 100 thousand million parameters",
    summary=(
        "One controller publishes commands and workers run tensor and pipeline parallel parts of a model.",
        "Stages of a pipeline do not wait for each other: receiving has a thread and a queue of its own.",
        "Padding is taken out before the linear layers and put back for attention (rectangles: the control).",
        "Layers that do not fit lie in a peer's memory and are fetched a layer ahead (control: the host's memory).",
        "The published figures are against FasterTransformer; mechanisms and engine are told apart here.",
    ),
    reference="Du et al., EnergonAI, arXiv:2209.02341",
    claims=(
        Claim("tp", "latency in tensor parallelism", _CUT, -0.37, (-0.42, -0.32), 0.0, ""),
        Claim("tp-even", "the same, batches without padding", "TP 4", -0.37, (-0.42, -0.32), 0.0, ""),
        Claim("pp", "scalability in pipeline parallelism", _PP, 1.10, (1.05, 1.15)),
        Claim("pp-queue", "the same, over queues that only hold the sender", _PP, 1.10, (1.05, 1.15)),
    ),
    experiments=(
        Experiment(
            "fill", "batches by how full they are", (PACKED, PADDED), "mean length over the longest", FILLS, _filled, 5,
            (0.25, 0.5, 1.0), nature="predicted", shown={f"s a batch, TP {n}": f"s_{n}" for n in (1, 2, 4, 8)},
        ),
        Experiment("stages", "pipelines by stages", _PIPES, "stages", STAGES, _stages, 3, (1.0, 4.0), shown=_SHOWN),
        Experiment(
            "even", "the same, batches of equal length", _PIPES[:2], "stages", STAGES, _even, 1, (1.0, 4.0),
            shown=_SHOWN,
        ),
        Experiment(
            "batch", "4 stages by batch", _PIPES, "requests a batch", BATCHES, _batches, 3, (2.0, 32.0), shown=_SHOWN
        ),
        Experiment(
            "peer", "borrowed layers", (PEER, HOST), "share of the layers", SHARES, _borrowed, 1, nature="predicted",
            shown={"prompt steps, times longer": "prompt", "decode steps, times longer": "decode"},
        ),
    ),
    judge=judge,
    profiles=(f"rates of {DEVICE} of the catalogue: {from_device(catalog.device(DEVICE)).source}",),
    differences=(
        "The model is OPT-13B, which one A100 of 80 GB holds. Requests are one forward pass; lengths are drawn evenly "
        "about half of 128 tokens, an assumption.",
        "FasterTransformer is not modelled. The row `latency that packing does not explain` is the published figure "
        "divided by ours, so it holds kernels, memory management and everything else.",
        "A blocking stage meets the next one: both are held while the bytes go, and the sender waits until the next "
        "has let go of the step before. A non-blocking pipeline has twice as many steps under way as stages; with only "
        "as many (a row of its own) a step on the wire leaves a stage idle.",
        "Fetching a borrowed layer begins one layer ahead and the link has nothing else to do. Peers are joined by "
        "NVLink here (300 GB/s on paper); the host's copies reach 25 GB/s.",
    ),
)  # fmt: skip
