"""The points of the study `sn40l`: what each is, planned or simulated, and which figures it gives.

Knows platforms, requests and scenarios; judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from megalith.base.units import NS_PER_S
from megalith.cost.timer import PS_PER_NS
from megalith.plan.experts import ExpertsPlan, ExpertsQuestion, Fusion, plan_experts
from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult, summarise
from megalith.specs import catalog
from megalith.specs.arrivals import ClosedLoop, PoissonArrivals
from megalith.specs.expert_mix import ExpertMix
from megalith.specs.experts import ExpertsSpec
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from megalith.specs.lengths import FixedLength
from megalith.specs.node import node
from megalith.specs.workload import WorkloadSpec
from megalith.studies.study import Arm, Case, Computed, Simulated

MODEL: Final = "llama-2-7b"
SMALL: Final = "smollm2-135m"
EXPERTS: Final = 150
PROMPT: Final = 512
"""Prompt tokens. The paper does not say; an assumption."""
HOST_LINK: Final = 32e9
"""The path of DGX A100, for the SN40L without its DDR tier."""
REQUESTS: Final = ((20, 1), (20, 8), (200, 1), (200, 8))
"""(answer tokens, batch) of the published runs."""
SKEWS: Final = (0.0, 0.6, 0.8, 1.0, 1.2)


class Platform(NamedTuple):
    """A node, and what is changed on it."""

    arm: Arm
    node: str
    fusion: Fusion = "profile"
    all_links: bool = False
    host_bytes_per_s: float | None = None


SN40L = Platform(Arm("sn40l", "on", "SN40L, models in its DDR"), "sn40l-node")
NO_DDR = Platform(Arm("no-ddr", "off", "SN40L, models over 32 GB/s"), "sn40l-node", host_bytes_per_s=HOST_LINK)
A100 = Platform(Arm("dgx-a100", "baseline", "DGX A100, one link"), "dgx-a100")
H100 = Platform(Arm("dgx-h100", "baseline", "DGX H100, one link"), "dgx-h100")
A100_ALL = Platform(Arm("dgx-a100-links", "baseline", "DGX A100, all eight links"), "dgx-a100", all_links=True)
H100_ALL = Platform(Arm("dgx-h100-links", "baseline", "DGX H100, all eight links"), "dgx-h100", all_links=True)
IDEAL = Platform(Arm("sn40l-ideal", "baseline", "SN40L, ideal fusion"), "sn40l-node", "ideal")
KERNELS = Platform(Arm("sn40l-kernels", "baseline", "SN40L, kernel by kernel"), "sn40l-node", "kernels")
PLANNED = (SN40L, NO_DDR, A100, H100, A100_ALL, H100_ALL, IDEAL, KERNELS)
RUN = (SN40L, NO_DDR, A100, H100)
BY_NAME: Final = {one.arm.name: one for one in PLANNED}


def plan_of(platform: Platform, count: int = EXPERTS, output: int = 20, batch: int = 1) -> ExpertsPlan:
    """The plan of a batch on a platform."""
    found = node(platform.node)
    if platform.host_bytes_per_s is not None:
        found = msgspec.structs.replace(found, host_bytes_per_s=round(platform.host_bytes_per_s))
    return plan_experts(ExpertsQuestion(
        spec=catalog.model(MODEL), node=found, count=count, prompt_tokens=PROMPT, output_tokens=output, batch=batch,
        all_links=platform.all_links, fusion=platform.fusion,
    ))  # fmt: skip


def predicted(options: Mapping[str, Any]) -> dict[str, float | None]:
    """Where the time of one batch goes, in milliseconds."""
    platform = BY_NAME[str(options["arm"])]
    plan = plan_of(platform, int(options["count"]), int(options["output"]), int(options["batch"]))
    parts = plan.parts
    return {
        "ms": parts.total_ns / 1e6,
        "router_ms": parts.router_ns / 1e6,
        "switching_ms": parts.switch_ns / 1e6,
        "prompts_ms": parts.prompt_ns / 1e6,
        "decode_ms": parts.decode_ns / 1e6,
        "switch_ms": plan.switch_ns / 1e6,
        "hit": plan.hit_rate,
        "switching": parts.switch_ns / parts.total_ns,
        "nodes": float(plan.nodes_on_device),
    }


def _planned(case: Case, count: int, output: int, batch: int) -> Computed:
    options: dict[str, float | str] = {"arm": case.arm, "count": count, "output": output, "batch": batch}
    return Computed(call=f"{__name__}:predicted", options=options)


def planned_experts(case: Case) -> Computed:
    """20 tokens for one request, by the number of models."""
    return _planned(case, int(case.at), 20, 1)


def planned_requests(case: Case) -> Computed:
    """150 models, by the published requests."""
    output, batch = REQUESTS[int(case.at)]
    return _planned(case, EXPERTS, output, batch)


def measure(point: Point) -> PointResult:
    """A plain run's figures, and those of models."""
    result = simulate(point.scenario)
    experts = result.experts
    if experts is None:
        return summarise(point, result)
    instances = sum(result.instances.values())
    figures: dict[str, float | None] = {
        "hit": experts.hit_rate,
        "switching": experts.wait_ps / PS_PER_NS / max(1, result.end_ns * instances),
        "requests_a_turn": experts.requests / max(1, experts.turns),
        "per_s": result.requests * NS_PER_S / max(1, result.end_ns),
    }
    return msgspec.structs.replace(summarise(point, result), figures=figures)


