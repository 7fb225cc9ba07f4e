"""Random scenarios with everything on: every request ends once and whole, nothing is left behind, leaping is stepping.

Fleets, routers, controllers, loads and faults are drawn from a seed. To look at one that fails: `draw(seed)`.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import msgspec
import pytest

from megalith.policy.batching import POLICY_NAMES
from megalith.policy.registry import ROUTERS
from megalith.sim.live import Live
from megalith.sim.record import Recorder
from megalith.sim.run import Run, SimResult
from megalith.sim.scenario import Scenario
from megalith.specs.conversations import Conversations
from megalith.specs.fleet import (
    FaultSpec,
    FleetSpec,
    HandoffSpec,
    LinkSpec,
    MigrationSpec,
    PolicySpec,
    PoolSpec,
    PowerSpec,
)
from megalith.specs.lengths import FixedLength
from megalith.specs.workload import WorkloadSpec
from megalith.specs.workload_text import parse_workload

SEEDS = range(90)


class Ledger(Recorder):
    """A recorder that also keeps every request that ended, as it was when it ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[tuple[Any, ...]] = []

    def finished(self, live: Live) -> None:  # type: ignore[override]
        self.ended.append(
            (live.request.id, live.outcome, live.request.arrival_ns, live.scheduled_ns, live.first_ns, live.finish_ns,
             live.generated, live.output_tokens, live.preemptions, live.migrations, live.cached_tokens,
             live.request.prompt_tokens, live.instance)
        )  # fmt: skip
        super().finished(live)


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    dice = Random(seed)
    split = dice.random() < 0.5
    router = dice.choice([name for name in ROUTERS if split or name != "splitwise"])
    roles = ["prefill", "decode"] if split else ["mixed"]
    if dice.random() < 0.3:
        roles.append("mixed")
    powered = dice.random() < 0.4
    return Scenario(
        model="llama-2-7b",
        timer="analytic" if powered else dice.choice(["llumnix-7b", "analytic"]),
        seed=seed,
        sample_s=dice.choice([0.0, 0.7]),
        workload=_workload(dice),
        fleet=FleetSpec(
            pools=tuple(_pool(dice, f"{role}-{number}", role) for number, role in enumerate(roles)),
            router=PolicySpec(name=router, options=_router_options(dice)),
            controllers=tuple(_controllers(dice, powered)),
            heartbeat_s=dice.choice([0.0, 0.0, 0.05, 1.0]),
            link=LinkSpec(
                bytes_per_s=dice.choice([2e8, 2e9, 25e9]),
                latency_s=dice.choice([0.0, 1e-4]),
                contention=dice.random() < 0.8,
                ports=dice.choice([1, 2]),
            ),
            handoff=HandoffSpec(
                refused=dice.choice(["wait", "local"]),
                max_waiting=dice.choice([1, 1024]),
                max_wait_s=dice.choice([0.0, 0.5, 60.0]),
                hidden=dice.choice([0.0, 0.9]),
                whole_blocks=dice.random() < 0.5,
            ),
            migration=MigrationSpec(
                stage_s=dice.choice([0.0, 0.003]), slowdown=dice.choice([1.0, 1.3]), at_once=dice.choice([1, 3])
            ),
            power=PowerSpec(budget_w=dice.choice([500.0, 3000.0]), actuation_s=dice.choice([0.0, 3.0]))
            if powered
            else None,
            faults=_faults(dice),
        ),
    )


