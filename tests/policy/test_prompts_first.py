"""Steps in which prompts go before decodes, and budgets of padded tokens. Contents are checked by the Executor."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.policy.batching import by_name
from megalith.policy.facts import StepPlan
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from tests.policy.driver import Executor, reference_output


def make(policy: str = "splitwise", budget: int = 8, blocks: int = 200) -> Executor:
    kv = KvAccount(blocks, 4, prefix_cache=False)
    return Executor(Scheduler(by_name(policy, budget), kv, Limits(max_sequences=64)))


def rows(plan: StepPlan) -> list[tuple[int, int]]:
    return [(chunk.request_id, chunk.new_tokens) for chunk in plan.chunks]


def decoding(run: Executor, *numbers: int) -> None:
    """Requests that have sampled one token each."""
    for number in numbers:
        run.add(number, [number], 90)
    while any(len(run.live[number].tokens) < 2 for number in numbers):
        run.step()


def test_prompts_and_decodes_share_a_step_while_it_has_room() -> None:
    run = make(budget=8)
    decoding(run, 1, 2)
    run.add(3, [3] * 6, 9)
    assert sorted(rows(run.step())) == [(1, 1), (2, 1), (3, 6)]
    assert rows(run.step()) == [(1, 1), (2, 1), (3, 1)]


def test_a_prompt_above_the_budget_goes_alone_and_whole() -> None:
    run = make(budget=8)
    decoding(run, 1, 2)
    run.add(3, [3] * 20, 9)
    run.add(4, [4] * 2, 9)
    assert rows(run.step()) == [(3, 20)]
    assert sorted(rows(run.step())) == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_those_left_out_come_first_in_the_next_step() -> None:
    run = make(budget=4)
    decoding(run, 1, 2, 3)
    run.add(4, [4] * 3, 9)
    assert sorted(rows(run.step())) == [(1, 1), (4, 3)]
    run.add(5, [5] * 2, 9)
    assert sorted(rows(run.step())) == [(2, 1), (3, 1), (5, 2)]
    run.add(6, [6] * 2, 9)
    # 1 and 4 were left out: 4 decodes for the first time, so it is behind 1.
    assert sorted(rows(run.step())) == [(1, 1), (4, 1), (6, 2)]


def test_whoever_comes_back_sits_behind_the_others() -> None:
    run = make(budget=4)
    decoding(run, 1, 2, 3)
    run.add(4, [4] * 3, 9)
    assert sorted(rows(run.step())) == [(1, 1), (4, 3)]  # 2 and 3 are left out
    assert rows(run.step()) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    run.add(5, [5] * 2, 9)
    assert sorted(rows(run.step())) == [(1, 1), (2, 1), (5, 2)]


def test_nobody_is_left_out_of_more_than_four_steps_in_a_row() -> None:
    run = make(budget=8)
    decoding(run, 1)
    for number in range(2, 12):
        run.add(number, [number] * 8, 9)
    seen = [rows(run.step()) for _ in range(6)]
    assert seen[:4] == [[(2, 8)], [(3, 8)], [(4, 8)], [(5, 8)]]
    # Its one token leaves no room for a whole prompt; 2 has waited for three steps, 3 for two.
    assert seen[4] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]
    assert seen[5] == [(6, 8)]


def test_left_out_decodes_keep_their_blocks_and_nobody_is_preempted() -> None:
    run = make(budget=8)
    decoding(run, 1, 2, 3)
    used = run.scheduler.kv.used_blocks
    run.add(4, [4] * 30, 9)
    run.step()
    assert run.scheduler.kv.used_blocks == used + 8
    assert run.scheduler.counters.preemptions == 0


def test_repeats_are_only_for_steps_of_all_decodes() -> None:
    run = make(budget=4)
    decoding(run, 1, 2, 3)
    assert run.scheduler.plan().repeats > 10
    run.add(4, [4] * 3, 9)
    assert run.step().repeats == 0
    assert run.step().repeats > 3


work = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=25)


@settings(max_examples=100)
@given(work, st.integers(1, 14), st.integers(8, 40), st.sampled_from(["splitwise", "prefill-first-padded"]))
def test_everybody_gets_the_tokens_of_a_run_alone(
    jobs: list[tuple[int, int, int]], budget: int, blocks: int, policy: str
) -> None:
    run = make(policy, budget, blocks)
    waiting = [(number, [number + 1] * prompt, wanted, gap) for number, (prompt, wanted, gap) in enumerate(jobs)]
    expected = {number: reference_output(prompt, wanted) for number, prompt, wanted, _ in waiting}
    while waiting or run.live:
        while waiting:
            number, prompt, wanted, gap = waiting.pop(0)
            run.add(number, prompt, wanted)
            if gap:
                break
        if run.live:
            run.step()
        run.scheduler.check_integrity()
    assert run.outputs == expected


def test_a_padded_budget_counts_rows_times_the_longest() -> None:
    plain, padded = make("prefill-first", 16), make("prefill-first-padded", 16)
    for run in (plain, padded):
        for number, tokens in enumerate((4, 6, 5, 1)):
            run.add(number, [number] * tokens, 3)
    assert rows(plain.step()) == [(0, 4), (1, 6), (2, 5), (3, 1)]
    assert rows(padded.step()) == [(0, 4), (1, 6)]
    assert rows(padded.step()) == [(2, 5), (3, 1)]