def _pool(platform: Platform, experts: ExpertsSpec, count: int = 1, **options: Any) -> PoolSpec:
    device = node(platform.node).device
    given = msgspec.structs.replace(experts, node=platform.node, host_bytes_per_s=platform.host_bytes_per_s)
    return PoolSpec(
        name="node", device=device, count=count, tensor_parallel=8, prefix_cache=False, experts=given,
        **{"kv_blocks": 640, **options},
    )  # fmt: skip


def _simulated(
    pool: PoolSpec, load: WorkloadSpec, seed: int, router: str = "least-outstanding", model: str = MODEL
) -> Simulated:
    fleet = FleetSpec(pools=(pool,), router=PolicySpec(name=router))
    scenario = Scenario(model=model, fleet=fleet, workload=load, seed=seed, sample_s=0, timer="analytic")
    return Simulated(scenario=scenario, measure=f"{__name__}:measure")


def _load(clients: int, mix: ExpertMix, requests: int, output: int = 20, prompt: int = PROMPT) -> WorkloadSpec:
    return WorkloadSpec(
        name=f"{clients} clients", input=FixedLength(tokens=prompt), output=FixedLength(tokens=output),
        arrivals=ClosedLoop(clients=clients), requests=requests, experts=mix, max_new="true",
    )  # fmt: skip


def run_experts(case: Case) -> Simulated:
    """One client, 20 tokens, by the number of models."""
    count, requests = int(case.at), 300 if case.fast else 1_500
    pool = _pool(BY_NAME[case.arm], ExpertsSpec(count=count, router=True))
    return _simulated(pool, _load(1, ExpertMix(count=count), requests), case.seed)


def run_requests(case: Case) -> Simulated:
    """150 models, by the published requests: a batch is as many clients, each asking again at once."""
    output, batch = REQUESTS[int(case.at)]
    requests = 100 * batch if case.fast else 600 * batch
    load = _load(batch, ExpertMix(count=EXPERTS), requests, output)
    return _simulated(_pool(BY_NAME[case.arm], ExpertsSpec(count=EXPERTS, router=True)), load, case.seed)


def run_cache(case: Case) -> Simulated:
    """One client who asks for one token at a time: the requests are the references of an LRU cache of `at` models.

    Small models, so that up to 150 of them are on one device; only how many matters here.
    """
    zipf = float(case.arm.partition("-")[2])
    spec = ExpertsSpec(count=EXPERTS, slots=int(case.at), order="arrival")
    pool = PoolSpec(name="node", device="sn40l", count=1, prefix_cache=False, kv_blocks=64, experts=spec)
    load = _load(1, ExpertMix(count=EXPERTS, zipf=zipf), 2_000 if case.fast else 6_000, output=1, prompt=64)
    return _simulated(pool, load, case.seed, model=SMALL)


GROUPED = Arm("grouped", "on", "turns grouped by model")
ARRIVAL = Arm("arrival", "off", "in the order of arrival")
AHEAD = Arm("prefetch", "baseline", "grouped, next model copied ahead")


def run_grouping(case: Case) -> Simulated:
    """Clients on one DGX A100 whose models are Zipf-popular."""
    order: Any = "arrival" if case.arm == ARRIVAL.name else "grouped"
    spec = ExpertsSpec(count=EXPERTS, router=True, order=order, prefetch=case.arm == AHEAD.name)
    load = _load(int(case.at), ExpertMix(count=EXPERTS, zipf=0.8), 400 if case.fast else 2_000)
    return _simulated(_pool(A100, spec, kv_blocks=2_560), load, case.seed)


AFFINE = Arm("affinity", "on", "a home for each model")
SPREAD = Arm("least-outstanding", "off", "fewest unfinished requests")


def run_affinity(case: Case) -> Simulated:
    """Eight DGX A100 under Poisson arrivals."""
    router = "expert-affinity" if case.arm == AFFINE.name else "least-outstanding"
    load = WorkloadSpec(
        name=f"{case.at:g}/s", input=FixedLength(tokens=PROMPT), output=FixedLength(tokens=20),
        arrivals=PoissonArrivals(rate_per_s=case.at), requests=500 if case.fast else 4_000,
        experts=ExpertMix(count=EXPERTS, zipf=0.8), max_new="true",
    )  # fmt: skip
    return _simulated(_pool(A100, ExpertsSpec(count=EXPERTS, router=True), 8), load, case.seed, router)
