"""Idea 5 of the design: a plan says exactly how long it stays right, and leaping over its repeats changes nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.policy.batching import POLICY_NAMES, by_name
from megalith.policy.facts import Request, StepPlan
from megalith.policy.hashing import block_hashes
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler

BLOCK_TOKENS = 4


@dataclass(frozen=True)
class Job:
    request: Request
    wanted: int
    after_plans: int
    """It arrives before the plan of that number is asked for."""


@st.composite
def jobs(draw: st.DrawFn) -> list[Job]:
    made, when = [], 0
    for request_id in range(draw(st.integers(1, 9))):
        when += draw(st.integers(0, 4))
        prompt = [0] * draw(st.integers(0, 14)) + [request_id + 1] * draw(st.integers(1, 12))
        max_new = draw(st.integers(1, 40))
        wanted = draw(st.integers(1, max_new))
        hashes = block_hashes(prompt, BLOCK_TOKENS)
        request = Request(request_id, when, len(prompt), max_new, draw(st.sampled_from([0, 0, 0, 1])), hashes)
        made.append(Job(request, wanted, when))
    return made


@st.composite
def schedulers(draw: st.DrawFn) -> Scheduler:
    host = draw(st.sampled_from([0, 6, 40]))
    kv = KvAccount(draw(st.integers(17, 40)), BLOCK_TOKENS, host, draw(st.booleans()), draw(st.sampled_from([0, 0, 2])))
    limits = Limits(max_sequences=draw(st.integers(1, 6)), preempt="swap" if host else "recompute")
    return Scheduler(by_name(draw(st.sampled_from(POLICY_NAMES)), draw(st.integers(1, 24))), kv, limits)


def state(scheduler: Scheduler) -> dict[str, Any]:
    """Everything that a later decision can depend on, down to the order of the free list."""
    kv, roster = scheduler.kv, scheduler._roster
    for member in roster.cohort.members:
        roster.cohort.settle(member)
    return {
        "sequences": {
            s.request.id: (
                s.phase,
                s.known,
                s.computed,
                s.cached,
                s.table.held,
                len(s.table.blocks),
                s.table.sealed,
                tuple(s.hashes),
            )
            for s in roster.sequences.values()
        },
        "running": [s.request.id for s in roster.running],
        "clock": roster.cohort.clock,
        "contexts": roster.cohort.context_sum,
        "free_blocks": kv.free_blocks,
        "queue": sorted(s.rank for s in roster.queue),
        "free": list(kv._free),
        "idle": list(kv._idle),
        "hashes": dict(kv._block_of),
        "host": (list(kv._host_free), dict(kv._host_tables)),
        "counters": copy.copy(scheduler.counters),
        "evictions": kv.evictions,
    }


def twin_of(scheduler: Scheduler) -> Scheduler:
    """A fresh one of the same kind."""
    kv = scheduler.kv
    account = KvAccount(kv.num_blocks, kv.block_tokens, kv.num_host_blocks, kv.prefix_cache, kv.watermark_blocks)
    return Scheduler(scheduler.policy, account, scheduler.limits)


def due(scheduler: Scheduler, plan: StepPlan, wanted: dict[int, int]) -> int:
    """Runs until the first sampled request has its true length."""
    left = []
    for chunk in plan.chunks:
        if chunk.samples:
            sequence = scheduler._roster.sequences[chunk.request_id]
            left.append(wanted[chunk.request_id] - (sequence.known - sequence.request.prompt_tokens))
    return min(left, default=1)


def finished(scheduler: Scheduler, plan: StepPlan, wanted: dict[int, int], runs: int) -> list[int]:
    return [
        chunk.request_id
        for chunk in plan.chunks
        if chunk.samples
        and scheduler.progress(chunk.request_id).known + runs
        == scheduler._roster.sequences[chunk.request_id].request.prompt_tokens + wanted[chunk.request_id]
    ]


@settings(max_examples=150, deadline=None)
@given(schedulers(), jobs(), st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_leaping_equals_stepping(
    stepper: Scheduler, work: list[Job], dice: Any, asks_each_time: bool, arrives_in_flight: bool
) -> None:
    leaper = twin_of(stepper)
    wanted = {job.request.id: job.wanted for job in work}
    for number in range(3000):
        arrivals = [job.request for job in work if job.after_plans == number]
        if not arrives_in_flight:
            for request in arrivals:
                stepper.add(request)
                leaper.add(request)
        step_plan, plan = stepper.plan(), leaper.plan()
        assert step_plan == plan
        if not plan.chunks and not arrivals and number > work[-1].after_plans:
            break
        runs = min(plan.repeats + 1, due(leaper, plan, wanted), dice.randint(1, 60)) if plan.chunks else 1
        for run in range(runs):
            last = run == runs - 1
            done = finished(stepper, step_plan, wanted, 1) if last else []
            if last and arrives_in_flight:
                for request in arrivals:
                    stepper.add(request)
            stepper.complete(step_plan, done)
            if asks_each_time and not last:
                step_plan = stepper.plan()
        if arrives_in_flight:
            for request in arrivals:
                leaper.add(request)
        leaper.complete(plan, finished(leaper, plan, wanted, runs), runs)
        assert state(stepper) == state(leaper)
        leaper.check_integrity()
    else:
        raise AssertionError("the work never ends")
    assert leaper.kv.free_blocks == leaper.kv.num_blocks


@settings(max_examples=150, deadline=None)
@given(schedulers(), jobs())
def test_repeats_is_exact(scheduler: Scheduler, work: list[Job]) -> None:
    """A scheduler that forgets its plan decides the same for just that long, and then a request ends or blocks do."""
    for job in work:
        scheduler.add(job.request)
    wanted = {job.request.id: job.request.max_new_tokens for job in work}
    plan = scheduler.plan()
    while plan.chunks:
        for run in range(plan.repeats + 1):
            now = scheduler.plan() if run else plan
            assert [c.request_id for c in now.chunks] == [c.request_id for c in plan.chunks]
            assert [c.new_tokens for c in now.chunks] == [c.new_tokens for c in plan.chunks]
            assert [c.context_tokens for c in now.chunks] == [c.context_tokens + run for c in plan.chunks]
            assert now.repeats == plan.repeats - run
            assert not run or not (now.preempts or now.resumes)
            done = finished(scheduler, now, wanted, 1)
            assert not done or run == plan.repeats
            scheduler.complete(now, done)
            scheduler._changed = True
        following = scheduler.plan()
        steady = all(chunk.new_tokens == 1 and chunk.samples for chunk in plan.chunks) and plan.repeats
        if steady and not done:
            assert following.preempts, "it could have gone on"
        plan = following


@settings(max_examples=50, deadline=None)
@given(schedulers(), jobs())
def test_the_same_calls_give_the_same_answers(scheduler: Scheduler, work: list[Job]) -> None:
    twin = twin_of(scheduler)
    wanted = {job.request.id: job.wanted for job in work}
    logs = []
    for one in (scheduler, twin):
        log = []
        for job in work:
            one.add(job.request)
        while (plan := one.plan()).chunks:
            runs = min(plan.repeats + 1, due(one, plan, wanted))
            one.complete(plan, finished(one, plan, wanted, runs), runs)
            log.append(plan)
        logs.append(log)
    assert logs[0] == logs[1]


def decoding(lengths: list[int], blocks: int, max_new: int = 200) -> Scheduler:
    kv = KvAccount(blocks, BLOCK_TOKENS, prefix_cache=False)
    scheduler = Scheduler(by_name("splitfuse", 64), kv, Limits(max_sequences=8))
    for index, length in enumerate(lengths):
        scheduler.add(Request(index, index, length, max_new))
    scheduler.complete(scheduler.plan())
    return scheduler


def test_repeats_ends_at_the_first_request_that_has_all_its_tokens() -> None:
    scheduler = decoding([4, 4], 64, max_new=10)
    plan = scheduler.plan()
    assert plan.repeats == 8, "one token came with the prompt, this plan gives one, eight more to go"
    scheduler.complete(plan, finished=[0, 1], steps=9)
    assert scheduler.counters.finished == 2


def test_repeats_counts_every_block_edge() -> None:
    """Contexts 5 and 8 after the prompts; 2 + 2 blocks held, 3 planned for 1; 3 are free: edges at 9, 9; 13, ..."""
    scheduler = decoding([5, 7], 8, max_new=26)
    plan = scheduler.plan()
    assert scheduler.kv.free_blocks == 4
    # Run 1 writes positions 5 and 7; blocks end after 8 and 8. Edges: row 1 at run 2, row 0 at run 4, then 6, 8.
    # The four free blocks go at runs 2, 4, 6 and 8; run 10 has none: nine runs, eight of them repeats.
    assert plan.repeats == 8
    scheduler.complete(plan, steps=9)
    assert scheduler.plan().preempts


def test_an_arrival_ends_validity_and_an_abort_too() -> None:
    scheduler = decoding([4, 4], 64)
    plan = scheduler.plan()
    scheduler.complete(plan)
    assert scheduler.valid(plan)
    scheduler.add(Request(7, 7, 3, 3))
    assert not scheduler.valid(plan)
    plan = scheduler.plan()
    assert 7 in [chunk.request_id for chunk in plan.chunks]
    scheduler.complete(plan)
    plan = scheduler.plan()
    assert plan.repeats > 0
    scheduler.complete(plan)
    scheduler.abort(0)
    assert not scheduler.valid(plan)
    assert 0 not in [chunk.request_id for chunk in scheduler.plan().chunks]


def test_a_leap_after_an_abort_takes_no_block_for_who_is_gone() -> None:
    scheduler = decoding([4, 4], 64)
    plan = scheduler.plan()
    scheduler.abort(0)
    scheduler.complete(plan, steps=30)
    scheduler.check_integrity()
    assert scheduler.progress(1).computed == 34
    assert scheduler.kv.used_blocks == 9


def test_a_sealed_block_keeps_the_plan_valid() -> None:
    kv = KvAccount(64, BLOCK_TOKENS)
    scheduler = Scheduler(by_name("splitfuse", 64), kv, Limits(max_sequences=8))
    scheduler.add(Request(1, 0, 3, 50))
    scheduler.complete(scheduler.plan())
    plan = scheduler.plan()
    scheduler.complete(plan)
    assert scheduler.unsealed(1) == range(1)
    scheduler.seal(1, 99)
    assert scheduler.valid(plan)


def test_a_step_that_completes_a_prompt_block_has_no_repeats() -> None:
    """The block enters the prefix cache, and what waits may then find a longer prefix and come in."""
    scheduler = Scheduler(by_name("splitfuse", 7), KvAccount(8, BLOCK_TOKENS), Limits(max_sequences=4))
    scheduler.add(Request(1, 1, 8, 5, 0, (11, 12)))
    scheduler.complete(scheduler.plan())
    plan = scheduler.plan()
    assert [(c.request_id, c.new_tokens, c.samples) for c in plan.chunks] == [(1, 1, True)]
    assert plan.repeats == 0
    scheduler.complete(plan)
    assert scheduler.plan().repeats == 3


def test_the_table_is_right_for_the_next_run_after_each_complete() -> None:
    scheduler = decoding([4], 64)
    plan = scheduler.plan()
    scheduler.complete(plan)
    while scheduler.again(plan) and scheduler.progress(0).known < 40:
        assert len(scheduler.block_table(0)) * BLOCK_TOKENS >= scheduler.progress(0).known
        scheduler.complete(plan)
