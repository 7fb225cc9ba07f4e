"""Turns of models on one scheduler: one model at a time, nobody starves, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import QueueFull
from megalith.policy.batching import POLICY_NAMES, by_name
from megalith.policy.expert_turns import NO_MODEL, ExpertScheduler
from megalith.policy.facts import Request
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits

CALLS = st.sampled_from(("add", "add", "step", "step", "abort"))


def scheduler(policy: str = "splitfuse", seqs: int = 4, grouped: bool = True, blocks: int = 64) -> ExpertScheduler:
    kv = KvAccount(blocks, 4, 0, False, 0)
    limits = Limits(max_sequences=seqs, max_waiting=1000, preempt="recompute")
    return ExpertScheduler(by_name(policy, 16), kv, limits, grouped)


def request(number: int, model: int, prompt: int = 5, new: int = 3, priority: int = 0) -> Request:
    return Request(number, number, prompt, new, priority, (), model)


class Runner:
    """Steps until all is done; notes which request was first run when, and checks that steps are of one model."""

    def __init__(self, under: ExpertScheduler) -> None:
        self.under = under
        self.models: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.ended: list[int] = []
        self.began: list[int] = []

    def add(self, one: Request) -> None:
        self.under.add(one)
        self.models[one.id], self.left[one.id] = one.model, one.max_new_tokens

    def step(self) -> bool:
        plan = self.under.plan(0)
        chunks = plan.chunks
        if not chunks:
            return False
        assert {self.models[chunk.request_id] for chunk in chunks} == {self.under.model}
        finished = []
        for chunk in chunks:
            if chunk.request_id not in self.began:
                self.began.append(chunk.request_id)
            if chunk.samples:
                self.left[chunk.request_id] -= 1
                if not self.left[chunk.request_id]:
                    finished.append(chunk.request_id)
        self.under.complete(plan, finished)
        self.ended += finished
        self.under.check_integrity()
        return True

    def run(self) -> None:
        while self.step():
            pass


@given(
    st.sampled_from(POLICY_NAMES), st.booleans(), st.integers(1, 4), st.integers(12, 40),
    st.lists(st.tuples(CALLS, st.integers(0, 3), st.integers(1, 20), st.integers(1, 6)), max_size=60),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_every_request_runs_in_a_turn_of_its_model(
    policy: str, grouped: bool, seqs: int, blocks: int, calls: list[tuple[str, int, int, int]]
) -> None:
    runner, number, aborted = Runner(scheduler(policy, seqs, grouped, blocks)), 0, set[int]()
    for what, model, prompt, new in calls:
        if what == "add":
            runner.add(request(number, model, prompt, new))
            number += 1
        elif what == "abort":
            victim = (prompt * 7 + new) % max(1, number)
            if runner.under.abort(victim):
                aborted.add(victim)
            runner.under.check_integrity()
        else:
            runner.step()
    runner.run()
    assert sorted(runner.ended) == sorted(set(range(number)) - aborted)
    assert runner.under.num_waiting == runner.under.num_running == 0
    assert runner.under.kv.free_blocks == blocks


def test_grouped_turns_take_all_of_a_model_and_arrival_order_only_neighbours() -> None:
    for grouped, order, turns in ((True, [0, 2, 4, 1, 3], 2), (False, [0, 1, 2, 3, 4], 5)):
        runner = Runner(scheduler(grouped=grouped, seqs=8))
        for number in range(5):
            runner.add(request(number, number % 2))
        runner.run()
        assert runner.began == order
        assert (runner.under.turns, runner.under.taken) == (turns, 5)


def test_whoever_comes_joins_only_while_nobody_else_waits() -> None:
    runner = Runner(scheduler(seqs=8))
    runner.add(request(0, 7, new=6))
    runner.step()
    runner.add(request(1, 7, new=6))
    runner.step()
    assert runner.began == [0, 1], "nobody waits for another model"
    runner.add(request(2, 8))
    runner.add(request(3, 7))
    runner.run()
    assert runner.began == [0, 1, 2, 3], "3 came while 2 waited"


def test_an_endless_stream_of_one_model_starves_nobody() -> None:
    runner = Runner(scheduler(seqs=2))
    runner.add(request(0, 0))
    runner.step()
    runner.add(request(1, 1))
    for number in range(2, 40):
        runner.add(request(number, 0))
        runner.step()
        if 1 in runner.ended:
            break
    assert 1 in runner.ended
    assert len([one for one in runner.began if one < 6]) <= 4, "at most a turn of the stream came before"


def test_a_turn_takes_no_more_than_run_at_once() -> None:
    runner = Runner(scheduler(seqs=2))
    for number in range(5):
        runner.add(request(number, 0))
    runner.add(request(5, 1))
    assert runner.under.turn() == 0
    assert [one.id for one in runner.under.fresh()] == [0, 1]
    assert runner.under.fresh() == []
    assert runner.under.next_model() == 0
    runner.run()
    assert runner.under.turns == 4


def test_priority_gets_the_next_turn() -> None:
    runner = Runner(scheduler())
    runner.add(request(0, 0))
    runner.step()
    runner.add(request(1, 1))
    runner.add(request(2, 2, priority=1))
    runner.run()
    assert runner.began == [0, 2, 1]


def test_kv_from_elsewhere_comes_only_into_the_turn_of_its_model() -> None:
    under = scheduler()
    assert not under.reserve(request(9, 0), 6), "no turn is on"
    runner = Runner(under)
    runner.add(request(0, 0, new=9))
    runner.step()
    assert not under.reserve(request(9, 1), 6)
    assert under.reserve(request(9, 0), 6)
    assert under.abort(9)
    runner.add(request(1, 1))
    assert not under.reserve(request(9, 0), 6), "somebody waits for another model"


def test_the_queue_is_bounded_and_idle_is_no_model() -> None:
    under = ExpertScheduler(
        by_name("splitfuse", 16), KvAccount(64, 4, 0, False, 0), Limits(max_sequences=4, max_waiting=2)
    )
    assert under.turn() == NO_MODEL
    assert under.plan().empty
    under.add(request(0, 0))
    under.add(request(1, 1))
    with pytest.raises(QueueFull, match="2 requests wait"):
        under.add(request(2, 0))
    assert under.num_waiting == 2
    head = under.head()
    assert head is not None
    assert head.request.id == 0
    assert [one.request.id for one in under.waiting()] == [0, 1]
