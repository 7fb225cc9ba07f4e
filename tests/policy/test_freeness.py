"""Llumnix: the formula on worked examples, who is paired with whom, which request moves, and draining."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isnan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.policy.cluster import Event, Migrate, SetRole
from megalith.policy.freeness import (
    FreenessOptions,
    FreenessRouter,
    Rebalance,
    RebalanceOptions,
    dispatch_freeness,
    migration_freeness,
)
from tests.policy.facts import Facts, Seen, instances_of, many, request, running, tick

M = 851
"""Blocks of the paper's LLaMA-7B on an A10: 13,616 tokens of KV."""


def batch(*blocks: int, first: int = 0, **facts: Any) -> dict[str, Any]:
    return {"batch": tuple(running(first + index, count, **facts) for index, count in enumerate(blocks))}


# Freeness


def test_freeness_is_room_for_each_request() -> None:
    assert migration_freeness(Facts(**batch(100, 51))) == (851 - 151) / 2
    assert dispatch_freeness(Facts(**batch(100, 51)), watermark=0.0) == (851 - 151) / 2
    assert migration_freeness(Facts()) == dispatch_freeness(Facts()) == inf


def test_migration_counts_the_head_of_the_queue_and_dispatch_all_of_it() -> None:
    waits = Facts(**batch(400, 300), num_waiting=4, num_waiting_blocks=130, num_head_blocks=31)
    assert migration_freeness(waits) == (851 - 700 - 31) / 3
    assert dispatch_freeness(waits, watermark=0.0) == (851 - 700 - 130) / 6
    assert dispatch_freeness(waits, watermark=0.01) == pytest.approx((851 - 700 - 130 - 8.51) / 6)
    # A queue with nothing running has a freeness, which may be below 0: more demand than blocks.
    assert migration_freeness(Facts(num_waiting=2, num_head_blocks=900)) == (851 - 900) / 1


def test_a_request_of_high_priority_fills_its_instance_up_to_the_target_load() -> None:
    # Algorithm 1: headroom(p) = M - 1,600 tokens, shared by the requests of the priority; here 751 blocks together.
    one = Facts(batch=(running(1, 30, priority=1), running(2, 20)))
    two = Facts(batch=(running(1, 30, priority=1), running(2, 20, priority=1)))
    none = Facts(**batch(30, 20))
    assert migration_freeness(one, 1600) == migration_freeness(two, 1600) == (100 - 50) / 2
    assert migration_freeness(none, 1600) == (851 - 50) / 2
    assert migration_freeness(one) == (851 - 50) / 2
    # The target load is a bound of the load: above it freeness is negative.
    assert migration_freeness(Facts(batch=(running(1, 150, priority=1),)), 1600) == -50


def test_a_newcomer_of_high_priority_joins_its_kind_and_normal_ones_stay_away() -> None:
    high, low = Facts(batch=(running(1, 30, priority=1),)), Facts(**batch(30))
    assert dispatch_freeness(high, 1, 1600, 0.0) == dispatch_freeness(low, 0, 1600, 0.0) == 821
    assert dispatch_freeness(high, 0, 1600, 0.0) == dispatch_freeness(low, 1, 1600, 0.0) == 70


def test_a_draining_instance_is_as_full_as_can_be() -> None:
    for batch_now in ({}, batch(10)):
        draining = Facts(headroom_blocks=inf, **batch_now)
        assert migration_freeness(draining) == dispatch_freeness(draining) == -inf
    assert migration_freeness(Facts(headroom_blocks=51.0, **batch(100))) == 700


@settings(max_examples=100, deadline=None)
@given(instances=instances_of(), priority=st.integers(-1, 2), target=st.sampled_from([None, 0, 1600, 10**6]))
def test_freeness_is_a_number_whatever_the_facts_say(instances: Any, priority: int, target: int | None) -> None:
    for instance in instances:
        for figure in (dispatch_freeness(instance, priority, target), migration_freeness(instance, target)):
            assert not isnan(figure)
            if instance.headroom_blocks == inf:
                assert figure == -inf


def test_dispatch_goes_to_the_highest_freeness() -> None:
    policy = FreenessRouter(FreenessOptions())
    view = Seen(
        many(Facts(**batch(10, 10)), Facts(**batch(300)), Facts(**batch(300), num_waiting=1, num_waiting_blocks=9))
    )
    assert policy.route(request(), view).instance == 1
    assert policy.route(request(), Seen([*view.instances, Facts(id=3)])).instance == 3
    drains = [replace(one, headroom_blocks=inf) for one in view.instances]
    assert policy.route(request(), Seen(drains)).instance == 0
    high = many(Facts(**batch(300, 200)), Facts(batch=(running(1, 20, priority=1),)))
    with_priorities = FreenessRouter(FreenessOptions(priority_target_tokens=1600))
    # (851 - 500 - 8.51) / 2 = 171 against 851 - 20 - 8.51 - 751 = 71.
    assert with_priorities.route(request(), Seen(high)).instance == 0
    assert with_priorities.route(request(priority=1), Seen(high)).instance == 1


