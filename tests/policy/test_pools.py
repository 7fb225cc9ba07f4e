"""Splitwise's mixed pool, case by case of its released scheduler, and the guess of output lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.policy.cluster import Commanding, Defer, Event, Role, Route, SetRole
from megalith.policy.lengths import OutputLengths, _bin, _last_of
from megalith.policy.pools import SplitwiseOptions, SplitwisePools
from tests.policy.facts import Facts, Seen, instances_of, many, request

LONG = {"pending_tokens": 8000, "num_waiting": 1}
"""A prompt queue that is too long for a prompt of 200 tokens."""
FULL = {"promised_tokens": 851 * 16}


def pools(**options: Any) -> SplitwisePools:
    return SplitwisePools(SplitwiseOptions(transfer="push", **options))


def cluster(*instances: tuple[Role, dict[str, Any]]) -> Seen:
    homes: dict[str, Role] = {"prefill": "prefill", "decode": "decode", "mixed": "decode"}
    return Seen(many(*(Facts(role=role, home=homes[role], **facts) for role, facts in instances)))


def placed(view: Seen, prompt_tokens: int = 200, **options: Any) -> tuple[Any, list[Any]]:
    policy = pools(**options)
    placement = policy.route(request(prompt_tokens=prompt_tokens), view)
    return placement, list(policy.commands())


def test_both_ends_are_the_least_loaded_of_their_pools() -> None:
    view = cluster(
        ("prefill", {"pending_tokens": 500, "outstanding": 1}),
        ("prefill", {"pending_tokens": 400, "outstanding": 150}),
        ("decode", {"promised_tokens": 900, "outstanding": 1}),
        ("decode", {"promised_tokens": 800, "outstanding": 9}),
    )
    assert placed(view) == (Route(0, 1, 3, "push"), [])


@pytest.mark.parametrize(
    ("pending", "waiting", "prompt", "long"),
    [(8000, 1, 192, False), (8000, 1, 193, True), (8000, 0, 193, False), (0, 1, 9000, True)],
)
def test_a_queue_is_long_when_someone_waits_and_8192_tokens_would_be_exceeded(
    pending: int, waiting: int, prompt: int, long: bool
) -> None:
    view = cluster(("prefill", {"pending_tokens": pending, "num_waiting": waiting}), ("mixed", {}), ("decode", {}))
    assert placed(view, prompt)[0].instance == (1 if long else 0)


def test_a_mixed_instance_is_asked_before_one_is_borrowed() -> None:
    view = cluster(("prefill", LONG), ("mixed", {"outstanding": 50}), ("decode", {}))
    assert placed(view) == (Route(0, 1, 2, "push"), [])
    view = cluster(("prefill", {}), ("mixed", {}), ("decode", FULL))
    assert placed(view) == (Route(0, 0, 1, "push"), [])


def test_without_room_for_the_prompt_a_token_instance_is_borrowed() -> None:
    view = cluster(
        ("prefill", LONG), ("decode", {"outstanding": 7, "promised_tokens": 5}), ("decode", {"promised_tokens": 9})
    )
    # The token end is chosen by memory first, the borrowed one by queue.
    assert placed(view) == (Route(0, 2, 1, "push"), [SetRole(2, "mixed")])
    view = cluster(("prefill", LONG), ("mixed", LONG), ("decode", {"outstanding": 7}))
    # The same instance for both: nothing to send.
    assert placed(view) == (Route(0, 2), [SetRole(2, "mixed")])


def test_without_memory_for_the_tokens_a_prompt_instance_is_borrowed() -> None:
    view = cluster(
        ("prefill", {"promised_tokens": 60, "pending_tokens": 0}), ("prefill", {"pending_tokens": 9}), ("decode", FULL)
    )
    assert placed(view) == (Route(0, 0, 1, "push"), [SetRole(1, "mixed")])


def test_memory_counts_the_prompt_and_most_new_tokens_and_full_is_full() -> None:
    capacity = 851 * 16
    fits = cluster(("prefill", {}), ("decode", {"promised_tokens": capacity - 301}))
    assert placed(fits) == (Route(0, 0, 1, "push"), [])
    full = cluster(("prefill", {}), ("decode", {"promised_tokens": capacity - 300}))
    # At the capacity it is loaded (`>=` in the original), so the only prompt instance takes both ends.
    assert placed(full) == (Route(0, 0), [SetRole(0, "mixed")])


def test_with_both_pools_overloaded_each_lends_one() -> None:
    view = cluster(("prefill", LONG), ("decode", FULL))
    assert placed(view) == (Route(0, 1, 0, "push"), [SetRole(1, "mixed"), SetRole(0, "mixed")])


def test_with_nothing_to_borrow_the_request_runs_where_the_queue_is_shortest() -> None:
    view = cluster(("mixed", {"promised_tokens": 851 * 16, "outstanding": 3}), ("mixed", FULL | {"outstanding": 2}))
    assert placed(view) == (Route(0, 1), [])
    view = cluster(("decode", FULL | {"outstanding": 3}), ("decode", FULL | {"outstanding": 1}))
    assert placed(view) == (Route(0, 1), [SetRole(1, "mixed")])
    assert isinstance(placed(cluster())[0], Defer)


def test_a_borrowed_instance_goes_home_when_it_is_idle() -> None:
    policy = pools()
    before = cluster(("prefill", LONG), ("decode", {"outstanding": 7}), ("decode", {}))
    policy.route(request(prompt_tokens=200), before)
    assert policy.commands() == [SetRole(2, "mixed")]
    assert not policy.commands()
    idle = Event("idle", 10, 2)
    # The view is from before the borrowing: the policy knows better.
    assert list(policy.act(idle, before)) == [SetRole(2, "decode")]
    assert list(policy.act(idle, before)) == []
    after = Seen([*before.instances[:2], replace(before.instances[2], role="mixed")])
    assert list(policy.act(idle, after)) == [SetRole(2, "decode")]
    assert list(policy.act(Event("idle", 10, 99), after)) == []


def test_short_prompts_are_sent_in_one_piece() -> None:
    view = cluster(("prefill", {}), ("decode", {}))
    policy = SplitwisePools(SplitwiseOptions())
    assert [policy.route(request(0, tokens), view).transfer for tokens in (511, 512)] == ["push", "layerwise"]
    assert SplitwisePools(SplitwiseOptions(transfer="pull")).route(request(), view).transfer == "pull"


def finish(policy: SplitwisePools, request_id: int, new_tokens: int, outcome: str = "finished") -> None:
    data = {"prompt_tokens": 200, "new_tokens": new_tokens, "outcome": outcome, "instance": 1}
    assert list(policy.act(Event("finish", 0, request_id, data), Seen())) == []


def test_predicted_lengths_reserve_what_was_learned() -> None:
    view = cluster(("prefill", {}), ("decode", {"kv_blocks": 100}), ("mixed", {"kv_blocks": 10}))
    policy = pools(lengths="predicted")
    assert {"idle", "finish", "down"} == policy.listens
    # At first the cap counts: 200 + 1400 of 1600 tokens are too many.
    assert policy.route(request(0, 200, 1400), view) == Route(0, 0)
    for index in range(20):
        finish(policy, 100 + index, 100, "finished")
        finish(policy, 200 + index, 9, "failed")
    policy.commands()
    # 300 tokens each from now on: five of them, and the sixth does not fit.
    assert [policy.route(request(index, 200, 1400), view).decode_instance for index in range(1, 7)] == [1] * 5 + [None]
    finish(policy, 3, 100)
    assert policy.route(request(7, 200, 1400), view).decode_instance == 1
    policy.act(Event("down", 0, 1), view)
    for index in range(1, 6):
        finish(policy, index, 100, "failed")
    assert [policy.route(request(index, 200, 1400), view).decode_instance for index in range(8, 14)] == [1] * 5 + [None]


@settings(max_examples=50, deadline=None)
@given(
    clusters=st.lists(instances_of(), min_size=1, max_size=4), predicted=st.booleans(), prompt=st.integers(1, 20_000)
)
def test_any_view_gets_an_answer_of_instances_that_accept(clusters: Any, predicted: bool, prompt: int) -> None:
    policy = pools(lengths="predicted" if predicted else "capped")
    assert isinstance(policy, Commanding)
    for index, instances in enumerate(clusters):
        view = Seen(instances)
        placement = policy.route(request(index, prompt), view)
        assert all(view.by_id(command.instance).accepting for command in policy.commands())
        if isinstance(placement, Route):
            assert view.by_id(placement.instance).accepting
            assert placement.decode_instance is None or view.by_id(placement.decode_instance).accepting
            assert placement.decode_instance != placement.instance
        else:
            assert not any(one.accepting for one in instances)
        for one in instances:
            for command in policy.act(Event("idle", 0, one.id), view):
                assert command == SetRole(one.id, one.home)


@given(tokens=st.integers(1, 10**7))
def test_bins_are_narrow_and_in_order(tokens: int) -> None:
    assert tokens <= _last_of(_bin(tokens)) <= tokens * 1.125
    assert _bin(tokens + 1) - _bin(tokens) in (0, 1)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 5000), min_size=20, max_size=60), share=st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_a_quantile_is_never_below_and_at_most_an_eighth_above(lengths: list[int], share: float) -> None:
    estimator = OutputLengths(share)
    for length in lengths:
        estimator.observe({"prompt_tokens": 100}, {"new_tokens": length})
    guess = estimator.predict({"prompt_tokens": 100, "max_new_tokens": 10**6})["new_tokens"]
    exact = sorted(lengths)[max(0, -int(-share * len(lengths) // 1) - 1)]
    assert exact <= guess <= exact * 1.125


def test_the_mean_is_that_of_prompts_of_the_same_size_once_there_are_enough() -> None:
    estimator = OutputLengths()
    asked = {"prompt_tokens": 1000, "max_new_tokens": 400}
    for _ in range(19):
        estimator.observe({"prompt_tokens": 700}, {"new_tokens": 10})
    assert estimator.predict(asked)["new_tokens"] == 400
    estimator.observe({"prompt_tokens": 3}, {"new_tokens": 50})
    assert estimator.predict(asked)["new_tokens"] == 12  # 240 of 20, all sizes
    estimator.observe({"prompt_tokens": 900}, {"new_tokens": 31})
    assert estimator.predict(asked)["new_tokens"] == 12  # 221 of 20, this size: 11.05 rounded up
    assert estimator.predict(asked | {"max_new_tokens": 5})["new_tokens"] == 5
