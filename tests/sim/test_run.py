"""Whole scenarios: every kind of fleet runs to the end, leaping equals stepping, and the same seed gives one digest."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from megalith.base.errors import DoesNotFit
from megalith.sim.run import Run, SimResult, simulate
from megalith.sim.scenario import Scenario
from megalith.specs.fleet import FleetSpec, HandoffSpec, LinkSpec, PolicySpec, PoolSpec
from megalith.specs.workload import WorkloadSpec
from megalith.specs.workload_text import parse_workload

LOAD = "poisson:rate=9,input=lognormal:200:1.2,output=lognormal:60:1.0,requests=120"


def pool(name: str, count: int, **more: Any) -> PoolSpec:
    return PoolSpec(name=name, device="llumnix", count=count, kv_blocks=160, watermark=0.0, **more)


def load(text: str = LOAD) -> WorkloadSpec:
    return msgspec.structs.replace(parse_workload(text), max_input_tokens=1500, max_new=600, max_output_tokens=400)


def scenario(fleet: FleetSpec, **more: Any) -> Scenario:
    return Scenario(
        **{"model": "llama-2-7b", "fleet": fleet, "workload": load(), "timer": "llumnix-7b", "sample_s": 1.0} | more
    )


SPLIT = (pool("prompts", 2, role="prefill"), pool("tokens", 2, role="decode"))
SLOW = LinkSpec(bytes_per_s=2e9, latency_s=1e-4)
FLEETS = {
    "mixed": FleetSpec(pools=(pool("all", 3),)),
    "few blocks": FleetSpec(pools=(pool("all", 2),), router=PolicySpec(name="round-robin")),
    "stale": FleetSpec(pools=(pool("all", 3),), heartbeat_s=0.5, router=PolicySpec(name="least-kv")),
    "push": FleetSpec(pools=SPLIT, router=PolicySpec(name="least-tokens"), link=SLOW),
    "push local": FleetSpec(pools=SPLIT, router=PolicySpec(name="least-tokens"), handoff=HandoffSpec(refused="local")),
    "pull": FleetSpec(pools=SPLIT, router=PolicySpec(name="shortest-queue"), link=SLOW),
    "splitwise": FleetSpec(pools=(*SPLIT, pool("both", 1)), router=PolicySpec(name="splitwise"), link=SLOW),
    "llumnix": FleetSpec(
        pools=(pool("all", 3),), router=PolicySpec(name="freeness"),
        controllers=(PolicySpec(name="rebalance", options={"threshold": 30.0, "period_s": 0.1}),), link=SLOW,
    ),
    "blocking": FleetSpec(
        pools=(pool("all", 3),), router=PolicySpec(name="round-robin"),
        controllers=(PolicySpec(name="rebalance", options={"threshold": 30.0, "mode": "blocking"}),), link=SLOW,
    ),
    "recompute": FleetSpec(
        pools=(pool("all", 3),), router=PolicySpec(name="round-robin"),
        controllers=(PolicySpec(name="rebalance", options={"threshold": 30.0, "mode": "recompute"}),), link=SLOW,
    ),
}  # fmt: skip


def run(setting: Scenario) -> tuple[SimResult, Run]:
    one = Run(setting)
    while one.advance():
        pass
    for instance in one.cluster.instances.values():
        instance.scheduler.check_integrity()
        kv = instance.scheduler.kv
        assert kv.free_blocks == kv.num_blocks, "blocks are lost"
        assert not instance.lives
        facts = one.cluster.facts[instance.id]
        assert (facts.outstanding, facts.pending_tokens, facts.promised_tokens) == (0, 0, 0)
    return one.result(), one


def comparable(result: SimResult) -> dict[str, Any]:
    figures = msgspec.to_builtins(result.figures)
    return {"digest": result.digest, "figures": figures, "handoffs": result.handoffs, "moves": result.migrations}


@pytest.mark.parametrize("name", FLEETS)
def test_leaping_equals_stepping(name: str) -> None:
    setting = scenario(FLEETS[name])
    leapt, _ = run(setting)
    stepped, _ = run(msgspec.structs.replace(setting, leap=False))
    assert comparable(leapt) == comparable(stepped)
    assert leapt.figures.finished == 120
    assert leapt.events < stepped.events


@pytest.mark.parametrize("name", ["push", "pull", "splitwise"])
def test_prompts_are_handed_over(name: str) -> None:
    result, _ = run(scenario(FLEETS[name]))
    assert result.handoffs.done > 10
    assert result.figures.transfers == result.handoffs.done


@pytest.mark.parametrize("name", ["llumnix", "blocking", "recompute"])
def test_requests_are_migrated(name: str) -> None:
    result, _ = run(scenario(FLEETS[name]))
    assert result.migrations.done > 5
    assert result.figures.migrations == result.migrations.done


def test_the_seed_decides_and_the_digest_says_so() -> None:
    digests = [simulate(scenario(FLEETS["llumnix"], seed=seed)).digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_is_the_same_on_every_machine() -> None:
    """A golden value: it changes only when decisions or times do, and then on purpose."""
    assert simulate(scenario(FLEETS["mixed"], seed=7)).digest == GOLDEN


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    workload = load("closed:clients=4,input=100,output=20,requests=40")
    result, _ = run(scenario(FLEETS["mixed"], workload=workload))
    assert result.figures.finished == 40
    assert result.figures.run.peak_present <= 4.0


def test_a_model_that_does_not_fit_is_refused_with_numbers() -> None:
    fleet = FleetSpec(pools=(PoolSpec(name="small", device="l4", count=1),))
    with pytest.raises(DoesNotFit, match="llama-3\\.1-70b"):
        Run(Scenario(model="llama-3.1-70b", fleet=fleet, workload=load()))


GOLDEN = "198c219df5496cc476b658589a6a0b65"
