"""An instance that is a pipeline: stages take turns, and one stage is an instance without pipeline."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.cost.timer import Prompt, StepTimer
from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.policy import registry
from megalith.policy.batching import by_name
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.pipelined import PipelinedScheduler
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.cluster import Cluster
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.sim.pipelined import PipelinedInstance
from megalith.sim.run import simulate
from megalith.specs.fleet import FleetSpec, PolicySpec, PoolSpec
from tests.sim.test_run import FLEETS, scenario

US = 1_000_000
"""Picoseconds."""
TIMER = LinearTimer(PromptTerms(5_000_123, 30_011, 7), DecodeTerms(4_000_037, 1_003, 209))


class TwoStages(LinearTimer):
    """10 us and 6 us for a step of decodes, 20 us and 16 us for one with prompts."""

    def __init__(self) -> None:
        super().__init__(PromptTerms(1, 1), DecodeTerms(1, 1, 1))

    def stages_ps(self, prompts: list[Prompt], decodes: int, context_sum: int, context_max: int) -> tuple[int, ...]:
        return (20 * US, 16 * US) if prompts else (10 * US, 6 * US)


class Ledger:
    """What comes out of a run."""

    def __init__(self) -> None:
        self.ended: list[Live] = []
        self.gaps: list[tuple[int, int]] = []
        self.prompts: list[int] = []

    def finished(self, live: Live) -> None:
        self.ended.append(live)

    def steps(self, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        self.gaps += [(first_ps + step * slope_ps, decodes) for step in range(steps)]

    def prompt_step(self, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        self.prompts.append(prompt_tokens)

    def late_step(self, duration_ps: int, prompt_tokens: int, decodes: int, waits: list[tuple[int, int]]) -> None:
        """Only instances without pipeline tell of these."""


def run(
    timer: StepTimer, stages: int | None, jobs: list[tuple[int, int, int]], blocks: int = 200, policy: str = "splitfuse"
) -> Ledger:
    """(arrival in ns, prompt, answer) each; `stages` None: an instance without pipeline."""
    kernel, ledger = Kernel(), Ledger()

    def make(instance_id: int, _pool: PoolSpec, cluster: Cluster) -> Instance:
        kv, limits, batching = KvAccount(blocks, 4), Limits(max_sequences=8), by_name(policy, 16)
        if stages is None:
            return Instance(instance_id, kernel, Scheduler(batching, kv, limits), timer, cluster, leap=False)
        return PipelinedInstance(instance_id, kernel, PipelinedScheduler(batching, kv, limits, stages), timer, cluster)

    cluster = Cluster(kernel, registry.router(PolicySpec(name="round-robin"), 0), [], ledger, make)
    cluster.add_instance(PoolSpec(name="pool", device="toy", count=1))
    cluster.feed(
        Live(Request(number, at_ns, prompt, answer), answer) for number, (at_ns, prompt, answer) in enumerate(jobs)
    )
    kernel.run()
    (instance,) = cluster.instances.values()
    instance.scheduler.check_integrity()
    assert instance.scheduler.kv.used_blocks == 0
    busy = instance.busy_ps(kernel.now_ns)
    assert sum(busy) <= kernel.now_ns * 1000
    ledger.ended.sort(key=lambda live: live.request.id)
    return ledger


def test_a_lone_request_passes_through_all_stages() -> None:
    (live,) = run(TwoStages(), 2, [(1000, 8, 3)]).ended
    assert live.scheduled_ns == 1000
    assert live.first_ns == 1000 + 36_000
    assert live.finish_ns == 1000 + 36_000 + 2 * 16_000


def test_a_second_step_follows_one_stage_behind() -> None:
    ledger = run(TwoStages(), 2, [(0, 8, 3), (5_000, 8, 3)])
    one, two = ledger.ended
    # Two enters stage one when one has left it at 20, and stage two at 40.
    assert (one.first_ns, two.first_ns) == (36_000, 56_000)
    # Decodes of one: 40 to 50 and 56 to 62, then 66 to 82. Of two: 56 to 66 and 66 to 72, then 76 to 92.
    assert (one.finish_ns, two.finish_ns) == (82_000, 92_000)


def test_gaps_between_tokens_are_those_of_requests_not_of_steps() -> None:
    ledger = run(TwoStages(), 2, [(0, 8, 4), (5_000, 8, 4)])
    for live in ledger.ended:
        assert live.generated == 4
    total = sum(gap * decodes for gap, decodes in ledger.gaps)
    assert total == sum(live.finish_ns - live.first_ns for live in ledger.ended) * 1000
    assert sum(decodes for _, decodes in ledger.gaps) == 6


@pytest.mark.parametrize("name", sorted(FLEETS))
def test_every_kind_of_fleet_runs_as_pipelines(name: str) -> None:
    fleet = FLEETS[name]
    pools = tuple(msgspec.structs.replace(pool, pipeline_parallel=2) for pool in fleet.pools)
    setting = scenario(msgspec.structs.replace(fleet, pools=pools))
    one, two = simulate(setting), simulate(setting)
    assert one.requests == 120
    assert one.digest == two.digest


def test_a_pipeline_of_vidurs_stages_by_name() -> None:
    pool = PoolSpec(name="all", device="a100", count=2, tensor_parallel=2, pipeline_parallel=2)
    setting = scenario(FleetSpec(pools=(pool,)), model="llama-2-70b", timer="vidur")
    result = simulate(setting)
    assert result.requests == 120
    assert "Vidur" in result.timing["all"]


jobs = st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=20)


def figures(ledger: Ledger) -> list[Any]:
    return [
        (live.scheduled_ns, live.first_ns, live.finish_ns, live.generated, live.preemptions) for live in ledger.ended
    ]


@settings(max_examples=60, deadline=None)
@given(jobs, st.integers(9, 40), st.sampled_from(["splitfuse", "prefill-first", "first-come"]))
def test_one_stage_is_an_instance_without_pipeline(work: list[tuple[int, int, int]], blocks: int, policy: str) -> None:
    work.sort()
    piped, plain = run(TIMER, 1, work, blocks, policy), run(TIMER, None, work, blocks, policy)
    assert figures(piped) == figures(plain)
    if not any(live.preemptions for live in plain.ended):
        assert sum(piped.prompts) == sum(plain.prompts)


@settings(max_examples=60, deadline=None)
@given(jobs, st.integers(9, 40), st.integers(2, 4))
def test_everybody_gets_all_tokens(work: list[tuple[int, int, int]], blocks: int, stages: int) -> None:
    work.sort()
    ledger = run(TIMER, stages, work, blocks)
    assert [live.generated for live in ledger.ended] == [answer for _, _, answer in work]
    if not any(live.preemptions for live in ledger.ended):
        assert sum(ledger.prompts) == sum(prompt for _, prompt, _ in work)
        assert sum(decodes for _, decodes in ledger.gaps) == sum(answer - 1 for _, _, answer in work)
        gaps_ps = sum(gap * decodes for gap, decodes in ledger.gaps)
        assert abs(gaps_ps - sum(live.finish_ns - live.first_ns for live in ledger.ended) * 1000) < 1000 * len(work)
