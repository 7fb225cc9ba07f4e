"""Infinite-LLM: one request's KV on several instances, against the same cluster whose instances are each alone.

Eight A100 with LLaMA-2-13B under a mix of short and long prompts, swept over the length of the long ones; contexts
longer than an instance; old views; slow links. Requests are the same in both arms, and a closed loop keeps the number
of clients, so that output tokens over the time until the last request ended compare like with like.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median

import msgspec

from megalith.policy.pooled_memory import PooledScheduler
from megalith.sim.build import Builder
from megalith.sim.run import Run
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult, summarise
from megalith.specs import catalog
from megalith.specs.arrivals import Arrivals, ClosedLoop, PoissonArrivals
from megalith.specs.fleet import FleetSpec, LinkSpec, PolicySpec, PoolSpec
from megalith.specs.lengths import FixedLength, Lengths, QuantileLength, UniformLength
from megalith.specs.workload import WorkloadSpec
from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Claim, Experiment, Finding, Gate, Judgement, Picture, Simulated, Study

MODEL, DEVICE, INSTANCES = "llama-2-13b", "a100-80gb", 8
MOST_CONTEXT = 2_000_000
"""The publication serves contexts of up to 2,000K with LLaMA 2: the model's own 4K is no bound there, nor here."""
NVLINK_BYTES_PER_S, LATENCY_S = 300e9, 5e-6
"""One direction of the published 600 GB/s; the latency is an assumption."""
SHORT, ANSWER = (100, 1000), (400, 1200)
"""Tokens of short prompts and of all answers: decodes, not prompts, take most of the time."""
LONG_SHARE, CLIENTS, REQUESTS = 0.05, 300, 800
LONG = (1_000.0, 12_500.0, 25_000.0, 37_500.0, 47_000.0)
"""Mean length of a long prompt; an instance holds 56K tokens."""
AZURE_IN = ((0, 10), (0.5, 1020), (0.9, 2734), (0.99, 4142), (1, 14_050))
AZURE_OUT = ((0, 7), (0.5, 129), (0.9, 424), (0.99, 601), (1, 1000))
"""Quantiles of Azure's conversation trace of 2023, which is not shipped."""
BEYOND = (0.8, 1.2, 1.6, 3.0, 6.0)
"""Prompt over what one instance holds."""
HEARTBEATS_S = (0.1, 1.0, 10.0)
LINKS = (125e6, 1.25e9, 25e9, 300e9)
"""Bytes a second: the published Ethernet, ten times that, InfiniBand of one GPU, NVLink."""
SLICE = 2_000
"""Events between two looks at the books."""

ON = Arm("pooled", "on", "KV pooled over instances")
OFF = Arm("alone", "off", "every instance alone (vLLM-multi)")
SINGLE = Arm("single", "baseline", "one instance of eight devices (vLLM-single)")


def measure(point: Point) -> PointResult:
    """A plain run's figures and those of pooling; between slices nobody may hold more than there is."""
    spec = msgspec.structs.replace(catalog.model(MODEL), max_context=MOST_CONTEXT)
    run = Run(point.scenario, Builder(point.scenario, spec))
    broken = 0
    while run.advance(SLICE):
        broken += _overcommitted(run)
    result, pooled = run.result(), run.pooled
    figures: dict[str, float | None] = {
        "tokens_per_s": result.figures.run.output_tokens_per_s,
        "served_share": result.figures.finished / result.requests,
        "max_context": float(run.builder.max_context),
        "overcommitted": float(broken),
        **dict.fromkeys(("moved_gb", "moves", "refused", "waited_s", "foreign_s", "bytes_per_token")),
    }
    if pooled is not None:
        counters, steps = pooled.counters, pooled.counters.steps
        figures |= {
            "moved_gb": counters.moved_bytes / 1e9,
            "moves": float(counters.moved + counters.placed),
            "refused": float(counters.refused),
            "waited_s": steps.waited_ps / 1e12,
            "foreign_s": steps.foreign_ps / 1e12,
            "bytes_per_token": steps.spread_bytes / steps.spread_tokens if steps.spread_tokens else None,
        }
    return msgspec.structs.replace(summarise(point, result), figures=figures)


def _overcommitted(run: Run) -> int:
    """Instances that lend more than they may, or have less than nothing left."""
    broken = 0
    for instance in run.cluster.instances.values():
        scheduler = instance.scheduler
        lends = isinstance(scheduler, PooledScheduler) and scheduler.memory.lent > scheduler.memory.most_used
        broken += lends or scheduler.kv.free_blocks < 0
    return broken


