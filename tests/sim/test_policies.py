"""Every policy that has a name, in a simulated cluster: all requests end, and the policy does what it is for."""

from __future__ import annotations

from typing import Any

import pytest

from megalith.base.errors import ConfigError
from megalith.policy.registry import CONTROLLERS, ROUTERS
from megalith.sim.run import SimResult, simulate
from megalith.sim.scenario import Scenario
from megalith.specs.arrivals import OnOffArrivals, PoissonArrivals
from megalith.specs.conversations import Conversations
from megalith.specs.fleet import FaultSpec, FleetSpec, LinkSpec, PolicySpec, PoolSpec, PowerSpec
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
        power=more.pop("power", None),
        faults=more.pop("faults", FaultSpec()),
    )
    rate_per_s = more.pop("rate_per_s", 30.0)
    workload = WorkloadSpec(
        input=UniformLength(10, 1500),
        output=UniformLength(1, 400),
        arrivals=more.pop("arrivals", PoissonArrivals(rate_per_s=rate_per_s)),
        requests=more.pop("requests", REQUESTS),
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


POWER = ("polca", "single-threshold", "no-cap")


@pytest.mark.parametrize("name", POWER)
def test_a_power_policy_without_a_power_domain_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no power domain"):
        ran((pool(kv_blocks=300),), "freeness", (PolicySpec(name=name),))


NEEDS_A_FILE = ("posterior-scaling",)
"""tests/policy/test_posterior.py has them with one."""


@pytest.mark.parametrize("name", NEEDS_A_FILE)
def test_a_policy_that_needs_a_file_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match="needs a posterior"):
        ran((pool(kv_blocks=300),), "freeness", (PolicySpec(name=name),))


@pytest.mark.parametrize("heartbeat_s", [0.0, 0.5])
@pytest.mark.parametrize("name", [name for name in CONTROLLERS if name not in (*POWER, *NEEDS_A_FILE)])
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


@pytest.mark.parametrize("name", ["freeness-scaling", "threshold-scaling"])
@pytest.mark.parametrize("heartbeat_s", [0.0, 0.5])
def test_scaling_follows_bursts_with_fewer_hours_than_the_most(name: str, heartbeat_s: float) -> None:
    bursts: dict[str, Any] = {"arrivals": OnOffArrivals(rate_per_s=8.0, on_s=10, off_s=20), "requests": 900}
    elastic = (pool(count=2, kv_blocks=400, max_count=8, start_s=5.0),)
    options = {"max_count": 8, "period_s": 2.0}
    if name == "threshold-scaling":
        options |= {"up_cooldown_s": 4.0, "down_cooldown_s": 8.0}
    controllers = (PolicySpec(name="rebalance"), PolicySpec(name=name, options=options))
    scaled = ran(elastic, "freeness", controllers, heartbeat_s=heartbeat_s, **bursts)
    fixed = ran((pool(count=2, kv_blocks=400),), "freeness", heartbeat_s=heartbeat_s, **bursts)
    assert scaled.figures.finished == fixed.figures.finished == 900
    assert scaled.scaling.started > 6  # more than once from two to eight
    assert scaled.scaling.stopped > 4
    assert of(scaled, "ttft_ns").p99 < 0.5 * of(fixed, "ttft_ns").p99
    assert scaled.instance_hours < 0.7 * 8 * scaled.end_ns / 3.6e12


def test_polca_brakes_less_than_one_threshold_and_that_less_than_none() -> None:
    pools = (pool("batch", 2, kv_blocks=3000), pool("chat", 2, kv_blocks=3000))
    power = PowerSpec(budget_w=2000.0, actuation_s=4.0, telemetry_s=1.0)
    brakes = {}
    for name in ("no-cap", "single-threshold", "polca"):
        options: dict[str, Any] = {"low": ["batch"], "high": ["chat"]} | ({"hold_s": 4.0} if name == "polca" else {})
        controllers = (PolicySpec(name=name, options=options),)
        result = ran(pools, "least-tokens", controllers, power=power, rate_per_s=55.0, requests=2000)
        assert result.figures.finished == 2000
        assert result.power is not None
        brakes[name] = result.power.brakes
    assert brakes["polca"] < brakes["single-threshold"] < brakes["no-cap"]
    assert brakes == {"polca": 0, "single-threshold": 3, "no-cap": 6}, "docs/systems.md says so"


@pytest.mark.parametrize("router", ["splitwise", "least-tokens", "shortest-queue"])
def test_failures_in_both_pools_lose_nobody(router: str) -> None:
    pools = (pool("prompt", 3, role="prefill"), pool("token", 2, role="decode"))
    faults = FaultSpec(at_s=(2.0, 4.0, 4.5, 5.0), repair_s=3.0)
    result = ran(pools, router, faults=faults)
    assert result.faults.failures == 4
    assert result.figures.finished == REQUESTS


def test_rebalancing_and_scaling_survive_failures() -> None:
    pools = (pool(count=3, kv_blocks=400, max_count=6, start_s=2.0),)
    controllers = (PolicySpec(name="rebalance"), PolicySpec(name="freeness-scaling", options={"period_s": 1.0}))
    result = ran(pools, "freeness", controllers, faults=FaultSpec(at_s=(2.0, 4.0, 4.5), repair_s=3.0))
    assert result.faults.failures == 3
    assert result.figures.finished == REQUESTS


def test_prefix_aware_routers_find_more_of_a_conversation_and_start_earlier() -> None:
    turns = Conversations(continue_share=0.8, turn=UniformLength(20, 200), pause_s=5.0, pause_sigma=0.5)
    chats: dict[str, Any] = {"conversations": turns, "prefix_block_tokens": 16, "requests": 800, "rate_per_s": 25.0}
    pools = (pool(count=6, kv_blocks=3000),)
    blind = ran(pools, "least-outstanding", **chats)
    weighed = [ran(pools, "prefix-aware", options={"overlap_weight": weight}, **chats) for weight in (1.0, 10.0)]
    follows = ran(pools, "prefix-threshold", **chats)
    hits = [result.prefix_hit_share for result in (blind, *weighed, follows)]
    assert hits == sorted(hits)
    assert hits[1] > 2 * hits[0]
    first = [of(result, "ttft_ns").mean for result in (blind, *weighed, follows)]
    assert first[0] > first[1] > first[2]
    assert max(first[2:]) < 0.85 * first[0]
