"""KV of one request on several instances: blocks are conserved, time adds up, and without it nothing is different."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.cost.timer import Prompt
from megalith.policy.cluster import Command, Event, MoveKv, View
from megalith.policy.pooled_kv import Lending
from megalith.sim.build import Builder
from megalith.sim.pooled_instance import PooledInstance
from megalith.sim.run import Run, SimResult
from megalith.sim.scenario import Scenario
from megalith.sim.setups import apply
from megalith.specs import catalog
from megalith.specs.arrivals import ClosedLoop, PoissonArrivals
from megalith.specs.fleet import FaultSpec, FleetSpec, LinkSpec, PolicySpec, PoolSpec
from megalith.specs.fleet_text import parse_fleet
from megalith.specs.lengths import FixedLength, UniformLength
from megalith.specs.workload import WorkloadSpec

BLOCKS = 64
SPEC = msgspec.structs.replace(catalog.model("llama-2-7b"), max_context=100_000)


class Rogue:
    """Orders any moves at all, sensible or not."""

    name = "rogue"
    listens = frozenset({"tick"})

    def __init__(self, options: object, seed: int = 0) -> None:
        self.lending = Lending(0.8, 0.5, 0.1)
        self.period_ns: int | None = 20_000_000
        self._seed, self._drawn = seed, 0

    def _draw(self, below: int) -> int:
        self._drawn += 1
        return splitmix64(self._seed, self._drawn) % below

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """Up to three moves of anything to anywhere."""
        instances = view.instances
        for _ in range(self._draw(4)):
            source, target = (instances[self._draw(len(instances))] for _ in range(2))
            head = source.first_waiting()
            known = [*source.requests(), *([head] if head else [])]
            if known:
                yield MoveKv(known[self._draw(len(known))].id, source.id, target.id, self._draw(20))


def fleet(controller: PolicySpec | None, count: int = 4, **more: Any) -> FleetSpec:
    pool = PoolSpec(
        name="all", device="a100-80gb", count=count, kv_blocks=BLOCKS, timer="llumnix-7b", token_budget=256,
        **more.pop("pool", {}),
    )  # fmt: skip
    values: dict[str, Any] = {"router": PolicySpec(name="round-robin"), "link": LinkSpec(bytes_per_s=5e9), **more}
    return FleetSpec(pools=(pool,), controllers=(controller,) if controller else (), **values)


def load(longest: int, requests: int = 60, rate: float = 40.0, output: int = 150) -> WorkloadSpec:
    return WorkloadSpec(
        input=UniformLength(low=1, high=longest), output=UniformLength(low=1, high=output),
        arrivals=PoissonArrivals(rate_per_s=rate), requests=requests,
    )  # fmt: skip


def start(a_fleet: FleetSpec, work: WorkloadSpec, seed: int = 0, leap: bool = True) -> Run:
    scenario = Scenario(model="llama-2-7b", fleet=a_fleet, workload=work, seed=seed, sample_s=0, leap=leap)
    return Run(scenario, Builder(scenario, SPEC))


def check(run: Run) -> None:
    """Every block that is lent has one request that it is lent to, and nobody gave more than there is."""
    pooled = run.pooled
    assert pooled is not None
    lent: Counter[int] = Counter()
    for owner, instance in run.cluster.instances.items():
        assert isinstance(instance, PooledInstance)
        instance.sync(run.kernel.now_ns)
        instance.scheduler.check_integrity()
        assert 0 <= instance.scheduler.kv.free_blocks <= BLOCKS
        for request_id, spans in pooled.spans(owner).items():
            for span in spans:
                assert span.holder != owner
                lent[span.holder] += span.blocks
            elsewhere = sum(span.blocks for span in spans)
            # A holder that failed is known at once, but the owner gives up the request after its step.
            assert instance.memory.memory.away_blocks(request_id) >= elsewhere
    for move in pooled._moves.values():
        lent[move.command.target] += move.command.blocks
    for holder, instance in run.cluster.instances.items():
        assert isinstance(instance, PooledInstance)
        assert instance.memory.memory.lent == lent[holder]
        assert instance.memory.memory.lent <= int(0.8 * BLOCKS)
    assert pooled.counters.lent_blocks == sum(lent.values())


def finish(run: Run, every: int = 50) -> SimResult:
    while run.advance(every):
        check(run)
    check(run)
    for instance in run.cluster.instances.values():
        assert isinstance(instance, PooledInstance)
        assert instance.scheduler.kv.used_blocks == 0
        assert not instance.coupled
        assert not instance.memory.memory.placed
    assert run.pooled is not None
    assert run.pooled.counters.lent_blocks == 0
    return run.result()


ROGUE = PolicySpec(name=f"{__name__}:Rogue")
POOLED = PolicySpec(name="pooled-kv")


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([300, 900]), st.sampled_from(["splitfuse", "prefill-first", "splitwise"]),
    st.sampled_from([0.0, 1.0]), st.lists(st.floats(0.1, 4.0), max_size=3), st.booleans(),
)  # fmt: skip
def test_no_block_is_lost_or_promised_twice_whatever_is_ordered(
    seed: int, longest: int, policy: str, heartbeat_s: float, failures_s: list[float], cached: bool
) -> None:
    faults = FaultSpec(at_s=tuple(failures_s), repair_s=1.0)
    pool = {"policy": policy, "prefix_cache": cached}
    run = start(fleet(ROGUE, heartbeat_s=heartbeat_s, faults=faults, pool=pool), load(longest), seed)
    result = finish(run)
    assert result.figures.finished == 60


def test_the_rogue_does_move_and_is_refused() -> None:
    pooled = finish(start(fleet(ROGUE), load(900), 3)).pooled
    assert pooled is not None
    assert min(pooled.moved, pooled.placed, pooled.refused, pooled.steps.steps) > 0


@pytest.mark.parametrize("heartbeat_s", [0.0, 0.2, 2.0])
def test_an_old_view_never_commits_too_much(heartbeat_s: float) -> None:
    run = start(fleet(POOLED, heartbeat_s=heartbeat_s), load(1500, rate=10.0, output=100))
    result = finish(run)
    assert result.figures.finished == 60
    assert result.pooled is not None
    assert result.pooled.placed + result.pooled.moved > 0


def test_failures_of_owners_and_holders_leave_nothing_behind() -> None:
    run = start(fleet(POOLED, faults=FaultSpec(at_s=(1.0, 2.5, 4.0, 6.0, 8.0), repair_s=1.0)), load(2500, 40, 5.0))
    result = finish(run, 20)
    assert result.figures.finished == 40
    assert result.pooled is not None
    assert result.pooled.recomputed > 0


def test_a_prompt_longer_than_an_instance_runs_where_others_can_lend() -> None:
    work = WorkloadSpec(
        input=FixedLength(tokens=3000), output=FixedLength(tokens=40), arrivals=PoissonArrivals(rate_per_s=1.0),
        requests=3,
    )  # fmt: skip
    alone, pooled = start(fleet(None), work), start(fleet(POOLED), work)
    while alone.advance():
        pass
    assert alone.result().figures.rejected == 3
    result = finish(pooled)
    assert result.figures.finished == 3
    assert 2 * BLOCKS * 16 < 3000
    assert pooled.builder.max_context == (BLOCKS + 3 * int(0.8 * BLOCKS) - 2) * 16


def test_longer_than_all_of_them_is_refused_with_a_note() -> None:
    work = WorkloadSpec(
        input=FixedLength(tokens=5000), output=FixedLength(tokens=40), arrivals=PoissonArrivals(rate_per_s=1.0),
        requests=1,
    )  # fmt: skip
    result = finish(start(fleet(POOLED), work))
    assert result.figures.rejected == 1
    assert "fill the context" in result.notes[0]


def test_without_anything_moved_decisions_are_those_of_plain_instances() -> None:
    """The control: pooling that finds nothing to do leaves the digest as it is, token times included."""
    work = load(200, 80, 20.0, 60)
    plain = start(fleet(None), work)
    while plain.advance():
        pass
    pooled = finish(start(fleet(POOLED, count=4), work))
    assert pooled.pooled is not None
    assert not pooled.pooled.moved + pooled.pooled.placed
    # What policies were asked is not in the digest, only what they decided and what came of it: but the told length of
    # answers is longer, so compare what came of it.
    first, second = plain.result().figures, pooled.figures
    assert first.latencies == second.latencies


def test_leaping_and_stepping_agree() -> None:
    first, second = (finish(start(fleet(POOLED), load(1500, rate=10.0), leap=leap)) for leap in (True, False))
    assert first.digest == second.digest
    assert first.end_ns == second.end_ns


class Once(Rogue):
    """Moves eight blocks of the first request that has them, once."""

    name = "once"

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """One command."""
        found = [] if self._drawn else [one for one in view.by_id(0).requests() if one.decoding and one.blocks > 20]
        if found:
            self._drawn = 1
            yield MoveKv(found[0].id, 0, 1, 8)


def test_a_coupled_step_takes_what_the_formula_says() -> None:
    """One request, 8 of its blocks elsewhere: its steps by hand; and what is sent does not depend on its context."""
    work = WorkloadSpec(
        input=FixedLength(tokens=600), output=FixedLength(tokens=100), arrivals=PoissonArrivals(rate_per_s=1.0),
        requests=1,
    )  # fmt: skip
    link = LinkSpec(bytes_per_s=1e9, latency_s=1e-3)
    run = start(fleet(PolicySpec(name=f"{__name__}:Once"), count=2, link=link), work)
    taken: list[tuple[int, int]] = []
    owner = run.cluster.instances[0]
    assert isinstance(owner, PooledInstance)
    stretch = owner.stretch
    assert stretch is not None

    def spy(instance: PooledInstance, plan: Any, alone_ps: int) -> int:
        longer = stretch(instance, plan, alone_ps)
        if plan.decodes and run.pooled is not None and run.pooled.spans(0):
            taken.append((plan.decode_context_sum, alone_ps + longer))
        return longer

    owner.stretch = spy
    result = finish(run)
    timer, layers, heads = owner.timer, SPEC.num_layers, SPEC.num_heads
    sent, back = layers * heads * SPEC.head_dim * 2, layers * heads * (SPEC.head_dim * 2 + 8)
    wire_ps = layers * 2 * 10**9 + round((sent + back) / 1e9 * 1e12)
    away = 8 * 16
    there_ps = timer.step_ps((), 1, away, away) - timer.step_ps((), 1, 0, 0)
    assert len(taken) > 20
    for context, duration in taken:
        here_ps = timer.step_ps((), 1, context - away, context - away)
        attention_ps = here_ps - timer.step_ps((), 1, 0, 0)
        assert duration == here_ps + max(0, wire_ps + there_ps - attention_ps)
    assert result.pooled is not None
    steps = result.pooled.steps
    assert steps.spread_tokens == len(taken)
    assert steps.spread_bytes == len(taken) * (sent + back)
    assert steps.foreign_ps == len(taken) * there_ps
    assert result.pooled.moved_bytes == away * 2 * layers * heads * SPEC.head_dim * 2


def test_a_holder_is_slowed_by_exactly_the_attention_it_does_for_others() -> None:
    """Two instances decode one request each; steps of the holder are longer by what the owner asked of it."""
    work = WorkloadSpec(
        input=FixedLength(tokens=600), output=FixedLength(tokens=200), arrivals=PoissonArrivals(rate_per_s=1e6),
        requests=2,
    )  # fmt: skip
    link = LinkSpec(bytes_per_s=1e15, latency_s=0.0)
    run = start(fleet(PolicySpec(name=f"{__name__}:Once"), count=2, link=link), work)
    holder = run.cluster.instances[1]
    assert isinstance(holder, PooledInstance)
    stretch = holder.stretch
    assert stretch is not None
    paid: list[int] = []

    def spy(instance: PooledInstance, plan: Any, alone_ps: int) -> int:
        paid.append(stretch(instance, plan, alone_ps))
        return paid[-1]

    holder.stretch = spy
    result = finish(run)
    assert result.pooled is not None
    each = holder.timer.step_ps((), 1, 128, 128) - holder.timer.step_ps((), 1, 0, 0)
    assert {value % each for value in paid} == {0}
    assert sum(paid) > 0
    assert 0 <= result.pooled.steps.foreign_ps - sum(paid) <= 3 * each


def test_prompts_elsewhere_are_timed_without_what_is_not_here() -> None:
    """A timer of prompts is asked for the context that is here; the control is the sum of both parts."""
    run = start(fleet(POOLED), load(100, 1))
    timer = run.cluster.instances[0].timer
    both = timer.step_ps([Prompt(64, 512, False)], 0, 0, 0)
    bare = timer.step_ps([Prompt(64, 0, False)], 0, 0, 0)
    assert both >= bare


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prefill=1xa100-80gb,decode=1xa100-80gb", "must be mixed"),
        ("2xa100-80gb:pp2", "pipelines"),
        ("2xa100-80gb:preempt=swap:host_blocks=10", "swap"),
        ("1xa100-80gb", "another one"),
        ("2xa100-80gb:watermark=0.2", "watermark"),
        ("mixed:a=1xa100-80gb,mixed:b=1xa100-80gb:block_tokens=32:prefix_cache=false", "one size"),
    ],
)
def test_what_does_not_go_together_is_said(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start(apply("infinite", parse_fleet(text)), load(100, 1))


def test_other_policies_that_do_not_go_together() -> None:
    scaling = msgspec.structs.replace(fleet(POOLED), controllers=(POOLED, PolicySpec(name="freeness-scaling")))
    with pytest.raises(ConfigError, match="stopped by freeness-scaling"):
        start(scaling, load(100, 1))
    with pytest.raises(ConfigError, match="Two policies"):
        start(msgspec.structs.replace(fleet(POOLED), controllers=(POOLED, POOLED)), load(100, 1))
    windowed = catalog.model("gemma-3-4b")
    scenario = Scenario(model="gemma-3-4b", fleet=apply("infinite", parse_fleet("2xa100-80gb")), workload=load(9, 1))
    with pytest.raises(ConfigError, match="sliding windows"):
        Run(scenario, Builder(scenario, windowed))


def test_migration_goes_together_with_it() -> None:
    """Llumnix moves whole requests, but none whose KV is spread."""
    both = msgspec.structs.replace(
        fleet(POOLED), controllers=(POOLED, PolicySpec(name="rebalance", options={"threshold": 10.0}))
    )
    result = finish(start(both, load(1500, 60, 10.0)))
    assert result.figures.finished == 60
    assert result.migrations.done > 0
    assert result.pooled is not None
    assert result.pooled.placed + result.pooled.moved > 0


def test_facts_are_taken_anew_in_a_closed_loop_too() -> None:
    """The first clients come after the first heartbeat, which must not be the last."""
    work = msgspec.structs.replace(load(400, 20), arrivals=ClosedLoop(clients=4))
    run = start(fleet(POOLED, heartbeat_s=0.1), work)
    while run.advance(50) and run.kernel.now_ns < 10**9:
        pass
    assert 0 <= run.kernel.now_ns - run.cluster.view.as_of_ns <= 10**8