def _task(arm: str, load: WorkloadSpec, seed: int, rate: float = NVLINK_BYTES_PER_S, **fleet: object) -> Simulated:
    whole = arm == SINGLE.name
    pool = PoolSpec(
        name="all", device=DEVICE, count=1 if whole else INSTANCES, tensor_parallel=INSTANCES if whole else 1,
        prefix_cache=False,
    )  # fmt: skip
    spec = FleetSpec(
        pools=(pool,),
        router=PolicySpec(name="round-robin"),
        controllers=(PolicySpec(name="pooled-kv"),) if arm == ON.name else (),
        link=LinkSpec(bytes_per_s=rate, latency_s=LATENCY_S),
    )
    spec = msgspec.structs.replace(spec, **fleet)
    scenario = Scenario(model=MODEL, timer="analytic", fleet=spec, workload=load, seed=seed, sample_s=0)
    return Simulated(scenario=scenario, measure=f"{__name__}:measure")


def _mix(long_tokens: float, requests: int, short: tuple[tuple[float, float], ...] | None = None) -> WorkloadSpec:
    """Short prompts and a share of long ones, each 20 % about the mean."""
    points = short or ((0.0, float(SHORT[0])), (1.0, float(SHORT[1])))
    shorts = [(share * (1 - LONG_SHARE), tokens) for share, tokens in points]
    longs = [(1 - LONG_SHARE + 1e-9, 0.8 * long_tokens), (1.0, 1.2 * long_tokens)]
    if longs[0][1] < shorts[-1][1]:  # nothing is longer than the others: no skew
        shorts, longs = [(share, tokens) for share, tokens in points], []
    answers: Lengths = QuantileLength(points=AZURE_OUT) if short else UniformLength(low=ANSWER[0], high=ANSWER[1])
    return WorkloadSpec(
        name=f"{LONG_SHARE:.0%} prompts of {long_tokens:g}", input=QuantileLength(points=(*shorts, *longs)),
        output=answers, arrivals=ClosedLoop(clients=CLIENTS), requests=requests,
    )  # fmt: skip


def _requests(case: Case) -> int:
    return REQUESTS // 2 if case.fast else REQUESTS


def _skew(case: Case) -> Simulated:
    return _task(case.arm, _mix(case.at, _requests(case)), case.seed)


def _azure(case: Case) -> Simulated:
    return _task(case.arm, _mix(case.at, _requests(case), AZURE_IN), case.seed)


def _routed(case: Case) -> Simulated:
    return _task(case.arm, _mix(case.at, _requests(case)), case.seed, router=PolicySpec(name="least-kv"))


def _stale(case: Case) -> Simulated:
    return _task(case.arm, _mix(LONG[2], _requests(case)), case.seed, heartbeat_s=case.at)


def _link(case: Case) -> Simulated:
    return _task(case.arm, _mix(LONG[2], _requests(case)), case.seed, case.at)


def _beyond(case: Case) -> Simulated:
    arrivals: Arrivals = PoissonArrivals(rate_per_s=0.05)
    tokens = int(case.at * ONE_INSTANCE)
    load = WorkloadSpec(
        name=f"prompts of {tokens:,}", input=FixedLength(tokens=tokens), output=FixedLength(tokens=200),
        arrivals=arrivals, requests=3,
    )  # fmt: skip
    return _task(case.arm, load, case.seed)


ONE_INSTANCE = 56_000
"""Tokens that one A100 of 80 GB holds beside LLaMA-2-13B in bf16, about."""


def judge(results: Results) -> Judgement:
    """Gain over skew, the longest context, what old views and slow links cost."""
    gains = results.ratio("skew", ON.name, OFF.name, "tokens_per_s")
    middles = {at: median(values) for at, values in gains.items()}
    best = max(middles, key=lambda at: middles[at], default=LONG[0])
    claim = STUDY.claim
    on, off = (results.middle("skew", arm.name, "tokens_per_s", best) for arm in (ON, OFF))
    longest = _longest(results)
    findings = [
        Finding(claim("gain"), middles.get(best), _rate(on), _rate(off), f"largest of the sweep, at {best:g} tokens"),
        Finding(claim("context"), longest, "-", "-", "prompt and answer, with all others empty"),
    ]
    pictures = [
        Picture("gain", "Output tokens a second, pooled over alone", "mean tokens of a long prompt",
                ratios={"pooled": gains}, ylabel="times", claim=("published, at most", 2.4)),
        Picture("links", "The same at 25,000 tokens, by link", "bytes/s",
                ratios={"pooled": results.ratio("link", ON.name, OFF.name, "tokens_per_s")}, ylabel="times"),
    ]  # fmt: skip
    rises = all(after >= before - 0.01 for before, after in pairwise(middles.values()))
    notes = [
        f"The gain {'rises' if rises else 'does not rise'} with skew all the way: "
        + ", ".join(f"{at:,.0f}: {gain:.3f}x" for at, gain in middles.items())
        + "."
    ]
    return Judgement(findings, _gates(results, middles, longest), {}, pictures, notes)


