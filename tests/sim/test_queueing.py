"""The simulator against queueing theory: Lindley's recursion request by request, and the M/D/1 formula on average."""

from __future__ import annotations

import itertools

import pytest

from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.policy import registry
from megalith.policy.batching import by_name
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.cluster import Cluster
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.sim.record import Recorder
from megalith.specs.fleet import PolicySpec, PoolSpec
from megalith.specs.workload import open_workload
from megalith.specs.workload_text import parse_workload

PROMPT, DECODE = PromptTerms(3_000_000_000, 20_000_000), DecodeTerms(2_000_000_000, 0, 1_000)
TIMER = LinearTimer(PROMPT, DECODE)


def serve(lives: list[Live], instances: int, one_at_a_time: bool) -> list[Live]:
    """Round-robin over instances that hold one request at a time, or batch prompts as they come."""

    def make(instance_id: int, pool: PoolSpec, cluster: Cluster) -> Instance:
        limits = Limits(max_sequences=1 if one_at_a_time else 512, max_waiting=1_000_000)
        scheduler = Scheduler(by_name("prefill-first", 1), KvAccount(100_000, 16, prefix_cache=False), limits)
        return Instance(instance_id, cluster.kernel, scheduler, TIMER, cluster)

    kernel = Kernel()
    cluster = Cluster(kernel, registry.router(PolicySpec(name="round-robin"), 0), [], Recorder(), make)
    for _ in range(instances):
        cluster.add_instance(PoolSpec(name="pool", device="toy", count=instances))
    cluster.feed(iter(lives))
    kernel.run()
    assert all(live.outcome == "finished" for live in lives)
    return lives


def drawn(text: str) -> list[Live]:
    return [
        Live(Request(s.index, s.at_ns or 0, s.input_tokens, s.output_tokens), s.output_tokens)
        for s in open_workload(parse_workload(text), 3)
    ]


def alone_ps(live: Live) -> int:
    """What the request takes by itself: its prompt, then one step for each further token."""
    prompt, more = live.request.prompt_tokens, live.output_tokens - 1
    contexts = more * prompt + more * (more - 1) // 2
    return PROMPT.fixed_ps + PROMPT.token_ps * prompt + more * DECODE.fixed_ps + DECODE.context_ps * contexts


@pytest.mark.parametrize("instances", [1, 3])
def test_one_at_a_time_is_lindleys_recursion_to_the_nanosecond(instances: int) -> None:
    lives = serve(
        drawn("gamma:rate=6,cv=2,input=lognormal:300:1.0,output=lognormal:40:1.0,requests=600"), instances, True
    )
    free_ps = [0] * instances
    for live, server in zip(lives, itertools.cycle(range(instances))):
        free_ps[server] = max(free_ps[server], live.request.arrival_ns * 1000) + alone_ps(live)
        assert live.finish_ns == -(-free_ps[server] // 1000)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_prompts_alone_are_an_m_d_1_queue(load: float) -> None:
    """TTFT = D + R D**2 / (2 (1 - R D)) for constant prompts: DistServe (OSDI 2024), section 3.1."""
    service_s = (PROMPT.fixed_ps + PROMPT.token_ps * 400) / 1e12
    rate = load / service_s
    lives = serve(drawn(f"poisson:rate={rate},input=400,output=1,requests=20000"), 1, False)
    mean_s = sum(live.first_ns - live.request.arrival_ns for live in lives) / len(lives) / 1e9
    expected_s = service_s + rate * service_s**2 / (2 * (1 - load))
    assert mean_s == pytest.approx(expected_s, rel=0.04)
