"""The live engine and the simulator's instance on one virtual clock: every token at the same nanosecond.

The engine runs real tokens through a runner that moves the clock by what the step timer says; the simulator has the
timer alone. So all that can differ between them on a real machine is how long a step takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megalith.base.clock import ManualClock
from megalith.base.random import splitmix64, uniform
from megalith.cost.timer import PS_PER_NS
from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.engine.batch import SamplingBatch, StepBatch, StepResult
from megalith.engine.engine import Engine
from megalith.engine.params import SamplingParams
from megalith.engine.sequence import Admitted
from megalith.policy.batching import POLICY_NAMES, by_name
from megalith.policy.facts import PreemptMode, Request
from megalith.policy.hashing import block_hashes
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.instance import Instance
from megalith.sim.kernel import Kernel
from megalith.sim.live import Live
from tests.engine.ledger import LedgerRunner, Letters

BLOCK_TOKENS, SALT, COUNT = 4, 9, 60
TIMER = LinearTimer(
    PromptTerms(900_000 * PS_PER_NS, 12_000 * PS_PER_NS, 30 * PS_PER_NS),
    DecodeTerms(800_000 * PS_PER_NS, 50_000 * PS_PER_NS, 700 * PS_PER_NS),
)


class TimedRunner(LedgerRunner):
    """Moves the clock by the timer's duration of each step."""

    clock: ManualClock

    def step(self, batch: StepBatch, sampling: SamplingBatch) -> StepResult:
        result = super().step(batch, sampling)
        starts = batch.row_starts_S1
        prompts, decodes, context_sum, context_max = [], 0, 0, 0
        for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            context = int(batch.positions_M[first])
            if end - first > 1:
                prompts.append((end - first, context, end - 1 in batch.output_rows_N))
            else:
                decodes, context_sum, context_max = decodes + 1, context_sum + context, max(context_max, context)
        duration_ps = TIMER.step_ps(prompts, decodes, context_sum, context_max)  # type: ignore[arg-type]
        assert duration_ps % PS_PER_NS == 0
        self.clock.advance(duration_ps // PS_PER_NS)
        return result


def trace(shared: bool) -> list[tuple[int, list[int], int, int]]:
    """(arrival, prompt, answer length, priority), in bursts and with idle times; prompts may share a beginning."""
    rows = []
    at_ns = 0
    for i in range(COUNT):
        burst = i // 12
        at_ns += round(uniform(1, i) * (60e6 if i % 12 == 0 else 3e6)) + (i % 12 == 0) * burst * 10_000_000
        prefix = [3 + splitmix64(2, t) % 90 for t in range(40)] if shared and i % 3 else []
        prompt = prefix + [3 + splitmix64(100 + i, t) % 90 for t in range(1 + int(50 * uniform(3, i)))]
        rows.append((at_ns, prompt, 1 + int(30 * uniform(4, i)), int(uniform(5, i) < 0.2)))
    return rows


def options(blocks: int, preempt: PreemptMode, shared: bool) -> tuple[KvAccount, Limits]:
    kv = KvAccount(blocks, BLOCK_TOKENS, blocks if preempt == "swap" else 0, shared, watermark_blocks=1)
    return kv, Limits(max_sequences=12, preempt=preempt)


def live_times(policy: str, kv: KvAccount, limits: Limits, shared: bool) -> tuple[dict[int, tuple[int, int]], Any]:
    clock = ManualClock()
    runner = TimedRunner(97, BLOCK_TOKENS, kv.num_blocks, kv.num_host_blocks)
    runner.clock = clock
    engine = Engine(runner, Scheduler(by_name(policy, 24), kv, limits), clock, SALT)
    waiting = list(enumerate(trace(shared)))
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    while waiting or engine.has_work:
        if not engine.has_work:
            clock.advance(max(0, waiting[0][1][0] - clock.now_ns()))
        while waiting and waiting[0][1][0] <= clock.now_ns():
            number, (at_ns, prompt, new, priority) = waiting.pop(0)
            params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
            ids = np.array(prompt, np.int32)
            engine.add(Admitted(number, ids, params, new, 0, frozenset({2}), Letters(), None, priority, at_ns))
        for number, delta in engine.step():
            first.setdefault(number, clock.now_ns())
            if delta.finish_reason is not None:
                last[number] = clock.now_ns()
    return {number: (first[number], last[number]) for number in sorted(last)}, engine.scheduler.counters


class Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def simulated_times(
    policy: str, kv: KvAccount, limits: Limits, shared: bool, leap: bool
) -> tuple[dict[int, tuple[int, int]], Any]:
    kernel = Kernel()
    instance = Instance(0, kernel, Scheduler(by_name(policy, 24), kv, limits), TIMER, Silent(), leap)
    lives = []
    for number, (at_ns, prompt, new, priority) in enumerate(trace(shared)):
        hashes = block_hashes(prompt, BLOCK_TOKENS, SALT) if shared else ()
        lives.append(Live(Request(number, at_ns, len(prompt), new, priority, hashes), new))
        kernel.at(at_ns, instance.submit, lives[-1])
    kernel.run()
    return {live.request.id: (live.first_ns, live.finish_ns) for live in lives}, instance.scheduler.counters


@pytest.mark.parametrize("leap", [True, False])
@pytest.mark.parametrize(
    ("blocks", "preempt", "shared"), [(400, "recompute", True), (48, "recompute", False), (48, "swap", False)]
)
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_engine_and_simulator_agree_to_the_nanosecond(
    policy: str, blocks: int, preempt: PreemptMode, shared: bool, leap: bool
) -> None:
    real, counted = live_times(policy, *options(blocks, preempt, shared), shared)
    simulated, expected = simulated_times(policy, *options(blocks, preempt, shared), shared, leap)
    assert len(real) == COUNT
    assert simulated == real
    assert counted == expected
    if shared:
        assert counted.prefix_hit_tokens > 0
    elif policy != "first-come":
        assert counted.preemptions > 0