def _pool(dice: Random, name: str, role: Any) -> PoolSpec:
    preempt = dice.choice(["recompute", "swap"])
    stages = dice.choice([1, 1, 1, 1, 2])
    return PoolSpec(
        name=name,
        device="a100-80gb",
        role=role,
        count=dice.randint(1, 3),
        pipeline_parallel=stages,
        policy=dice.choice(POLICY_NAMES) if stages == 1 else "splitfuse",
        token_budget=dice.choice([64, 512, 2048]),
        max_sequences=dice.choice([2, 8, 256]),
        max_waiting=dice.choice([3, 1000, 1000]),
        kv_blocks=dice.choice([70, 120, 400]),
        prefix_cache=dice.random() < 0.7,
        watermark=dice.choice([0.0, 0.05]),
        preempt=preempt,
        host_blocks=dice.choice([0, 60]) if preempt == "swap" else 0,
        max_count=dice.choice([None, 5]),
        start_s=dice.choice([0.0, 1.5]),
    )


def _router_options(dice: Random) -> dict[str, Any]:
    options = {"retry_s": dice.choice([0.01, 0.5]), "patience_s": dice.choice([0.0, 2.0, 60.0])}
    return options | {"transfer": dice.choice(["push", "pull", "layerwise"])}


def _controllers(dice: Random, powered: bool) -> list[PolicySpec]:
    found = []
    if dice.random() < 0.5:
        options = {
            "threshold": dice.choice([3.0, 30.0]),
            "period_s": dice.choice([0.05, 0.3]),
            "mode": dice.choice(["live", "blocking", "recompute"]),
            "across_pools": dice.random() < 0.5,
            "max_stages": dice.choice([1, 4]),
            "deadline_s": dice.choice([0.1, 60.0]),
        }
        found.append(PolicySpec(name="rebalance", options=options))
    if dice.random() < 0.4:
        name = dice.choice(["freeness-scaling", "threshold-scaling"])
        options = {"period_s": 0.5, "up_cooldown_s": 0.0, "down_cooldown_s": 0.0, "max_count": 4}
        found.append(PolicySpec(name=name, options=options))
    if powered and dice.random() < 0.6:
        found.append(PolicySpec(name=dice.choice(["polca", "single-threshold", "no-cap"])))
    return found


def _faults(dice: Random) -> FaultSpec:
    return FaultSpec(
        mtbf_h=dice.choice([None, None, 0.004]),
        repair_s=dice.choice([0.0, 1.0, 5.0]),
        at_s=tuple(sorted(dice.uniform(0.0, 8.0) for _ in range(dice.choice([0, 0, 1, 4])))),
        straggler_share=dice.choice([0.0, 0.5]),
        straggler_factor=2.0,
    )


def _workload(dice: Random) -> WorkloadSpec:
    rate, requests = dice.choice([2, 8, 30]), dice.randint(20, 60)
    lengths = dice.choice(
        ["input=lognormal:200:1.0,output=lognormal:60:1.0", "input=fixed:320,output=lognormal:40:1.5"]
    )
    start = dice.choice([f"poisson:rate={rate}", f"gamma:rate={rate},cv=4", f"closed:clients={dice.randint(1, 20)}"])
    workload = parse_workload(f"{start},{lengths},requests={requests}")
    talks = None
    if not start.startswith("closed") and dice.random() < 0.5:
        talks = Conversations(continue_share=0.7, turn=FixedLength(tokens=40), pause_s=0.5, shared_tokens=64)
    return msgspec.structs.replace(
        workload,
        max_input_tokens=dice.choice([600, 900]),
        max_output_tokens=200,
        max_new=dice.choice([200, 60, "true", "context"]),
        priority_share=dice.choice([0.0, 0.3]),
        conversations=talks,
        prefix_block_tokens=64,
    )


def run(scenario: Scenario) -> tuple[Run, Ledger, SimResult]:
    ledger = Ledger()
    one = Run(scenario, recorder=ledger)
    while one.advance():
        assert one.kernel.events < 2_000_000, "it does not come to an end"
    return one, ledger, one.result()


