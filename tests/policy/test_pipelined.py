"""Several steps of one scheduler under way: disjoint rows, nobody lost, and one stage decides as no pipeline does."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.policy.batching import POLICY_NAMES, by_name
from megalith.policy.facts import Request, StepPlan
from megalith.policy.hashing import block_hashes
from megalith.policy.kv import KvAccount
from megalith.policy.pipelined import PipelinedScheduler
from megalith.policy.scheduler import Limits, Scheduler

LIMITS = Limits(max_sequences=6)
POLICIES = [name for name in POLICY_NAMES if name != "splitwise"]


def pipeline(policy: str = "splitfuse", budget: int = 8, blocks: int = 60, stages: int = 2) -> PipelinedScheduler:
    return PipelinedScheduler(by_name(policy, budget), KvAccount(blocks, 4, prefix_cache=False), LIMITS, stages)


def rows(plan: StepPlan) -> list[tuple[int, int]]:
    return sorted((chunk.request_id, chunk.new_tokens) for chunk in plan.chunks)


def ask(number: int, prompt: int, most: int = 20) -> Request:
    return Request(number, number, prompt, most)


def test_a_second_step_takes_only_those_who_are_idle() -> None:
    scheduler = pipeline()
    scheduler.add(ask(1, 5))
    first = scheduler.plan()
    assert rows(first) == [(1, 5)]
    assert scheduler.plan().empty
    scheduler.add(ask(2, 3))
    second = scheduler.plan()
    assert rows(second) == [(2, 3)]
    scheduler.add(ask(3, 3))
    assert scheduler.plan().empty, "both stages are taken"
    assert scheduler.num_running == 2
    scheduler.complete(first)
    third = scheduler.plan()
    assert rows(third) == [(1, 1), (3, 3)]
    scheduler.complete(second)
    assert rows(scheduler.plan()) == [(2, 1)]
    assert third.decode_context_sum == 5


def test_groups_that_are_idle_together_become_one() -> None:
    scheduler = pipeline()
    for number in (1, 2):
        scheduler.add(ask(number, 8))
    first, second = scheduler.plan(), scheduler.plan()
    scheduler.complete(first)
    scheduler.complete(second)
    assert rows(scheduler.plan()) == [(1, 1), (2, 1)]
    assert scheduler.plan().empty


def test_a_chunk_under_way_holds_back_the_rest_of_its_prompt() -> None:
    scheduler = pipeline(budget=4)
    scheduler.add(ask(1, 10))
    first = scheduler.plan()
    assert rows(first) == [(1, 4)]
    assert scheduler.plan().empty
    scheduler.complete(first)
    assert rows(scheduler.plan()) == [(1, 4)]


def test_rows_of_a_step_are_bounded() -> None:
    scheduler = PipelinedScheduler(
        by_name("splitfuse", 99), KvAccount(90, 4, prefix_cache=False), Limits(max_sequences=6), 2
    )
    for number in range(8):
        scheduler.add(ask(number, 2))
    first, second = scheduler.plan(), scheduler.plan()
    assert [len(plan.chunks) for plan in (first, second)] == [3, 3]
    scheduler.complete(first)
    scheduler.complete(second)
    third, fourth = scheduler.plan(), scheduler.plan()
    assert rows(third) == [(0, 1), (1, 1), (2, 1)]
    assert rows(fourth) == [(3, 1), (4, 1), (5, 1)]


def test_who_is_under_way_is_never_made_to_step_aside() -> None:
    scheduler = pipeline(blocks=5)
    scheduler.add(ask(1, 8, 12))
    scheduler.add(ask(2, 8, 12))
    first, second = scheduler.plan(), scheduler.plan()
    assert (rows(first), rows(second)) == ([(1, 8)], [(2, 8)])
    scheduler.complete(first)
    third = scheduler.plan()  # its ninth token takes the last block
    assert rows(third) == [(1, 1)]
    scheduler.complete(second)
    fourth = scheduler.plan()  # no block for the ninth of 2, and 1 is under way
    assert fourth.empty
    assert [preempt.request_id for preempt in fourth.preempts] == [2]
    scheduler.check_integrity()


def test_bad_pipelines_and_plans() -> None:
    with pytest.raises(ConfigError, match="0 stages"):
        pipeline(stages=0)
    refused = pipeline("splitwise")
    refused.add(ask(1, 5))
    with pytest.raises(ConfigError, match="splitfuse"):
        refused.plan()
    scheduler = pipeline()
    scheduler.add(ask(1, 5))
    plan = scheduler.plan()
    scheduler.complete(plan)
    with pytest.raises(ValueError, match="under way"):
        scheduler.complete(plan)


@st.composite
def work(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """(prompt, answer, gap in steps, abort after so many tokens)"""
    item = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(0, 3), st.sampled_from([0, 0, 0, 2]))
    return draw(st.lists(item, min_size=1, max_size=25))


def serve(scheduler: Scheduler, stages: int, jobs: list[tuple[int, int, int, int]]) -> list[tuple[object, ...]]:
    """Run to the end, steps leaving in the order in which they were planned. Returns every plan."""
    tokens = dict.fromkeys(range(len(jobs)), 0)
    waiting = deque(enumerate(jobs))
    under_way: deque[StepPlan] = deque()
    held: set[int] = set()
    seen: list[tuple[object, ...]] = []
    ended = 0
    while ended < len(jobs):
        while waiting:
            number, (prompt, answer, gap, _) = waiting.popleft()
            hashes = block_hashes([number % 3] * prompt, 4)
            scheduler.add(Request(number, number, prompt, answer + 2, 0, hashes))
            if gap:
                break
        while len(under_way) < stages:
            plan = scheduler.plan()
            if plan.empty:
                break
            mine = {chunk.request_id for chunk in plan.chunks}
            assert not mine & held, "a request is in two steps"
            held |= mine
            seen.append((rows(plan), plan.preempts, plan.decodes, plan.decode_context_sum))
            under_way.append(plan)
        if not under_way:
            assert waiting, f"nothing can run, {len(jobs) - ended} requests are left"
            continue
        plan = under_way.popleft()
        held -= {chunk.request_id for chunk in plan.chunks}
        finished = []
        for chunk in plan.chunks:
            if chunk.samples:
                tokens[chunk.request_id] += 1
                if tokens[chunk.request_id] == jobs[chunk.request_id][1]:
                    finished.append(chunk.request_id)
        scheduler.complete(plan, finished)
        ended += len(finished)
        for number, (_, answer, _, most) in enumerate(jobs):
            if most and tokens[number] == most < answer and scheduler.abort(number):
                tokens[number] = -99
                ended += 1
        scheduler.check_integrity()
    assert scheduler.num_running == 0
    return seen


@settings(max_examples=80, deadline=None)
@given(work(), st.sampled_from(POLICIES), st.integers(2, 20), st.integers(8, 30), st.integers(1, 4), st.booleans())
def test_everybody_finishes_and_the_books_add_up(
    jobs: list[tuple[int, int, int, int]], policy: str, budget: int, blocks: int, stages: int, cache: bool
) -> None:
    kv = KvAccount(blocks, 4, prefix_cache=cache)
    serve(PipelinedScheduler(by_name(policy, budget), kv, LIMITS, stages), stages, jobs)
    assert kv.used_blocks == 0


@settings(max_examples=60, deadline=None)
@given(work(), st.sampled_from(POLICIES), st.integers(1, 20), st.integers(8, 30))
def test_one_stage_decides_as_a_scheduler_without_pipeline(
    jobs: list[tuple[int, int, int, int]], policy: str, budget: int, blocks: int
) -> None:
    plain = Scheduler(by_name(policy, budget), KvAccount(blocks, 4), LIMITS)
    piped = PipelinedScheduler(by_name(policy, budget), KvAccount(blocks, 4), LIMITS, 1)
    assert serve(piped, 1, jobs) == serve(plain, 1, jobs)