def _gates(results: Results, middles: dict[float, float], longest: float | None) -> list[Gate]:
    broken = [value for name in ("skew", "stale") for value in _all(results, name, "overcommitted")]
    per_token = [results.middle("beyond", ON.name, "bytes_per_token", at) for at in BEYOND[1:3]]
    same = per_token[1] / per_token[0] if per_token[0] and per_token[1] else None
    return [
        Gate("gain without skew", middles.get(LONG[0]), 0.97, 1.03, "2.6 S1: about 1.0"),
        Gate("longest servable context over one instance's", longest, 2.0, float(INSTANCES), "2.6 S1"),
        Gate("instances over-committed, any age of the view", max(broken, default=None), 0.0, 0.0, "2.6 S3"),
        Gate("bytes a decoded token, 1.6 over 1.2 times an instance", same, 0.999, 1.001, "2.6 R1"),
        Gate("gain, largest of the sweep", max(middles.values(), default=None), 1.0, 2.4, "2.6 S1: 1.0 to 2.4"),
    ]


def _all(results: Results, experiment: str, figure: str) -> list[float]:
    curves = results.curve(experiment, ON.name, figure)
    return [value for values in curves.values() for value in values]


def _longest(results: Results) -> float | None:
    pooled, alone = (results.middle("beyond", arm.name, "max_context", BEYOND[1]) for arm in (ON, OFF))
    return pooled / alone if pooled and alone else None


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} tokens/s"


_SETTING = "LLaMA 2 on A100, 2 to 32 instances, 18 mixes of lengths"
_SHOWN = {
    "output tokens/s": "tokens_per_s", "preemptions": "preemptions", "moves": "moves", "GB moved": "moved_gb",
    "waited, s": "waited_s", "for others, s": "foreign_s",
}  # fmt: skip
_PAIR = (ON, OFF)
_TOKENS = "mean tokens of a long prompt"
STUDY = Study(
    name="infinite-llm",
    system="Infinite-LLM: Efficient LLM Service for Long Context with DistAttention and Distributed KVCache",
    title="Infinite-LLM: DistAttention and pooled KV",
    summary=(
        "A long request fills the KV memory of its instance, so few others run there, while others have room.",
        "Infinite-LLM lets any instance hold blocks of any request: queries go to the KV, partial attention comes",
        "back and is merged exactly. A manager moves blocks of the longest requests from instances with small batches",
        "to those with room, by modelled throughput; nothing is moved that was not reserved first.",
        "Control: the same instances, each alone. Prompts longer than one instance are then refused.",
    ),
    reference="Lin et al., Infinite-LLM, arXiv:2401.02669 (versions 1 and 2)",
    claims=(
        Claim("gain", "throughput over instances that are alone", _SETTING, 2.4, (1.03, 2.4), said="1.03x to 2.4x"),
        Claim("context", "longest context over that of one instance", _SETTING, 19.0, (2.0, 19.0), said="2x to 19x"),
    ),
    experiments=(
        Experiment("skew", "5 % long prompts", _PAIR, _TOKENS, LONG, _skew, 3, (LONG[0], LONG[2]), shown=_SHOWN),
        Experiment(
            "azure",
            "the same beside Azure conversations: prompts take most of the time",
            _PAIR,
            _TOKENS,
            (25_000.0,),
            _azure,
            3,
            shown=_SHOWN,
        ),
        Experiment(
            "routed",
            "the same under a router that looks at free memory",
            _PAIR,
            _TOKENS,
            (25_000.0,),
            _routed,
            3,
            shown=_SHOWN,
        ),
        Experiment("stale", "facts of this age", _PAIR, "heartbeat, s", HEARTBEATS_S, _stale, 2, (1.0,), shown=_SHOWN),
        Experiment("link", "by link, 25,000 tokens", _PAIR, "bytes/s", LINKS, _link, 2, (125e6,), shown=_SHOWN),
        Experiment(
            "beyond",
            "three prompts longer than an instance",
            (ON, OFF, SINGLE),
            "times one instance",
            BEYOND,
            _beyond,
            1,
            (1.2, 1.6),
            shown={
                "served": "served_share",
                "TTFT mean, s": "ttft_ns.mean",
                "TPOT mean, s": "tpot_ns.mean",
                "KB/decoded token": "bytes_per_token",
                "waited, s": "waited_s",
            },
        ),
    ),
    judge=judge,
    differences=(
        "The publication names neither its lengths of answers nor how requests are spread over instances. Here answers "
        "have 400 to 1,200 tokens, so that decoding and memory, not prompts, take the time, and requests go round in "
        "turn. A router that looks at free memory leaves less to gain, and so do Azure's short answers: both stand "
        "beside it.",
        "An owner waits for the slowest holder in every layer, and the holder's own step is longer by that attention: "
        "KV elsewhere costs both sides. The published policy reckons with the second alone; ours with both.",
        "Prompts that fit an instance are not spread before they run: both sides then wait for longer than it gains.",
        "Contexts are 6.6 times those of one instance with eight, since nobody lends more than 0.8 of its memory; the "
        "published 19 needs 32 instances. LLaMA 2 is taken to attend to any number of tokens.",
        "Copies cost the link, and nothing of the device: moving 16 tokens a step is free here and so are the 32 that "
        "cost 8.6 % in the publication.",
        "Lengths are drawn: the traces in the published shape are not shipped.",
    ),
)
