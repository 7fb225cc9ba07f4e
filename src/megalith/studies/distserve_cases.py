"""The fleets and loads of the DistServe study, and how a point of it is measured: one goodput search.

OPT-13B on A100 with the step times of DistServe's simulator, in two sets: its own engine's and those of vLLM.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from megalith.plan.goodput import GoodputQuestion, alone, goodput
from megalith.plan.placement import plan_placement
from megalith.plan.placement_question import MOST_SEQUENCES, PROMPT_TOKENS, PlacementQuestion
from megalith.sim.scenario import Scenario
from megalith.sim.setups import apply
from megalith.sim.sweep import Point, PointResult
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.fleet import FleetSpec, LinkSpec, PoolSpec
from megalith.specs.lengths import FixedLength
from megalith.specs.slo import make_slo
from megalith.specs.workload import WorkloadSpec
from megalith.specs.workload_catalog import workloads
from megalith.studies.run import StudyPoint
from megalith.studies.study import Simulated

Engine: TypeAlias = Literal["vllm", "distserve"]
MODEL, DEVICE = "opt-13b", "a100-80gb"
LINK_BYTES_PER_S = 300e9
"""NVLink of an A100, one way (data sheet); the published placements keep KV inside a node."""
CONTEXT = 2048
"""Of OPT; longer requests are left out, as published."""
SPLITFUSE = (512, 2048)
"""Token budgets of the chunked control; the better one counts."""
MS = 1_000_000


def fixed(prompt: int = 512, answer: int = 64) -> WorkloadSpec:
    """The load of figure 1: every request the same."""
    return WorkloadSpec(
        name=f"{prompt} in, {answer} out", input=FixedLength(tokens=prompt), output=FixedLength(tokens=answer),
        arrivals=PoissonArrivals(rate_per_s=1.0),
    )  # fmt: skip


def conversations() -> WorkloadSpec:
    """Stands in for DistServe's ShareGPT: the lengths of Azure conversations that fit the model."""
    return msgspec.structs.replace(
        workloads()["azure-conv"].spec,
        arrivals=PoissonArrivals(rate_per_s=1.0),
        requests=None,
        max_total_tokens=CONTEXT,
    )


def colocated(policy: str = "prefill-first", budget: int = PROMPT_TOKENS, tp: int = 1) -> FleetSpec:
    """One instance that does both."""
    return FleetSpec(pools=(_pool("mixed", 1, tp, policy, budget),), link=_link())


def split(prefills: int, decodes: int, prefill_tp: int = 1, decode_tp: int = 1) -> FleetSpec:
    """Instances of each phase."""
    pools = (
        _pool("prefill", prefills, prefill_tp, "prefill-first", PROMPT_TOKENS),
        _pool("decode", decodes, decode_tp, "prefill-first", PROMPT_TOKENS),
    )
    return apply("distserve", FleetSpec(pools=pools, link=_link()))


def scenario(
    fleet: FleetSpec, load: WorkloadSpec, engine: Engine, ttft_ms: float, tpot_ms: float, seed: int
) -> Scenario:
    """Nine of ten requests within both limits at once."""
    slo = make_slo(ttft_ns=round(ttft_ms * MS), tpot_ns=round(tpot_ms * MS))
    return Scenario(
        model=MODEL, fleet=fleet, workload=load, slo=slo, seed=seed, timer=f"distserve:{engine}", sample_s=0
    )


def fleet_of(arm: str) -> FleetSpec:
    """By the name of an arm."""
    if arm.startswith("splitfuse-"):
        return colocated("splitfuse", int(arm.removeprefix("splitfuse-")))
    match arm:
        case "colocated":
            return colocated()
        case "colocated-tp2":
            return colocated(tp=2)
        case "2p1d":
            return split(2, 1)
        case "tp2-1p1d":
            return split(1, 1, prefill_tp=2)
        case _:
            return split(1, 1)


def searched(point: Scenario, fast: bool, phase: str = "", least: int = 1000, residences: float = 10.0) -> Simulated:
    """A goodput search as a point of a study; `phase`: of that one alone."""
    if phase in ("prefill", "decode"):
        point = alone(point, "prefill" if phase == "prefill" else "decode")
    options: dict[str, float | str] = {"step": 1.05 if fast else 1.02, "least": least, "residences": residences}
    return Simulated(scenario=point, measure=f"{__name__}:measure", options=options)


def measure(point: Point) -> PointResult:
    """One goodput search."""
    assert isinstance(point, StudyPoint)
    step, least, residences = (float(point.options[name]) for name in ("step", "least", "residences"))
    question = GoodputQuestion(
        scenario=point.scenario, guess_per_s=4.0, step=step, least_requests=round(least), residences=residences
    )
    found = goodput(question)
    return PointResult(
        key=point.key, labels=point.labels, requests=found.requests, devices=found.devices, binding=found.breaks,
        attained=found.attained, figures={
            "rate": found.rate_per_s, "per_device": found.per_device_per_s, "residences": found.residences,
            "runs": float(found.runs),
        },
    )  # fmt: skip


def place(options: dict[str, float | str]) -> dict[str, float | None]:
    """The placement search inside a node of four devices; or every candidate of it."""
    question = PlacementQuestion(
        model=MODEL, workload=fixed(), device=DEVICE, affinity="low", node_devices=4, timer="distserve:vllm",
        slo=make_slo(ttft_ns=400 * MS, tpot_ns=round(float(options["tpot_ms"]) * MS)), tensor_parallel=(1, 2, 4),
        pipeline_parallel=(1,), seed=int(options["seed"]),
        step=float(options["step"]), exhaustive=bool(options["exhaustive"]),
    )  # fmt: skip
    plan = plan_placement(question)
    units = [one for one in plan.measured if one.what == "unit"]
    shape = plan.fleet.unit
    return {
        "per_device": plan.fleet.rate_per_s / plan.fleet.devices, "units": float(len(units)), "runs": float(plan.runs),
        "prefills": float(shape.prefills), "decodes": float(shape.decodes), "gain": plan.gain,
        "prefill_tp": float(shape.prefill.tensor_parallel), "decode_tp": float(shape.decode.tensor_parallel),
    }  # fmt: skip


def _pool(role: Literal["mixed", "prefill", "decode"], count: int, tp: int, policy: str, budget: int) -> PoolSpec:
    return PoolSpec(
        name=role, device=DEVICE, count=count, role=role, tensor_parallel=tp, policy=policy, token_budget=budget,
        max_sequences=MOST_SEQUENCES, prefix_cache=False,
    )  # fmt: skip


def _link() -> LinkSpec:
    return LinkSpec(bytes_per_s=LINK_BYTES_PER_S, latency_s=10e-6)