def check_ends(scenario: Scenario, ledger: Ledger) -> None:
    """Every request ended once, with the tokens that it wanted and its times in order."""
    counts = Counter(row[0] for row in ledger.ended)
    assert set(counts) == set(range(scenario.workload.requests or 0))
    assert set(counts.values()) == {1}
    for _, outcome, arrival, scheduled, first, finish, generated, wanted, *rest in ledger.ended:
        assert outcome in ("finished", "rejected", "failed")
        assert 0 <= generated <= wanted
        assert (outcome == "rejected") <= (scheduled < 0), "it had begun"
        assert (outcome == "failed") <= (scheduled >= 0)
        assert rest[2] <= rest[3], "more cached than the prompt has"
        if outcome == "finished":
            assert generated == wanted
            assert arrival <= scheduled < first <= finish
            assert (first == finish) == (wanted == 1)


def check_nothing_left(one: Run) -> None:
    """Counters are zero again, no block is held, nothing is on the wire."""
    cluster = one.cluster
    assert not cluster.live
    for instance in cluster.instances.values():
        instance.scheduler.check_integrity()
        assert instance.scheduler.kv.free_blocks == instance.scheduler.kv.num_blocks, f"{instance.id} leaks blocks"
        assert not instance.lives
        facts = cluster.facts[instance.id]
        assert (facts.outstanding, facts.pending_tokens, facts.promised_tokens) == (0, 0, 0), instance.id
        assert (facts.running(), facts.waiting(), facts.preempted()) == (0, 0, 0)
    assert len(one.handoffs) == len(one.migrations) == one.network.moving == 0
    assert not any(one.handoffs.waiting(instance) for instance in cluster.instances)


def check_sums(one: Run, result: SimResult) -> None:
    """Tokens and time add up."""
    figures, fleet = result.figures, one.scenario.fleet
    assert figures.finished + figures.rejected + figures.failed == result.requests
    generated = sum(row[6] for row in one.recorder.ended)  # type: ignore[attr-defined]
    sampled = sum(row[4] >= 0 for row in one.recorder.ended)  # type: ignore[attr-defined]
    assert figures.step_decode_tokens <= generated - sampled
    # A decode that a step of `splitwise` left out comes back in the list of prompts, and is counted with them.
    undisturbed = not (figures.preemptions or result.faults.failures or result.migrations.done)
    undisturbed = undisturbed and all(pool.policy != "splitwise" for pool in fleet.pools)
    if undisturbed:
        assert figures.step_decode_tokens == generated - sampled
        if not figures.rejected:
            assert figures.step_prompt_tokens == figures.prompt_tokens - figures.cached_tokens
    if all(pool.pipeline_parallel == 1 for pool in fleet.pools):
        assert figures.busy_s <= result.instance_hours * 3600 * (1 + 1e-9) + 1e-6
    for latency in ("ttft_ns", "e2e_ns", "queue_ns"):
        found = figures.latencies[latency]
        assert found is None or 0 <= found.minimum <= found.p50 <= found.p99 <= found.maximum
    ttft, queue = figures.latencies["ttft_ns"], figures.latencies["queue_ns"]
    assert (ttft is None) == (queue is None)
    assert ttft is None or queue is None or ttft.mean >= queue.mean
    assert 0.0 <= figures.paused_share <= 1.0


def comparable(ledger: Ledger, result: SimResult) -> dict[str, Any]:
    figures = msgspec.to_builtins(result.figures)
    return {
        "ended": ledger.ended, "figures": figures, "digest": result.digest, "handoffs": result.handoffs,
        "migrations": result.migrations, "faults": result.faults, "scaling": result.scaling, "power": result.power,
        "hours": result.instance_hours, "prefix": repr(result.prefix_hit_share),
    }  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_scenario_keeps_its_books(seed: int) -> None:
    scenario = draw(seed)
    one, ledger, result = run(scenario)
    check_ends(scenario, ledger)
    check_nothing_left(one)
    check_sums(one, result)
    _, stepped_ledger, stepped = run(msgspec.structs.replace(scenario, leap=False))
    assert comparable(ledger, result) == comparable(stepped_ledger, stepped)
