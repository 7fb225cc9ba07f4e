"""Failures, stragglers, power and scaling in whole runs: nothing is lost, and leaping equals stepping."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from megalith.sim.run import Run, SimResult
from megalith.sim.scenario import Scenario
from megalith.specs.fleet import FaultSpec, FleetSpec, LinkSpec, MigrationSpec, PolicySpec, PoolSpec, PowerSpec
from megalith.specs.workload_text import parse_workload

LOAD = "poisson:rate=6,input=lognormal:200:1.2,output=lognormal:60:1.0,requests=100"
SLOW = LinkSpec(bytes_per_s=2e9, latency_s=1e-4)
FAULTS = FaultSpec(at_s=(2.0, 4.0, 4.1, 7.0, 11.0), repair_s=3.0)


def pool(name: str, count: int, **more: Any) -> PoolSpec:
    return PoolSpec(name=name, device="llumnix", count=count, kv_blocks=160, watermark=0.0, **more)


def scenario(fleet: FleetSpec, **more: Any) -> Scenario:
    load = msgspec.structs.replace(parse_workload(LOAD), max_input_tokens=1500, max_new=600, max_output_tokens=400)
    return Scenario(
        **{"model": "llama-2-7b", "fleet": fleet, "workload": load, "timer": "llumnix-7b", "sample_s": 1.0} | more
    )


SPLIT = (pool("prompts", 3, role="prefill"), pool("tokens", 3, role="decode"))
SCALER = PolicySpec(
    name="threshold-scaling",
    options={"period_s": 1.0, "up_cooldown_s": 1.0, "down_cooldown_s": 2.0, "up_above": 0.5, "by": "kv"},
)
REBALANCE = PolicySpec(name="rebalance", options={"threshold": 30.0, "period_s": 0.1})
FLEETS = {
    "failures": FleetSpec(pools=(pool("all", 3),), faults=FAULTS),
    "old facts": FleetSpec(pools=(pool("all", 3),), faults=FAULTS, heartbeat_s=0.5),
    "push": FleetSpec(pools=SPLIT, router=PolicySpec(name="least-tokens"), link=SLOW, faults=FAULTS),
    "pull": FleetSpec(pools=SPLIT, router=PolicySpec(name="shortest-queue"), link=SLOW, faults=FAULTS),
    "migration": FleetSpec(
        pools=(pool("all", 3),), router=PolicySpec(name="round-robin"), controllers=(REBALANCE,), link=SLOW,
        faults=FAULTS, migration=MigrationSpec(slowdown=1.02, stage_s=0.001),
    ),
    "wear": FleetSpec(pools=(pool("all", 4),), faults=FaultSpec(mtbf_h=0.003, repair_s=2.0)),
    "stragglers": FleetSpec(pools=(pool("all", 4),), faults=FaultSpec(straggler_share=0.5, straggler_factor=1.5)),
    "scaling": FleetSpec(
        pools=(pool("all", 1, max_count=4, start_s=1.5),), controllers=(SCALER,),
        faults=FaultSpec(at_s=(9.0,), repair_s=2.0),
    ),
}  # fmt: skip


def run(setting: Scenario) -> tuple[SimResult, Run]:
    one = Run(setting)
    while one.advance():
        pass
    assert len(one.handoffs) == len(one.migrations) == one.network.moving == 0
    for instance in one.cluster.instances.values():
        instance.scheduler.check_integrity()
        assert instance.scheduler.kv.used_blocks == 0, "blocks are lost"
        assert not instance.lives
        facts = one.cluster.facts[instance.id]
        assert (facts.outstanding, facts.pending_tokens, facts.promised_tokens) == (0, 0, 0), instance.id
    return one.result(), one


@pytest.mark.parametrize("name", FLEETS)
def test_all_requests_end_and_leaping_equals_stepping(name: str) -> None:
    setting = scenario(FLEETS[name])
    leapt, leaping = run(setting)
    stepped, stepping = run(msgspec.structs.replace(setting, leap=False))
    assert leapt.digest == stepped.digest
    assert msgspec.to_builtins(leapt.figures) == msgspec.to_builtins(stepped.figures)
    assert leapt.figures.finished == 100
    for one in (leaping, stepping):
        counters = one.operations.faults.counters
        if FLEETS[name].faults.at_s or FLEETS[name].faults.mtbf_h:
            assert counters.failures >= 1
            assert counters.requeued >= 1
    assert leaping.operations.faults.counters == stepping.operations.faults.counters
    assert leaping.operations.scaling.counters == stepping.operations.scaling.counters
    assert leaping.operations.scaling.instance_hours() == stepping.operations.scaling.instance_hours()


def test_stragglers_are_slower() -> None:
    fair = run(scenario(msgspec.structs.replace(FLEETS["stragglers"], faults=FaultSpec())))[0]
    slow, one = run(scenario(FLEETS["stragglers"]))
    assert 1 <= one.operations.faults.counters.stragglers <= 3
    gaps = [result.figures.latencies["tpot_ns"] for result in (slow, fair)]
    assert gaps[0] is not None
    assert gaps[1] is not None
    assert gaps[0].mean > 1.1 * gaps[1].mean


def row(**power: Any) -> Scenario:
    spec = PowerSpec(**{"budget_w": 1100.0, "telemetry_s": 0.5, "actuation_s": 2.0} | power)
    pools = (
        PoolSpec(name="low", device="a100-sxm-80gb", count=2, kv_blocks=400),
        PoolSpec(name="high", device="a100-sxm-80gb", count=2, kv_blocks=400),
    )
    polca = PolicySpec(name="polca", options={"low": ["low"], "high": ["high"], "hold_s": 2.0})
    return scenario(FleetSpec(pools=pools, controllers=(polca,), power=spec), timer="analytic")


def test_capping_saves_power_and_leaping_equals_stepping() -> None:
    leapt, leaping = run(row())
    stepped, stepping = run(msgspec.structs.replace(row(), leap=False))
    assert leapt.digest == stepped.digest
    power, other = leaping.operations.power, stepping.operations.power
    assert power is not None
    assert other is not None
    assert power.counters == other.counters
    assert power.energy_j() == other.energy_j()
    assert power.counters.clock_changes >= 1
    _, plain = run(row(budget_w=1e6))
    assert plain.operations.power is not None
    assert plain.operations.power.counters.clock_changes == 0
    assert power.counters.peak_w <= plain.operations.power.counters.peak_w
    assert power.energy_j() < plain.operations.power.energy_j()


def test_a_fleet_grows_with_its_load() -> None:
    _, one = run(scenario(FLEETS["scaling"]))
    counters = one.operations.scaling.counters
    assert counters.started >= 1
    hours = one.operations.scaling.instance_hours()
    assert one.kernel.now_ns / 3.6e12 < hours < 4 * one.kernel.now_ns / 3.6e12
