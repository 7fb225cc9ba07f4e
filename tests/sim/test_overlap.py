"""Nano-batches as an option of a pool: faster when steps are full, leaping exactly, refused where it cannot be."""

from __future__ import annotations

import msgspec
import pytest

from megalith.base.errors import ConfigError
from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.specs.arrivals import ClosedLoop, PoissonArrivals
from megalith.specs.fleet import FleetSpec, PoolSpec
from megalith.specs.fleet_text import parse_fleet
from megalith.specs.lengths import FixedLength
from megalith.specs.workload import WorkloadSpec


def scenario(overlap: str, *, leap: bool = True, policy: str = "splitfuse", clients: int = 700) -> Scenario:
    fleet = parse_fleet(f"1xa100-80gb:tp8:budget=1024:seqs=800:policy={policy}:overlap={overlap}")
    load = WorkloadSpec(
        input=FixedLength(tokens=200), output=FixedLength(tokens=150), arrivals=ClosedLoop(clients=clients),
        requests=1_000,
    )  # fmt: skip
    return Scenario(model="llama-2-70b", fleet=fleet, workload=load, timer="analytic", leap=leap, sample_s=0)


def test_full_steps_are_faster_with_it() -> None:
    on, off = (simulate(scenario(overlap)) for overlap in ("nanoflow", "none"))
    assert on.figures.run.requests_per_s > 1.05 * off.figures.run.requests_per_s


@pytest.mark.parametrize("policy", ["splitfuse", "prefill-first"])
def test_leaping_is_stepping(policy: str) -> None:
    leap, step = (simulate(scenario("nanoflow", leap=leap, policy=policy, clients=400)) for leap in (True, False))
    assert leap.digest == step.digest


def test_a_light_load_pays_for_the_late_token_and_no_more() -> None:
    light = WorkloadSpec(
        input=FixedLength(tokens=100), output=FixedLength(tokens=20), arrivals=PoissonArrivals(rate_per_s=2.0),
        requests=60,
    )  # fmt: skip
    on, off = (
        simulate(msgspec.structs.replace(scenario(overlap), workload=light)).figures.latencies["e2e_ns"]
        for overlap in ("nanoflow", "none")
    )
    assert on is not None
    assert off is not None
    assert off.mean <= on.mean < 1.03 * off.mean


def test_what_cannot_be_combined() -> None:
    pool = PoolSpec(name="a", device="a100-80gb", count=1, tensor_parallel=4, pipeline_parallel=2, overlap="nanoflow")
    base = scenario("nanoflow")
    with pytest.raises(ConfigError, match="2 stages"):
        simulate(msgspec.structs.replace(base, fleet=FleetSpec(pools=(pool,))))
    with pytest.raises(ConfigError, match="none can overlap"):
        simulate(msgspec.structs.replace(base, timer="llumnix-7b"))
