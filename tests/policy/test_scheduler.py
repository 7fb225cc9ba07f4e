"""One rule of the scheduler a test. Contents are checked by the Executor all along."""

from __future__ import annotations

import pytest

from megalith.base.errors import ConfigError, PromptTooLong, QueueFull
from megalith.policy.batching import Admission, BatchFacts, StepShape, by_name
from megalith.policy.facts import Chunk, PreemptMode, Request, StepPlan
from megalith.policy.hashing import block_hashes
from megalith.policy.kv import IntegrityError, KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from tests.policy.driver import Executor, reference_output


def make(
    policy: str = "splitfuse",
    budget: int = 16,
    blocks: int = 64,
    *,
    sequences: int = 8,
    waiting: int = 64,
    preempt: PreemptMode = "recompute",
    host: int = 0,
    cache: bool = True,
    watermark: int = 0,
) -> Executor:
    kv = KvAccount(blocks, 4, host, cache, watermark)
    limits = Limits(max_sequences=sequences, max_waiting=waiting, preempt=preempt)
    return Executor(Scheduler(by_name(policy, budget), kv, limits))


def rows(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(c.request_id, c.new_tokens, c.context_tokens, c.samples) for c in plan.chunks]


def prompt(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


# SplitFuse


def test_splitfuse_cuts_a_long_prompt_and_samples_on_the_last_chunk() -> None:
    run = make(budget=8)
    run.add(1, prompt(0, 19), 5)
    assert rows(run.step()) == [(1, 8, 0, False)]
    assert rows(run.step()) == [(1, 8, 8, False)]
    assert rows(run.step()) == [(1, 3, 16, True)]
    assert rows(run.step()) == [(1, 1, 19, True)]


def test_splitfuse_fuses_short_prompts_and_fills_the_budget_exactly() -> None:
    run = make(budget=8)
    for request_id in range(3):
        run.add(request_id, prompt(100 * request_id, 3), 5)
    assert rows(run.step()) == [(0, 3, 0, True), (1, 3, 0, True), (2, 2, 0, False)]


def test_splitfuse_puts_decodes_first() -> None:
    run = make(budget=8)
    run.add(1, prompt(0, 4), 9)
    run.step()
    run.add(2, prompt(50, 20), 9)
    assert rows(run.step()) == [(1, 1, 4, True), (2, 7, 0, False)]
    assert rows(run.step()) == [(1, 1, 5, True), (2, 7, 7, False)]
    assert rows(run.step()) == [(1, 1, 6, True), (2, 6, 14, True)]
    assert rows(run.step()) == [(1, 1, 7, True), (2, 1, 20, True)]


def test_a_mixed_step_never_runs_more_requests_than_the_budget_has_tokens() -> None:
    run = make(budget=2, sequences=8)
    for request_id in range(4):
        run.add(request_id, [request_id], 3)
    while run.live:
        assert run.step().num_tokens <= 2


# PrefillFirst


def test_prefill_first_runs_whole_prompts_and_stalls_decodes() -> None:
    run = make("prefill-first", budget=10)
    run.add(1, prompt(0, 6), 9)
    assert rows(run.step()) == [(1, 6, 0, True)]
    run.add(2, prompt(50, 6), 9)
    run.add(3, prompt(80, 6), 9)
    assert rows(run.step()) == [(2, 6, 0, True)], "3 would have to be cut"
    assert rows(run.step()) == [(3, 6, 0, True)]
    assert rows(run.step()) == [(1, 1, 6, True), (2, 1, 6, True), (3, 1, 6, True)]


def test_prefill_first_runs_an_over_long_prompt_alone_and_whole() -> None:
    run = make("prefill-first", budget=10)
    run.add(1, prompt(0, 25), 2)
    run.add(2, prompt(50, 3), 2)
    assert rows(run.step()) == [(1, 25, 0, True)]
    assert rows(run.step()) == [(2, 3, 0, True)]


def test_prefill_first_counts_prefix_hits_against_the_budget() -> None:
    run = make("prefill-first", budget=10)
    run.add(1, prompt(0, 9), 20)
    run.step()
    run.add(2, prompt(70, 5), 20)
    run.add(3, [*prompt(0, 8), 99], 20)
    assert rows(run.step()) == [(2, 5, 0, True), (3, 1, 8, True)]


def test_prefill_first_decodes_while_nobody_can_come_in() -> None:
    run = make("prefill-first", budget=10, sequences=1)
    run.add(1, prompt(0, 4), 5)
    run.step()
    run.add(2, prompt(50, 4), 5)
    plan = run.scheduler.plan()
    assert rows(plan) == [(1, 1, 4, True)]
    assert plan.repeats == 3, "a request that must wait for a finish does not break repeats"


# FirstCome


def test_first_come_runs_a_batch_to_its_end() -> None:
    run = make("first-come", budget=8)
    run.add(1, prompt(0, 6), 3)
    run.add(2, prompt(50, 6), 5)
    assert rows(run.step()) == [(1, 6, 0, True)], "the budget bounds a prompt step, not the batch"
    run.add(3, prompt(90, 6), 2)
    assert rows(run.step()) == [(2, 6, 0, True)]
    seen = []
    while 2 in run.live:
        seen.append([row[0] for row in rows(run.step())])
    assert seen == [[1, 2], [1, 2], [2], [2]]
    assert rows(run.step()) == [(3, 6, 0, True)]


# Order and limits


def test_higher_priority_first_then_arrival_then_id() -> None:
    run = make(budget=3, sequences=8)
    run.add(5, prompt(0, 3), 1, at=7)
    run.add(4, prompt(10, 3), 1, at=7)
    run.add(3, prompt(20, 3), 1, at=9)
    run.add(2, prompt(30, 3), 1, at=9, priority=1)
    assert [rows(run.step())[0][0] for _ in range(4)] == [2, 4, 5, 3]


def test_nobody_overtakes_a_head_that_does_not_fit() -> None:
    run = make(blocks=8, budget=64)
    run.add(1, prompt(0, 20), 4)
    run.step()
    run.add(2, prompt(50, 16), 2)
    run.add(3, prompt(90, 2), 2)
    assert [row[0] for row in rows(run.step())] == [1]


def test_a_head_that_cannot_come_in_does_not_stop_running_prompts_behind_it() -> None:
    run = make(blocks=16, budget=9)
    run.add(1, prompt(0, 40), 20, priority=2)
    run.add(2, prompt(50, 16), 9)
    while run.scheduler.progress(2).computed == 0:
        run.step()
    run.add(3, prompt(90, 36), 9, priority=1)
    plan = run.step()
    assert [chunk.request_id for chunk in plan.chunks] == [1, 2]
    assert not plan.preempts


class Alternating:
    """Not a policy of ours: alone while few run, mixed with a tiny budget when many do."""

    name = "alternating"

    def shape(self, facts: BatchFacts) -> StepShape:
        many = facts.running >= 4
        return StepShape(2 if many else 64, mixed=many, split=True, admission=Admission.BUDGET)


def test_a_policy_of_any_shape_keeps_the_budget_and_lets_everyone_finish() -> None:
    kv = KvAccount(64, 4)
    run = Executor(Scheduler(Alternating(), kv, Limits(max_sequences=8)))
    for request_id in range(6):
        run.add(request_id, prompt(20 * request_id, 5), 7)
    while run.live:
        mixed = run.scheduler.num_running >= 4
        plan = run.step()
        assert plan.num_tokens <= (2 if mixed else 64)
        assert plan.repeats == 0 or len(plan.chunks) == run.scheduler.num_running
    assert all(run.outputs[i] == reference_output(prompt(20 * i, 5), 7) for i in range(6))


def test_max_sequences() -> None:
    run = make(sequences=2, budget=64)
    for request_id in range(3):
        run.add(request_id, prompt(10 * request_id, 3), 4)
    assert [row[0] for row in rows(run.step())] == [0, 1]
    assert (run.scheduler.num_running, run.scheduler.num_waiting) == (2, 1)


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    run = make(blocks=8)
    with pytest.raises(PromptTooLong, match=r"30 prompt tokens and 4 new ones need 9 KV blocks.*has 8.*at most 33"):
        run.scheduler.add(Request(1, 0, 30, 4))
    run.add(2, prompt(0, 30), 3)
    run.drain()
    assert run.outputs[2] == reference_output(prompt(0, 30), 3), "the largest that fits runs, on the last block"


def test_the_queue_is_bounded() -> None:
    run = make(waiting=2)
    run.add(1, [1], 1)
    run.add(2, [2], 1)
    with pytest.raises(QueueFull, match="2 requests wait already, and the limit is 2"):
        run.scheduler.add(Request(3, 0, 1, 1))
    run.step()
    run.add(3, [3], 1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(1, 0, 4, 4), "here already"),
        (Request(2, 0, 0, 4), "at least one"),
        (Request(2, 0, 4, 0), "at least one"),
        (Request(2, 0, 7, 4, 0, (1, 2)), "more prefix hashes"),
    ],
)
def test_impossible_requests_are_bugs(request_: Request, message: str) -> None:
    run = make()
    run.add(1, [1], 1)
    with pytest.raises(ValueError, match=message):
        run.scheduler.add(request_)


