"""Any order of calls, any policy, preempt mode and cache: the rules hold, contents are right, nothing leaks."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megalith.base.errors import QueueFull
from megalith.policy.batching import POLICY_NAMES, by_name
from megalith.policy.facts import PreemptMode
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from tests.policy.driver import Executor, reference_output

# Few different tokens and common beginnings, so that prefixes are shared, evicted and shared again.
PROMPTS = st.builds(
    lambda common, own: [0, 1, 2, 3] * common + own,
    st.integers(0, 4),
    st.lists(st.integers(0, 1), min_size=1, max_size=13),
)


class SchedulerMachine(RuleBasedStateMachine):
    """The largest request takes 29 + 14 - 1 = 42 tokens = 11 blocks of 4; an instance has at least that many."""

    @initialize(
        policy=st.sampled_from(POLICY_NAMES),
        budget=st.integers(1, 20),
        blocks=st.integers(11, 26),
        host=st.sampled_from([0, 5, 40]),
        mode=st.sampled_from(["recompute", "swap"]),
        cache=st.booleans(),
        watermark=st.sampled_from([0, 0, 3]),
        sequences=st.integers(1, 6),
        seal=st.booleans(),
    )
    def start(
        self,
        policy: str,
        budget: int,
        blocks: int,
        host: int,
        mode: PreemptMode,
        cache: bool,
        watermark: int,
        sequences: int,
        seal: bool,
    ) -> None:
        self.kv = KvAccount(blocks, 4, host, cache, watermark)
        limits = Limits(max_sequences=sequences, max_waiting=12, preempt=mode)
        self.scheduler = Scheduler(by_name(policy, budget), self.kv, limits)
        self.policy = policy
        self.budget = budget
        self.executor = Executor(self.scheduler, seal)
        self.added: dict[int, tuple[list[int], int]] = {}
        self.owed = 0
        """Tokens that the live requests need at most."""

    @rule(
        prompt=PROMPTS, max_new=st.integers(1, 14), early=st.integers(0, 14), priority=st.sampled_from([0, 0, 0, 1, 2])
    )
    def add(self, prompt: list[int], max_new: int, early: int, priority: int) -> None:
        request_id, wanted = len(self.added), max(1, max_new - early)
        waits = self.scheduler.num_waiting + self.scheduler.num_swapped
        try:
            self.executor.add(request_id, prompt, max_new, wanted, priority, at=request_id)
        except QueueFull:
            assert waits >= 12  # preempted ones are never refused
            return
        assert waits < 12
        self.added[request_id] = (prompt, wanted)
        self.owed += len(prompt) + wanted

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            plan = self.executor.step()
            self.check_budget(plan)

    @rule()
    def repeat_without_asking(self) -> None:
        """As the engine does: the same plan again while it is valid."""
        plan = self.scheduler.plan()
        while plan.chunks:
            gone = self.executor.run(plan) if plan.repeats == 0 else self.run_again(plan)
            if gone or not self.scheduler.again(plan):
                return

    def run_again(self, plan) -> list[int]:  # type: ignore[no-untyped-def]
        """A repeat: contexts have moved on, so only contents and tables are checked."""
        gone = [chunk.request_id for chunk in plan.chunks if self.executor._compute(chunk.request_id, 1)]
        self.scheduler.complete(plan, gone)
        return gone

    @rule(in_flight=st.booleans(), pick=st.integers(0, 30))
    @precondition(lambda self: self.executor.live)
    def abort(self, in_flight: bool, pick: int) -> None:
        request_id = sorted(self.executor.live)[pick % len(self.executor.live)]
        plan = self.scheduler.plan() if in_flight else None
        gone = self.executor.forward(plan) if plan and plan.chunks else []
        if request_id in self.executor.live:
            self.executor.abort(request_id)
        if plan and plan.chunks:
            self.scheduler.complete(plan, gone)

    @rule()
    @precondition(lambda self: self.executor.live)
    def plan_and_fail(self) -> None:
        """The step broke before it computed anything; its copies were made."""
        plan = self.scheduler.plan()
        self.executor.copy(plan)

    @rule()
    def finish_all(self) -> None:
        """No starvation: with no arrivals, everyone is done within a bound on steps."""
        self.executor.drain(limit=20 + 6 * self.owed)
        self.owed = 0
        assert self.kv.free_blocks == self.kv.num_blocks
        assert self.kv.free_host_blocks == self.kv.num_host_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.num_swapped == 0

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "executor"):
            self.scheduler.check_integrity()
            counters = self.scheduler.counters
            assert counters.added - counters.finished - counters.aborted == len(self.executor.live)
            assert counters.prefix_hit_tokens <= counters.prefix_queried_tokens
            assert self.kv.prefix_cache or counters.prefix_hit_tokens == self.kv.evictions == 0

    def check_budget(self, plan) -> None:  # type: ignore[no-untyped-def]
        prompts = [chunk for chunk in plan.chunks if chunk.new_tokens > 1]
        if self.policy == "splitfuse":
            assert plan.num_tokens <= self.budget
        elif prompts:
            assert plan.num_tokens <= self.budget or len(plan.chunks) == 1
            assert all(chunk.samples for chunk in plan.chunks), "these policies never cut a prompt"

    def teardown(self) -> None:
        if hasattr(self, "executor"):
            self.finish_all()
            for request_id, output in self.executor.outputs.items():
                prompt, wanted = self.added[request_id]
                assert output == reference_output(prompt, wanted)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=250, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
