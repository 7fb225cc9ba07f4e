"""Step times from a decision log: where a step begins, what is in it, what is left out."""

from __future__ import annotations

from pathlib import Path

from megalith.base.clock import ManualClock
from megalith.cost.calibrate_steps import TimedStep
from megalith.engine.record import RecordingScheduler
from megalith.policy.batching import by_name
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits
from megalith.sim.recorded import recorded_steps


def test_steps_last_from_end_to_end_and_idle_time_is_nobodys(tmp_path: Path) -> None:
    clock, path = ManualClock(1_000), tmp_path / "log.jsonl"
    live = RecordingScheduler(by_name("splitfuse", 8), KvAccount(32, 4), Limits(max_sequences=4), clock, path)
    live.add(Request(1, 900, 10, 3))
    clock.advance(10)
    first = live.plan()  # 8 of 10 prompt tokens, no logits
    clock.advance(100)
    live.complete(first)
    second = live.plan()
    clock.advance(70)
    live.add(Request(2, 0, 1, 2))  # comes during a step: that does not move its end
    live.complete(second)
    third = live.plan()  # a decode and a prompt of one token
    clock.advance(40)
    live.complete(third)
    for finished in ([1, 2],):
        again = live.plan() if not live.again(third) else third
        clock.advance(30)
        live.complete(again, finished)
    clock.advance(1_000_000)  # idle
    live.add(Request(3, 0, 1, 3))
    plan = live.plan()
    clock.advance(20)
    live.complete(plan)
    plan = live.plan()
    clock.advance(15)
    live.complete(plan)
    assert live.again(plan) or plan.repeats == 0
    live.abort(3)
    live.close()
    steps = recorded_steps(path)
    assert steps[:3] == [
        TimedStep(((8, 0),), 0, 110), TimedStep(((2, 8),), 1, 70), TimedStep(((1, 10), (1, 0)), 2, 40),
    ]  # fmt: skip
    assert [step.duration_ns for step in steps[3:]] == [30, 20, 15]
    assert steps[-1].requests == ((1, 1),)


def test_the_repeats_of_a_plan_have_longer_contexts(tmp_path: Path) -> None:
    clock, path = ManualClock(0), tmp_path / "log.jsonl"
    live = RecordingScheduler(by_name("splitfuse", 8), KvAccount(32, 4), Limits(max_sequences=4), clock, path)
    live.add(Request(1, 0, 4, 6))
    plan = live.plan()
    live.complete(plan)
    plan = live.plan()
    assert plan.repeats == 4
    for run in range(5):
        assert run == 0 or live.again(plan)
        clock.advance(10 + run)
        live.complete(plan, [1] if run == 4 else [])
    live.close()
    assert [(step.requests[0][1], step.duration_ns) for step in recorded_steps(path)[1:]] == [
        (4 + run, 10 + run) for run in range(5)
    ]
