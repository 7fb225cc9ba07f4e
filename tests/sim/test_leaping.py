"""Leaping over decode steps changes nothing: the same token times to the nanosecond, the same decisions and counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.policy import registry
from megalith.policy.batching import POLICY_NAMES, by_name
from megalith.policy.cluster import Event, View
from megalith.policy.facts import PreemptMode, Request
from megalith.policy.hashing import block_hashes
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.cluster import Cluster
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from megalith.specs.fleet import PolicySpec, PoolSpec

BLOCK_TOKENS = 4


@dataclass
class Setting:
    instances: int
    policy: str
    budget: int
    blocks: int
    sequences: int
    preempt: PreemptMode
    router: str
    tick_ns: int | None
    swap_block_ps: int = 0


@dataclass
class Ledger:
    """Everything that comes out of a run."""

    ended: list[tuple[Any, ...]] = field(default_factory=list)
    decode_tokens: int = 0
    decode_ps: int = 0
    prompts: list[tuple[int, int, int]] = field(default_factory=list)
    waits: list[tuple[int, int]] = field(default_factory=list)

    def finished(self, live: Live) -> None:
        self.ended.append(
            (live.request.id, live.outcome, live.scheduled_ns, live.first_ns, live.finish_ns, live.generated,
             live.preemptions, live.cached_tokens, live.instance)
        )  # fmt: skip

    def steps(self, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        self.decode_tokens += steps * decodes
        self.decode_ps += steps * first_ps + slope_ps * (steps * (steps - 1) // 2)

    def prompt_step(self, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        self.prompts.append((duration_ps, prompt_tokens, decodes))

    def late_step(self, duration_ps: int, prompt_tokens: int, decodes: int, waits: list[tuple[int, int]]) -> None:
        assert 0 < sum(count for _, count in waits) <= decodes
        self.waits.extend(waits)
        if prompt_tokens:
            self.prompt_step(duration_ps, prompt_tokens, decodes)
        else:
            self.steps(duration_ps, 0, 1, decodes)


class Watcher:
    """A controller that reads every fact at every tick: reading in the middle of a leap must change nothing."""

    name = "watcher"
    listens = frozenset({"tick", "preempt", "finish"})

    def __init__(self, period_ns: int) -> None:
        self.period_ns = period_ns
        self.seen: list[Any] = []

    def act(self, event: Event, view: View) -> list[Any]:
        for facts in view.instances:
            self.seen.append(
                (event.at_ns, event.kind, facts.id, facts.outstanding, facts.pending_tokens, facts.promised_tokens,
                 facts.running(), facts.waiting(), facts.waiting_blocks(), facts.free_blocks(), facts.preempted(),
                 tuple(facts.requests()))
            )  # fmt: skip
        return []


def run(setting: Setting, work: list[tuple[Request, int]], leap: bool) -> tuple[Any, ...]:
    timer = LinearTimer(PromptTerms(5_000_123, 30_011, 7), DecodeTerms(4_000_037, 1_003, 209))

    def make(instance_id: int, pool: PoolSpec, cluster: Cluster) -> Instance:
        kv = KvAccount(setting.blocks, BLOCK_TOKENS, 10 if setting.preempt == "swap" else 0)
        limits = Limits(max_sequences=setting.sequences, preempt=setting.preempt)
        scheduler = Scheduler(by_name(setting.policy, setting.budget), kv, limits)
        instance = Instance(instance_id, cluster.kernel, scheduler, timer, cluster, leap)
        instance.swap_block_ps = setting.swap_block_ps
        return instance

    kernel, ledger = Kernel(), Ledger()
    watcher = Watcher(setting.tick_ns or 1)
    controllers = [watcher] if setting.tick_ns else []
    cluster = Cluster(kernel, registry.router(PolicySpec(name=setting.router), 3), controllers, ledger, make)
    for _ in range(setting.instances):
        cluster.add_instance(PoolSpec(name="pool", device="toy", count=setting.instances))
    cluster.feed(Live(request, output) for request, output in work)
    cluster.control.start()
    kernel.run()
    for instance in cluster.instances.values():
        instance.scheduler.check_integrity()
        assert instance.scheduler.kv.free_blocks == setting.blocks
    counters = [instance.scheduler.counters for instance in cluster.instances.values()]
    steps = [(instance.steps, instance.busy_decode_ps) for instance in cluster.instances.values()]
    return (sorted(ledger.ended), ledger.decode_tokens, ledger.decode_ps, ledger.prompts,
            sorted(ledger.waits), counters, steps,
            watcher.seen, kernel.digest()), kernel.events  # fmt: skip


@st.composite
def settings_(draw: st.DrawFn) -> Setting:
    return Setting(
        instances=draw(st.integers(1, 3)),
        policy=draw(st.sampled_from(POLICY_NAMES)),
        budget=draw(st.integers(1, 30)),
        blocks=draw(st.integers(17, 45)),
        sequences=draw(st.integers(1, 6)),
        preempt=draw(st.sampled_from(["recompute", "swap"])),
        router=draw(st.sampled_from(["least-outstanding", "round-robin", "least-kv", "least-tokens"])),
        tick_ns=draw(st.sampled_from([None, 7_001, 50_000])),
        swap_block_ps=draw(st.sampled_from([0, 777_013])),
    )


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[Request, int]]:
    work, at_ns = [], 0
    for request_id in range(draw(st.integers(1, 12))):
        at_ns += draw(st.integers(0, 60_000))
        prompt = [0] * draw(st.integers(0, 14)) + [request_id + 1] * draw(st.integers(1, 12))
        most = draw(st.integers(1, 40))
        request = Request(
            request_id,
            at_ns,
            len(prompt),
            most,
            draw(st.sampled_from([0, 0, 0, 1])),
            block_hashes(prompt, BLOCK_TOKENS),
        )
        work.append((request, draw(st.integers(1, most))))
    return work


@settings(max_examples=200, deadline=None)
@given(settings_(), workloads())
def test_leaping_equals_stepping(setting: Setting, work: list[tuple[Request, int]]) -> None:
    leapt, _ = run(setting, work, leap=True)
    stepped, _ = run(setting, work, leap=False)
    assert leapt == stepped
    assert len(leapt[0]) == len(work)


def test_a_leap_saves_the_events_of_its_steps() -> None:
    setting = Setting(1, "splitfuse", 30, 400, 4, "recompute", "round-robin", None)
    work = [(Request(0, 0, 10, 1000), 1000)]
    (leapt, few), (stepped, many) = run(setting, work, True), run(setting, work, False)
    assert leapt == stepped
    assert few < 10 < 900 < many


def test_a_step_waits_for_the_blocks_that_are_swapped_before_it() -> None:
    """All come at once, so that time decides nothing: each copied block adds its time to the end, and no more."""
    work = [(Request(number, 0, 12, 30), 30) for number in range(4)]
    ends = []
    for swap_block_ps in (0, 1_000_000, 2_000_000):
        setting = Setting(1, "splitfuse", 64, 20, 4, "swap", "round-robin", None, swap_block_ps)
        (ended, *_), _ = run(setting, work, leap=True)
        assert sum(row[6] for row in ended) > 0, "nobody stepped aside"
        ends.append(max(row[4] for row in ended))
    copied, rest = divmod(ends[1] - ends[0], 1_000)
    assert (copied > 0, rest) == (True, 0)
    assert ends[2] - ends[0] == 2 * (ends[1] - ends[0])
    recomputed, _ = run(Setting(1, "splitfuse", 64, 20, 4, "recompute", "round-robin", None, 2_000_000), work, True)
    free, _ = run(Setting(1, "splitfuse", 64, 20, 4, "recompute", "round-robin", None), work, True)
    assert recomputed == free, "nothing is copied where KV is computed again"