@pytest.mark.parametrize("bad", [{"max_sequences": 0}, {"max_sequences": 1, "max_waiting": 0}])
def test_impossible_limits(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Scheduler(by_name("splitfuse", 8), KvAccount(8, 4), Limits(**bad))


# Preemption


def crowd(run: Executor) -> Executor:
    """Two requests that fit at first and not to the end: 6 blocks of 4 tokens; each grows to 16 tokens."""
    run.add(1, prompt(0, 8), 9, at=1)
    run.add(2, prompt(50, 8), 9, at=2)
    return run


def until_preempt(run: Executor, limit: int = 60) -> StepPlan:
    for _ in range(limit):
        plan = run.step()
        if plan.preempts:
            return plan
    raise AssertionError("nobody was preempted")


def next_chunk_of(run: Executor, request_id: int, limit: int = 60) -> Chunk:
    for _ in range(limit):
        for chunk in run.step().chunks:
            if chunk.request_id == request_id:
                return chunk
    raise AssertionError(f"request {request_id} never came back")


def test_the_latest_arrival_steps_aside_and_its_tokens_do_not_change() -> None:
    run = crowd(make(blocks=6))
    plan = until_preempt(run)
    assert [(p.request_id, p.mode) for p in plan.preempts] == [(2, "recompute")]
    assert [chunk.request_id for chunk in plan.chunks] == [1]
    run.drain()
    assert run.outputs[1] == reference_output(prompt(0, 8), 9)
    assert run.outputs[2] == reference_output(prompt(50, 8), 9)
    assert run.scheduler.counters.preempted_recompute >= 1
    assert run.scheduler.counters.admitted == 2


def test_the_lowest_priority_steps_aside_even_if_it_came_first() -> None:
    run = make(blocks=6)
    run.add(1, prompt(0, 8), 9, at=1)
    run.add(2, prompt(50, 8), 9, at=2, priority=1)
    assert [p.request_id for p in until_preempt(run).preempts] == [1]


def test_a_preempted_request_computes_what_it_knew_again() -> None:
    run = crowd(make(blocks=6, cache=False))
    until_preempt(run)
    known = run.scheduler.progress(2).known
    assert run.scheduler.progress(2).computed == 0
    assert run.scheduler.block_table(2) == []
    chunk = next_chunk_of(run, 2)
    assert (chunk.new_tokens, chunk.context_tokens, chunk.samples) == (known, 0, True)


def test_prefix_hits_help_a_preempted_request_and_count_once() -> None:
    run = crowd(make(blocks=6))
    run.step()
    hits = run.scheduler.counters.prefix_hit_tokens
    until_preempt(run)
    known = run.scheduler.progress(2).known
    chunk = next_chunk_of(run, 2)
    assert chunk.context_tokens > 0
    assert chunk.context_tokens + chunk.new_tokens == known
    assert run.scheduler.counters.prefix_hit_tokens == hits
    assert run.scheduler.progress(2).cached == 0


def test_a_preempted_request_does_not_come_back_in_the_same_step() -> None:
    """Its copy of the last prompt block was a duplicate, so it needs less than it gave back."""
    run = make(blocks=4)
    run.add(1, prompt(0, 8), 6)
    run.step()
    run.add(2, prompt(0, 8), 6)
    plan = until_preempt(run)
    assert [p.request_id for p in plan.preempts] == [2]
    assert [chunk.request_id for chunk in plan.chunks] == [1]
    assert 2 in [chunk.request_id for chunk in run.step().chunks]
    run.drain()
    assert run.outputs[1] == run.outputs[2]


def test_swap_copies_out_and_back_and_computes_nothing_again() -> None:
    run = crowd(make(blocks=6, preempt="swap", host=6, cache=False))
    plan = until_preempt(run)
    (preempt,) = plan.preempts
    computed = run.scheduler.progress(2).computed
    assert preempt.mode == "swap"
    assert len(preempt.device_blocks) == len(preempt.host_blocks) == -(-computed // 4)
    assert (run.scheduler.num_swapped, run.scheduler.num_waiting) == (1, 0)
    while not (plan := run.step()).resumes:
        pass
    (resume,) = plan.resumes
    assert resume.host_blocks == preempt.host_blocks
    chunk = next(chunk for chunk in plan.chunks if chunk.request_id == 2)
    assert (chunk.new_tokens, chunk.context_tokens) == (1, computed)
    run.drain()
    assert run.outputs[2] == reference_output(prompt(50, 8), 9)
    assert run.scheduler.kv.free_host_blocks == 6


def test_hashes_survive_a_swap() -> None:
    """The caller is not asked again for hashes that it gave before."""
    run = crowd(make(blocks=6, preempt="swap", host=6))
    until_preempt(run)
    for _ in range(60):
        plan = run.scheduler.plan()
        if plan.resumes:
            break
        run.run(plan)
    assert plan.resumes
    assert len(run.scheduler.unsealed(2)) == 0
    run.run(plan)
    run.drain()
    assert run.outputs[2] == reference_output(prompt(50, 8), 9)


def test_swap_falls_back_to_recompute_when_host_blocks_are_short() -> None:
    run = crowd(make(blocks=6, preempt="swap", host=1))
    assert [p.mode for p in until_preempt(run).preempts] == ["recompute"]
    run.drain()
    assert run.scheduler.counters.preempted_swap == 0


def test_a_waiting_request_of_higher_priority_takes_the_place_of_a_lower_one() -> None:
    run = make(sequences=1)
    run.add(1, prompt(0, 4), 9)
    run.step()
    run.add(2, prompt(50, 4), 2, priority=1)
    plan = run.step()
    assert [p.request_id for p in plan.preempts] == [1]
    assert [chunk.request_id for chunk in plan.chunks] == [2]
    run.drain()
    assert run.outputs[1] == reference_output(prompt(0, 4), 9)


def test_it_takes_nobodys_place_when_that_would_not_let_it_in() -> None:
    run = make(blocks=8)
    run.add(1, prompt(0, 20), 5, priority=1)
    run.add(2, prompt(50, 4), 9)
    run.step()
    run.step()
    run.add(3, prompt(80, 16), 2, priority=1)
    plan = run.step()
    assert not plan.preempts
    assert [chunk.request_id for chunk in plan.chunks] == [1, 2]


def test_equal_priority_never_takes_a_place() -> None:
    run = make(sequences=1)
    run.add(1, prompt(0, 4), 9, at=5)
    run.step()
    run.add(2, prompt(50, 4), 2, at=1)
    assert not run.step().preempts


def test_the_watermark_holds_admission_back_but_not_a_lone_request() -> None:
    run = make(blocks=8, watermark=3, budget=64)
    run.add(1, prompt(0, 28), 4)
    run.step()
    assert run.scheduler.num_running == 1
    run.drain()
    run.add(2, prompt(0, 12), 4)
    run.add(3, prompt(50, 12), 4)
    run.step()
    assert (run.scheduler.num_running, run.scheduler.num_waiting) == (1, 1)


# Prefix cache


def test_a_second_request_starts_behind_the_shared_prefix() -> None:
    run = make()
    run.add(1, prompt(0, 10), 3)
    run.drain()
    run.add(2, [*prompt(0, 8), 70, 71], 3)
    assert rows(run.step()) == [(2, 2, 8, True)]
    assert run.scheduler.progress(2).cached == 8
    assert run.scheduler.counters.prefix_queried_tokens == 20
    assert run.scheduler.counters.prefix_hit_tokens == 8


def test_a_fully_cached_prompt_computes_its_last_block_again_in_a_block_of_its_own() -> None:
    run = make()
    run.add(1, prompt(0, 8), 9)
    run.step()
    run.add(2, prompt(0, 8), 9)
    plan = run.step()
    assert rows(plan) == [(1, 1, 8, True), (2, 4, 4, True)]
    run.drain()
    assert run.outputs[1] == run.outputs[2] == reference_output(prompt(0, 8), 9)


def test_generated_blocks_are_shared_once_sealed() -> None:
    run = make()
    run.add(1, prompt(0, 6), 9)
    run.drain()
    follow_up = prompt(0, 6) + reference_output(prompt(0, 6), 9) + [3, 3]
    run.add(2, follow_up, 1)
    assert rows(run.step())[0][2] == 12, "two generated blocks; the last token of request 1 was never computed"


def test_a_request_waits_for_a_prefix_that_another_one_is_computing() -> None:
    """n answers to one prompt compute it once."""
    run = make(budget=8)
    for request_id in range(3):
        run.add(request_id, prompt(0, 18), 4)
    assert rows(run.step()) == [(0, 8, 0, False)]
    assert rows(run.step()) == [(0, 8, 8, False)]
    assert rows(run.step()) == [(0, 2, 16, True), (1, 2, 16, True), (2, 2, 16, True)]
    run.drain()
    assert run.scheduler.counters.prefix_hit_tokens == 32


def test_nobody_waits_for_a_prefix_that_one_of_lower_priority_computes() -> None:
    run = make(budget=8)
    run.add(1, prompt(0, 18), 4)
    run.step()
    run.add(2, prompt(0, 18), 4, priority=1)
    assert rows(run.step()) == [(2, 8, 8, False)]


def test_it_waits_also_when_both_could_start_in_one_step() -> None:
    run = make(budget=64)
    for request_id in range(3):
        run.add(request_id, prompt(0, 18), 4)
    assert rows(run.step()) == [(0, 18, 0, True)]
    assert rows(run.step()) == [(0, 1, 18, True), (1, 2, 16, True), (2, 2, 16, True)]


def test_nobody_waits_for_a_last_block_that_it_must_compute_anyway() -> None:
    run = make(budget=6)
    run.add(1, prompt(0, 8), 4)
    run.step()
    run.add(2, prompt(0, 8), 4)
    assert rows(run.step()) == [(1, 2, 6, True), (2, 4, 4, True)]


def test_a_static_batch_does_not_wait_for_a_prefix() -> None:
    run = make("first-come", budget=64)
    for request_id in range(3):
        run.add(request_id, prompt(0, 18), 4)
    assert [row[0] for row in rows(run.step())] == [0, 1, 2]


def test_without_prefix_cache_nobody_waits_for_a_prefix() -> None:
    kv = KvAccount(64, 4, prefix_cache=False)
    scheduler = Scheduler(by_name("splitfuse", 64), kv, Limits(max_sequences=8))
    hashes = block_hashes(prompt(0, 9), 4)
    scheduler.add(Request(1, 0, 9, 4, 0, hashes))
    scheduler.add(Request(2, 0, 9, 4, 0, hashes))
    assert [chunk.request_id for chunk in scheduler.plan().chunks] == [1, 2]


def test_the_wait_ends_when_the_computing_request_is_aborted() -> None:
    run = make(budget=4)
    run.add(1, prompt(0, 18), 4)
    run.add(2, prompt(0, 18), 4)
    run.step()
    run.abort(1)
    assert rows(run.step()) == [(2, 4, 4, False)]


def test_seal_only_what_is_complete_and_unknown() -> None:
    run = make()
    run.add(1, prompt(0, 6), 9)
    with pytest.raises(ValueError, match="no complete block"):
        run.scheduler.seal(1, 5)
    run.step()
    assert run.scheduler.unsealed(1) == range(1, 1), "block 0 is a prompt block, sealed by complete()"
    with pytest.raises(ValueError, match="no complete block"):
        run.scheduler.seal(1, 5)


# Life cycle


def test_abort_frees_at_once_wherever_the_request_stands() -> None:
    run = crowd(make(blocks=6, preempt="swap", host=6))
    until_preempt(run)
    run.add(3, prompt(90, 4), 4)
    assert (run.scheduler.num_running, run.scheduler.num_waiting, run.scheduler.num_swapped) == (1, 1, 1)
    for request_id in (1, 2, 3):
        assert run.scheduler.abort(request_id)
        run.scheduler.check_integrity()
    assert run.scheduler.kv.free_blocks == 6
    assert run.scheduler.kv.free_host_blocks == 6
    assert not run.scheduler.abort(1)
    assert run.scheduler.counters.aborted == 3
    assert run.scheduler.plan().chunks == ()


def test_a_request_aborted_while_its_step_runs_is_passed_over() -> None:
    run = make()
    run.add(1, prompt(0, 4), 9)
    run.add(2, prompt(50, 4), 9)
    plan = run.scheduler.plan()
    run.forward(plan)
    run.abort(1)
    run.scheduler.complete(plan, finished=[1])
    run.scheduler.check_integrity()
    assert run.scheduler.counters.finished == 0
    run.drain()
    assert run.outputs[2] == reference_output(prompt(50, 4), 9)


def test_a_step_that_failed_is_planned_again_without_its_culprit() -> None:
    run = make()
    run.add(1, prompt(0, 4), 9)
    run.add(2, prompt(50, 4), 9)
    run.scheduler.plan()
    run.abort(1)
    assert rows(run.step()) == [(2, 4, 0, True)]


def test_a_request_with_all_its_tokens_must_be_finished() -> None:
    run = make()
    run.add(1, prompt(0, 4), 1)
    with pytest.raises(ValueError, match="request 1 has all its tokens"):
        run.scheduler.complete(run.scheduler.plan())


def test_only_the_last_plan_can_be_completed_and_only_as_often_as_it_may_run() -> None:
    run = make()
    run.add(1, prompt(0, 4), 9)
    first = run.scheduler.plan()
    second = run.scheduler.plan()
    with pytest.raises(ValueError, match="not the last plan"):
        run.scheduler.complete(first)
    with pytest.raises(ValueError, match="2 runs of it where 1 are left"):
        run.scheduler.complete(second, steps=2)
    with pytest.raises(ValueError, match="0 runs"):
        run.scheduler.complete(second, steps=0)


def test_check_integrity_finds_a_request_in_two_places() -> None:
    run = make()
    run.add(1, prompt(0, 4), 9)
    run.step()
    run.scheduler.check_integrity()
    run.scheduler._roster.cohort.members.clear()
    run.scheduler._roster.prompts.clear()
    with pytest.raises(IntegrityError, match="running"):
        run.scheduler.check_integrity()
