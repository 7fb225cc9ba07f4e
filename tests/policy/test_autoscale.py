"""Scaling: how many are asked for, who goes, draining and calling back, and that nothing is asked for twice."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.policy.autoscale import (
    FreenessScaling,
    FreenessScalingOptions,
    Scaler,
    ThresholdScaling,
    ThresholdScalingOptions,
)
from megalith.policy.cluster import Command, Event, Headroom, Scale
from tests.policy.facts import Facts, Seen, instances_of, many, running, tick

S = 10**9


def scaling(**options: Any) -> FreenessScaling:
    return FreenessScaling(FreenessScalingOptions(watermark=0.0, **options))


def loaded(requests: int, used: int, **facts: Any) -> Facts:
    """`requests` of which the first has all the blocks but one for each other."""
    first = running(0, used - requests + 1)
    return Facts(batch=(first, *(running(index, 1) for index in range(1, requests))), outstanding=requests, **facts)


def after(command: Command, outcome: str = "done", at_ns: int = 0) -> Event:
    return Event("command", at_ns, data={"command": command, "outcome": outcome, "reason": ""})


def said(policy: Scaler, *instances: Facts, at_s: float = 0.0) -> list[Command]:
    return list(policy.act(tick(round(at_s * S)), Seen(many(*instances))))


def test_as_many_start_as_lift_the_mean_freeness_to_the_threshold() -> None:
    # 2 * 851 blocks, 1,600 used, 40 requests: 102 / 40 = 2.55. To 10: (400 - 102) / 851, so one.
    full = [loaded(20, 800), loaded(20, 800)]
    assert said(scaling(), *full) == [Scale("pool", 1)]
    # With 140 more waiting for 400 blocks: -298 / 180. (1800 + 298) / 851 = 2.5, so three.
    waits = [replace(one, num_waiting=70, num_waiting_blocks=200) for one in full]
    assert said(scaling(), *waits) == [Scale("pool", 1)] * 3
    assert said(scaling(max_count=4), *waits) == [Scale("pool", 1)] * 2
    assert said(scaling(max_count=2), *waits) == []
    assert said(scaling(up_below=2.5), *full) == []


def test_those_that_start_are_not_asked_for_again() -> None:
    policy, full = scaling(), [loaded(20, 800), loaded(20, 800)]
    assert said(policy, *full) == [Scale("pool", 1)]
    assert said(policy, *full, at_s=10) == []
    # It did not work out: once more.
    policy.act(after(Scale("pool", 1), "refused"), Seen())
    assert said(policy, *full, at_s=20) == [Scale("pool", 1)]
    policy.act(after(Scale("pool", 1)), Seen())
    assert said(policy, *full, Facts(), at_s=30) == []


def test_one_goes_when_the_rest_would_still_be_above_the_upper_threshold() -> None:
    # Without one of three: (2 * 851 - 300) / 20 = 70.1 > 60; of two: 551 / 20 = 27.6.
    three = [loaded(10, 100), loaded(4, 100), loaded(6, 100)]
    assert said(scaling(), *three) == [Headroom(1, inf)]
    assert said(scaling(victim="last"), *three) == [Headroom(2, inf)]
    assert said(scaling(min_count=3), *three) == []
    assert said(scaling(), *three[:2]) == []
    # Nobody there: down to the least, one at a time, and an empty one needs no draining.
    assert said(scaling(), Facts(), Facts()) == [Headroom(1, inf), Scale("pool", -1)]
    assert said(scaling(), Facts()) == []


def test_it_stops_when_it_has_drained_and_not_before() -> None:
    policy = scaling()
    three = many(loaded(10, 100), loaded(4, 100), loaded(6, 100))
    assert said(policy, *three) == [Headroom(1, inf)]
    draining = replace(three[1], headroom_blocks=inf, accepting=False)
    assert said(policy, three[0], draining, three[2], at_s=10) == []
    # A view from before the draining says nothing yet, even if the instance was empty then.
    old = replace(three[1], batch=(), outstanding=0)
    idle = Event("idle", 15 * S, 1)
    assert list(policy.act(idle, Seen([three[0], old, three[2]]))) == []
    empty = replace(draining, batch=(), outstanding=0)
    assert list(policy.act(Event("idle", 15 * S, 0), Seen([three[0], empty, three[2]]))) == []
    assert list(policy.act(idle, Seen([three[0], empty, three[2]]))) == [Scale("pool", -1)]
    # While it stops nobody else goes, whatever the load.
    assert said(policy, Facts(), empty, Facts(), at_s=20) == []
    policy.act(after(Scale("pool", -1)), Seen())
    assert said(policy, Facts(), Facts(), at_s=30) == [Headroom(1, inf), Scale("pool", -1)]


def test_a_turn_of_the_load_calls_the_draining_one_back() -> None:
    policy = scaling()
    said(policy, loaded(10, 100), loaded(4, 100), loaded(6, 100))
    draining = loaded(4, 100, headroom_blocks=inf, accepting=False)
    # What it still runs counts, its room does not: (1702 - 1400 - 100) / 44 = 4.6; 238 are missing, one is called back.
    assert said(policy, loaded(20, 700), draining, loaded(20, 700), at_s=10) == [Headroom(1, 0.0)]
    assert said(policy, loaded(20, 700), loaded(4, 100), loaded(20, 700), at_s=20) == []


def test_a_refusal_leaves_nothing_waiting() -> None:
    policy = scaling()
    three = [loaded(10, 100), loaded(4, 100), loaded(6, 100)]
    said(policy, *three)
    assert list(policy.act(after(Headroom(1, inf), "refused"), Seen())) == []
    assert said(policy, *three, at_s=10) == [Headroom(1, inf)]
    two = scaling()
    said(two, Facts(), Facts())
    assert list(two.act(after(Scale("pool", -1), "refused"), Seen())) == [Headroom(1, 0.0)]


def test_a_victim_that_is_gone_is_forgotten() -> None:
    policy = scaling()
    three = [loaded(10, 100), loaded(4, 100), loaded(6, 100)]
    said(policy, *three)
    assert list(policy.act(tick(10 * S), Seen([many(*three)[0]]))) == []
    assert said(policy, *three, at_s=20) == [Headroom(1, inf)]


def test_pools_are_scaled_each_by_itself_or_one_of_them() -> None:
    instances = [loaded(20, 800, pool="a"), loaded(20, 800, pool="b")]
    assert said(scaling(), *instances) == [Scale("a", 1), Scale("b", 1)]
    assert said(scaling(pool="b"), *instances) == [Scale("b", 1)]
    # A pool that is not there yet, or all down, gets its least number.
    assert said(scaling(pool="c", min_count=2), *instances) == [Scale("c", 1)] * 2
    assert said(scaling(), replace(instances[0], accepting=False), instances[1]) == [Scale("a", 1), Scale("b", 1)]


@pytest.mark.parametrize(
    ("by", "facts", "up", "down"),
    [
        ("kv", {"num_free_blocks": 171}, 0.79, 0.80),
        ("kv", {"num_free_blocks": 300, "num_waiting_blocks": 129}, 0.79, 0.80),
        ("outstanding", {"outstanding": 8}, 7, 9),
        ("waiting", {"num_waiting": 5}, 4, 6),
        ("pending_tokens", {"pending_tokens": 4000}, 3999, 4001),
    ],
)
def test_the_plain_rule_compares_the_mean_with_two_thresholds(
    by: Any, facts: dict[str, Any], up: float, down: float
) -> None:
    both = [Facts(**facts), Facts(**facts)]
    above = ThresholdScaling(ThresholdScalingOptions(by=by, up_above=up, down_below=0.0))
    assert said(above, *both) == [Scale("pool", 1)]
    below = ThresholdScaling(ThresholdScalingOptions(by=by, up_above=1e9, down_below=down))
    assert said(below, *both)[0] == Headroom(1, inf)
    between = ThresholdScaling(ThresholdScalingOptions(by=by, up_above=down, down_below=up))
    assert said(between, *both) == []


def test_cool_downs_hold_the_plain_rule_back() -> None:
    policy = ThresholdScaling(ThresholdScalingOptions(by="outstanding", up_above=4, down_below=2))
    busy, quiet = Facts(outstanding=9), Facts(outstanding=1)
    assert said(policy, busy, busy, at_s=0) == [Scale("pool", 1)]
    policy.act(after(Scale("pool", 1)), Seen())
    assert said(policy, busy, busy, busy, at_s=59) == []
    assert said(policy, busy, busy, busy, at_s=60) == [Scale("pool", 1)]
    assert said(policy, busy, busy, busy, at_s=200) == []  # it still starts
    policy.act(after(Scale("pool", 1)), Seen())
    assert said(policy, quiet, quiet, quiet, at_s=359) == []
    assert said(policy, quiet, quiet, quiet, at_s=360) == [Headroom(2, inf)]


@settings(max_examples=60, deadline=None)
@given(
    clusters=st.lists(instances_of(max_size=8), min_size=1, max_size=5),
    outcomes=st.lists(st.sampled_from(["done", "refused", "aborted", "never"]), min_size=5, max_size=5),
    least=st.integers(0, 3),
    plain=st.booleans(),
)
def test_counts_stay_within_their_bounds_whatever_the_view(
    clusters: Any, outcomes: Any, least: int, plain: bool
) -> None:
    bounds: dict[str, Any] = {"min_count": least, "max_count": 5, "up_cooldown_s": 0.0, "down_cooldown_s": 0.0}

    def run() -> list[Command]:
        policy: Scaler = (
            ThresholdScaling(ThresholdScalingOptions(**bounds))
            if plain
            else FreenessScaling(FreenessScalingOptions(**bounds))
        )
        issued: list[Command] = []
        for index, (instances, outcome) in enumerate(zip(clusters, outcomes, strict=False)):
            view = Seen(instances)
            commands = list(policy.act(tick(index * S), view))
            for pool in ("one", "two"):
                serving = [one for one in instances if one.pool == pool and one.accepting and one.headroom_blocks < inf]
                change = sum(
                    command.delta for command in commands if isinstance(command, Scale) and command.pool == pool
                )
                assert change <= max(0, 5 - len(serving))
                stopped = sum(isinstance(command, Headroom) and command.blocks == inf for command in commands)
                assert stopped <= 2
            for command in commands:
                if isinstance(command, Headroom) and command.blocks == inf:
                    assert view.by_id(command.instance).accepting
                if outcome != "never":
                    issued += policy.act(after(command, outcome), view)
            issued += commands
        return issued

    assert run() == run()
