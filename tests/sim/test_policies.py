"""Every policy that has a name, in a simulated cluster: all requests end, and the policy does what it is for."""

from __future__ import annotations

from typing import Any

import pytest

from megalith.policy.registry import CONTROLLERS, ROUTERS
from megalith.sim.run import SimResult, simulate
from megalith.sim.scenario import Scenario
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.fleet import FleetSpec, LinkSpec, PolicySpec, PoolSpec
from megalith.specs.lengths import UniformLength
from megalith.specs.workload import WorkloadSpec

REQUESTS = 300


def pool(name: str = "pool", count: int = 4, **options: Any) -> PoolSpec:
    return PoolSpec(name=name, device="h100-sxm", count=count, **({"kv_blocks": 1000} | options))


SPLIT = (pool("prompt", 2, role="prefill"), pool("token", 2, role="decode"))


def ran(
    pools: tuple[PoolSpec, ...], router: str = "round-robin", controllers: tuple[PolicySpec, ...] = (), **more: Any
) -> SimResult:
    fleet = FleetSpec(
        pools=pools,
        router=PolicySpec(name=router, options=more.pop("options", {})),
        controllers=controllers,
        link=LinkSpec(bytes_per_s=25e9, latency_s=1e-5),
        heartbeat_s=more.pop("heartbeat_s", 0.0),
    )
    workload = WorkloadSpec(
        input=UniformLength(10, 1500),
        output=UniformLength(1, 400),
        arrivals=PoissonArrivals(rate_per_s=more.pop("rate_per_s", 30.0)),
        requests=REQUESTS,
        max_new=400,
        **more,
    )
    return simulate(
        Scenario(model="llama-3.1-8b", fleet=fleet, workload=workload, timer="analytic", seed=3, sample_s=0)
    )


@pytest.mark.parametrize("heartbeat_s", [0.0, 0.5])
@pytest.mark.parametrize("pools", [(pool(),), SPLIT], ids=["mixed", "split"])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_gets_every_request_to_its_end(name: str, pools: Any, heartbeat_s: float) -> None:
    result = ran(pools, name, heartbeat_s=heartbeat_s)
    assert result.figures.finished == REQUESTS
    if pools is SPLIT:
        assert result.figures.transfers > 0
    elif name != "splitwise":  # its rule chooses the two ends apart among mixed instances as well
        assert result.figures.transfers == 0
    if heartbeat_s:
        assert ran(pools, name, heartbeat_s=heartbeat_s).digest == result.digest


@pytest.mark.parametrize("heartbeat_s", [0.0, 0.5])
@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_harms_nobody_with_old_facts_either(name: str, heartbeat_s: float) -> None:
    controllers = (PolicySpec(name=name),)
    result = ran((pool(kv_blocks=300),), "freeness", controllers, heartbeat_s=heartbeat_s)
    assert result.figures.finished + result.figures.rejected == REQUESTS
    assert result.figures.failed == 0


def of(result: SimResult, figure: str) -> Any:
    found = result.figures.latencies[figure]
    assert found is not None
    return found


def test_load_aware_routers_shorten_the_tail_of_the_first_token() -> None:
    pools = (pool(kv_blocks=2000),)
    blind = of(ran(pools, "random"), "ttft_ns")
    for name in ("least-outstanding", "least-tokens", "power-of-two", "freeness"):
        assert of(ran(pools, name), "ttft_ns").p99 < 0.95 * blind.p99, name


def test_rebalancing_removes_preemptions_that_another_instance_had_room_for() -> None:
    tight = (pool(kv_blocks=400),)
    options = {"threshold": 10.0, "period_s": 0.1}
    without = ran(tight, "round-robin", rate_per_s=10.0)
    migrating = ran(tight, "round-robin", (PolicySpec(name="rebalance", options=options),), rate_per_s=10.0)
    assert without.figures.preemptions > 0
    assert migrating.figures.preemptions == 0
    assert migrating.figures.migrations == migrating.migrations.done > 10
    assert of(migrating, "ttft_ns").p95 < 0.2 * of(without, "ttft_ns").p95


def test_splitwise_borrows_under_load_and_returns() -> None:
    calm = ran(SPLIT, "splitwise", rate_per_s=5.0)
    assert calm.figures.transfers > 0.98 * REQUESTS
    # A token pool that is too small for the load: prompt instances have to take decodes.
    small = (pool("prompt", 2, role="prefill"), pool("token", 1, role="decode"))
    busy = ran(small, "splitwise", rate_per_s=60.0)
    assert busy.figures.finished == REQUESTS
    assert 0 < busy.figures.transfers < REQUESTS
    plain = ran(small, "least-tokens", rate_per_s=60.0)
    for figure in ("e2e_ns", "ttft_ns"):
        assert of(busy, figure).p90 < 0.5 * of(plain, figure).p90
    guessing = ran(SPLIT, "splitwise", options={"lengths": "predicted"})
    capped = ran(SPLIT, "splitwise")
    # Answers are half as long as what is allowed: with a guess fewer instances have to be borrowed.
    assert guessing.figures.transfers > 1.2 * capped.figures.transfers