# Migration


def rebalance(**options: Any) -> Rebalance:
    return Rebalance(RebalanceOptions(**options))


def moves(policy: Rebalance, instances: list[Facts], at_ns: int = 0) -> list[tuple[int, int, int]]:
    commands = list(policy.act(tick(at_ns), Seen(instances, now_ns=at_ns, as_of_ns=at_ns)))
    assert all(isinstance(command, Migrate) for command in commands)
    return [(command.request_id, command.source, command.target) for command in commands]


def ended(command: Migrate, outcome: str, at_ns: int = 0) -> Event:
    return Event("command", at_ns, data={"command": command, "outcome": outcome, "reason": ""})


FULL = batch(400, 250, 200)
"""Freeness 1/3."""


def test_the_fullest_is_paired_with_the_emptiest() -> None:
    instances = many(
        Facts(**batch(425, 420, first=10)),  # 3: neither below nor above
        Facts(**batch(842, first=20)),  # 9: takes
        Facts(**FULL),  # 0.33: gives
        Facts(**batch(849, first=30)),  # 2: gives
        Facts(),  # infinite: takes
    )
    assert moves(rebalance(), instances) == [(2, 2, 4), (30, 3, 1)]
    # With one taker only the fullest is served; without any, nobody.
    assert moves(rebalance(), instances[:4]) == [(2, 2, 1)]
    assert moves(rebalance(), [instances[0], instances[2]]) == []


def test_an_instance_that_preempted_gives_and_does_not_take() -> None:
    roomy = Facts(**batch(100, 90), num_preempted=1)
    assert moves(rebalance(), many(roomy, Facts())) == [(1, 0, 1)]
    assert moves(rebalance(), many(Facts(**FULL), roomy)) == []


@pytest.mark.parametrize(("choice", "expected"), [("shortest", 12), ("longest", 10), ("last", 13)])
def test_the_lowest_priority_moves_and_of_these_the_one_asked_for(choice: Any, expected: int) -> None:
    source = Facts(
        batch=(
            running(10, 400),
            running(11, 10, priority=1),
            running(12, 100),
            running(13, 200),
            running(14, 5, decoding=False),
            running(15, 3, moving=True),
        ),
        num_free_blocks=5,
    )
    assert moves(rebalance(request=choice), many(source, Facts())) == [(expected, 0, 1)]


def test_without_a_request_that_can_move_the_next_source_gets_the_target() -> None:
    stuck = Facts(**batch(500, 351, decoding=False))
    assert moves(rebalance(), many(stuck, Facts(**FULL), Facts())) == [(2, 1, 2)]


def test_prompts_only_instances_and_other_pools_are_left_alone() -> None:
    assert moves(rebalance(), many(Facts(**FULL), Facts(role="prefill"))) == []
    assert moves(rebalance(), many(Facts(role="prefill", **FULL), Facts())) == []
    assert moves(rebalance(), many(Facts(pool="a", **FULL), Facts(pool="b"))) == []
    assert moves(rebalance(across_pools=True), many(Facts(pool="a", **FULL), Facts(pool="b"))) == [(2, 0, 1)]


def test_one_migration_for_each_instance_at_a_time() -> None:
    policy = rebalance()
    instances = many(Facts(**FULL), Facts(), Facts(**batch(849, first=30)))
    assert moves(policy, instances) == [(2, 0, 1)]
    assert moves(policy, instances) == []
    command = Migrate(2, 0, 1)
    assert list(policy.act(ended(command, "refused"), Seen(instances))) == []
    assert moves(policy, instances) == [(2, 0, 1)]
    # Somebody else's command, or one that is long over, changes nothing.
    assert list(policy.act(ended(Migrate(7, 0, 1), "done"), Seen(instances))) == []
    assert list(policy.act(Event("command", 0, data={"command": SetRole(0, "mixed"), "outcome": "done"}), Seen())) == []
    assert moves(policy, instances) == []


def test_a_source_goes_on_until_it_leaves_its_condition() -> None:
    policy = rebalance(mode="blocking", max_stages=2, last_blocks=4)
    before = many(Facts(**FULL), Facts())
    first = list(policy.act(tick(), Seen(before)))
    assert first == [Migrate(2, 0, 1, "blocking", 2, 4)]
    still = many(Facts(**batch(600, 249)), Facts(**batch(200, first=2)))
    second = list(policy.act(ended(first[0], "done"), Seen(still)))
    assert second == [Migrate(1, 0, 1, "blocking", 2, 4)]
    better = many(Facts(**batch(600)), Facts(**batch(200, 249, first=2)))
    assert list(policy.act(ended(second[0], "done"), Seen(better))) == []
    assert list(rebalance(keep=False).act(ended(first[0], "done"), Seen(still))) == []


def test_an_aborted_migration_is_not_tried_again_before_the_tick() -> None:
    policy = rebalance()
    instances = many(Facts(**FULL), Facts())
    [command] = policy.act(tick(), Seen(instances))
    assert list(policy.act(ended(command, "aborted"), Seen(instances))) == []
    assert moves(policy, instances) == [(2, 0, 1)]


def test_an_old_view_does_not_move_a_request_twice() -> None:
    policy = rebalance()
    old = Seen(many(Facts(**FULL), Facts()), now_ns=900, as_of_ns=100)
    [first] = policy.act(tick(100), old)
    [second] = policy.act(ended(first, "done", 800), old)
    assert (first.request_id, second.request_id) == (2, 1)
    assert list(policy.act(ended(second, "done", 900), replace(old, instances=[]))) == []
    # Once the view is younger than the move, what it shows counts again.
    assert moves(policy, list(old.instances), at_ns=1000) == [(2, 0, 1)]


def test_a_migration_that_is_never_heard_of_again_is_forgotten() -> None:
    policy = rebalance(deadline_s=1.0)
    instances = many(Facts(**FULL), Facts())
    assert moves(policy, instances) == [(2, 0, 1)]
    assert moves(policy, instances, at_ns=10**9) == []
    assert moves(policy, instances, at_ns=10**9 + 1) == [(2, 0, 1)]


def test_a_draining_instance_gives_everything_away() -> None:
    draining = Facts(headroom_blocks=inf, accepting=False, **batch(5, 3))
    policy = rebalance(balanced=True)
    target = Facts(**batch(100, first=50))
    [first] = policy.act(tick(), Seen(many(draining, target)))
    assert first.request_id == 1
    rest = many(replace(draining, batch=draining.batch[:1]), target)
    assert [command.request_id for command in policy.act(ended(first, "done"), Seen(rest))] == [0]
    # It is no target itself, however empty.
    assert moves(rebalance(), many(Facts(**FULL), replace(draining, batch=()))) == []


def test_the_balanced_variant_only_moves_what_makes_the_gap_smaller() -> None:
    source = Facts(**batch(400, 250, 200))
    # From 0.33 and 751 to (851 - 650) / 2 = 100.5 and (851 - 300) / 2 = 275.5.
    assert moves(rebalance(balanced=True), many(source, Facts(**batch(100, first=9)))) == [(2, 0, 1)]
    # From 0.33 and 351 to 100.5 and 75.5: turned round.
    assert moves(rebalance(balanced=True), many(source, Facts(**batch(500, first=9)))) == []
    # Target at 4 = (851 - 839) / 3: with 200 more it would be below T.
    assert moves(rebalance(balanced=True), many(source, Facts(**batch(500, 300, 39, first=9)))) == []
    assert moves(rebalance(), many(source, Facts(**batch(500, 300, 39, first=9)))) == [(2, 0, 1)]
    # One request alone leaves an empty instance behind: the gap would be turned round, unless the target is empty.
    alone = Facts(**batch(849))
    big = replace(Facts(**batch(10, first=9)), kv_blocks=2000)
    assert moves(rebalance(balanced=True), many(alone, big)) == []
    assert moves(rebalance(balanced=True), many(alone, Facts(kv_blocks=2000))) == [(0, 0, 1)]


def test_normal_requests_make_room_for_one_of_high_priority() -> None:
    host = Facts(batch=(running(1, 30, priority=1), running(2, 60), running(3, 20)))
    instances = many(host, Facts(**batch(100, first=9)))
    assert moves(rebalance(), instances) == []
    # 851 - 110 - 751 = -10 for three requests.
    assert moves(rebalance(priority_target_tokens=1600), instances) == [(3, 0, 1)]


@settings(max_examples=100, deadline=None)
@given(
    clusters=st.lists(instances_of(max_size=8), min_size=1, max_size=4),
    balanced=st.booleans(),
    across=st.booleans(),
    outcome=st.sampled_from(["done", "refused", "aborted"]),
    target=st.sampled_from([None, 1600]),
)
def test_pairs_are_two_different_instances_and_a_running_request_of_the_source(
    clusters: Any, balanced: bool, across: bool, outcome: str, target: int | None
) -> None:
    def run() -> list[Migrate]:
        policy = rebalance(balanced=balanced, across_pools=across, priority_target_tokens=target)
        issued: list[Migrate] = []
        for now_ns, instances in enumerate(clusters):
            view = Seen(instances, now_ns=now_ns, as_of_ns=0)
            commands = list(policy.act(tick(now_ns), view))
            ends = [end for command in commands for end in (command.source, command.target)]
            assert len(set(ends)) == len(ends)
            for command in commands:
                commands_next = list(policy.act(ended(command, outcome, now_ns), view))
                for each in (command, *commands_next):
                    source, goal = view.by_id(each.source), view.by_id(each.target)
                    assert source.id != goal.id
                    assert goal.accepting
                    assert "prefill" not in (source.role, goal.role)
                    assert across or source.pool == goal.pool
                    [moved] = [one for one in source.requests() if one.id == each.request_id]
                    assert moved.decoding
                    assert not moved.moving
                issued += [command, *commands_next]
        return issued

    assert run() == run()
