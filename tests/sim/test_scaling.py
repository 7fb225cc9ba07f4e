"""Scaling: starts take their time, stops drain, hours are paid for, and every command has one outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Event, InstanceId, Scale, SetRole
from megalith.sim.kernel import Kernel
from megalith.sim.scaling import Scaling
from megalith.specs.fleet import PoolSpec


@dataclass
class Facts:
    id: int
    pool: str
    accepting: bool = False
    outstanding: int = 0
    headroom_blocks: float = 0.0


class Farm:
    """Pools of instances that only have a number of requests."""

    def __init__(self, until_s: float = 1000.0, **counts: int) -> None:
        self.kernel = Kernel()
        self.until_ns = round(until_s * NS_PER_S)
        self.all: dict[InstanceId, Facts] = {}
        self.events: list[Event] = []
        self.next_id = 0
        pools = {
            name: PoolSpec(
                name=name, device="x", count=count, max_count=count + 3, start_s=30.0, tensor_parallel=2
            )
            for name, count in counts.items()
        }  # fmt: skip
        self.scaling = Scaling(self, pools)
        for name, count in counts.items():
            for _ in range(count):
                instance = self.switch_on(name)
                self.all[instance].accepting = True
                self.scaling.exists(instance, name)

    def going_on(self) -> bool:
        return self.kernel.now_ns < self.until_ns

    def facts_of(self, pool: str) -> Sequence[Any]:
        return [facts for facts in self.all.values() if facts.pool == pool]

    def switch_on(self, pool: str) -> InstanceId:
        instance, self.next_id = self.next_id, self.next_id + 1
        self.all[instance] = Facts(instance, pool)
        return instance

    def set_accepting(self, instance: InstanceId, accepting: bool) -> None:
        self.all[instance].accepting = accepting

    def unused(self, instance: InstanceId) -> bool:
        return self.all[instance].outstanding == 0

    def switch_off(self, instance: InstanceId) -> None:
        assert self.all.pop(instance).outstanding == 0

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def order(self, pool: str, delta: int) -> str | None:
        return self.scaling.carry_out(Scale(pool, delta))

    def until(self, seconds: float) -> None:
        while self.kernel._heap and self.kernel._heap[0][0] <= seconds * NS_PER_S:
            self.kernel.run(1)
        self.kernel.now_ns = round(seconds * NS_PER_S)

    def told(self) -> list[tuple[float, str, int]]:
        return [
            (event.at_ns / NS_PER_S, event.data["outcome"], event.data["command"].delta)
            for event in self.events
            if event.kind == "command"
        ]


def test_a_start_takes_its_time_and_is_paid_for_at_once() -> None:
    farm = Farm(a=1)
    assert farm.order("a", 2) is None
    assert [facts.accepting for facts in farm.all.values()] == [True, False, False]
    assert farm.scaling.starting("a") == 2
    farm.until(29)
    assert not farm.events
    farm.until(3600)
    assert [facts.accepting for facts in farm.all.values()] == [True, True, True]
    assert [(event.at_ns / NS_PER_S, event.kind) for event in farm.events] == [
        (30.0, "up"), (30.0, "up"), (30.0, "command")
    ]  # fmt: skip
    assert farm.told() == [(30.0, "done", 2)]
    assert farm.scaling.instance_hours("a") == farm.scaling.instance_hours() == 3.0
    assert farm.scaling.device_hours() == 6.0
    assert farm.scaling.counters.started == 2


def test_a_pool_has_a_most_and_a_least() -> None:
    farm = Farm(a=1, b=1)
    assert farm.order("a", 9) is None
    assert len(farm.facts_of("a")) == 4, "as many as there may be"
    assert farm.order("a", 1) == "pool a has 4 of at most 4 instances"
    assert farm.order("b", -1) == "the last instance of pool b stays"
    assert farm.order("c", 1) == "there is no pool 'c': a, b"
    assert farm.order("b", 0) == "a change by 0 is none"
    assert farm.scaling.counters.refused == 4
    with pytest.raises(TypeError, match="does not scale"):
        farm.scaling.carry_out(SetRole(0, "prefill"))


def test_the_one_with_the_fewest_requests_goes_when_they_are_done() -> None:
    farm = Farm(a=3)
    for instance, outstanding in enumerate((3, 1, 2)):
        farm.all[instance].outstanding = outstanding
    assert farm.order("a", -1) is None
    assert [facts.accepting for facts in farm.all.values()] == [True, False, True]
    farm.until(7.5)
    assert len(farm.all) == 3
    farm.all[1].outstanding = 0
    farm.scaling.emptied(1)
    assert sorted(farm.all) == [0, 2]
    assert farm.told() == [(7.5, "done", -1)]
    farm.until(3600)
    assert farm.scaling.instance_hours() == pytest.approx(2 + 7.5 / 3600)


def test_nobody_has_to_say_that_it_is_empty() -> None:
    farm = Farm(a=2)
    farm.all[0].outstanding = farm.all[1].outstanding = 1
    farm.order("a", -1)
    farm.until(7.5)
    farm.all[1].outstanding = 0
    farm.until(9)
    assert sorted(farm.all) == [0]


def test_whoever_drains_already_goes_first_then_who_still_starts() -> None:
    farm = Farm(a=2)
    farm.all[0].outstanding, farm.all[1].outstanding = 0, 5
    farm.order("a", 1)
    farm.all[1].headroom_blocks = inf
    farm.order("a", -1)
    assert not farm.all[1].accepting
    farm.until(10)
    assert farm.order("a", -1) is None
    assert sorted(farm.all) == [0, 1], "the third was starting and is gone at once"
    assert farm.told() == [(10.0, "aborted", 1), (10.0, "done", -1)]
    farm.all[1].outstanding = 0
    farm.until(100)
    assert sorted(farm.all) == [0]
    assert farm.scaling.counters.called_off == 1
    assert farm.scaling.counters.started == 0


def test_who_is_to_go_is_called_back_before_another_starts() -> None:
    farm = Farm(a=2)
    farm.all[0].outstanding = farm.all[1].outstanding = 1
    farm.order("a", -1)
    farm.until(5)
    farm.order("a", 1)
    assert [facts.accepting for facts in farm.all.values()] == [True, True]
    assert farm.told() == [(5.0, "aborted", -1), (5.0, "done", 1)]
    farm.all[1].outstanding = 0
    farm.until(100)
    assert len(farm.all) == 2


def test_the_look_ends_with_the_load() -> None:
    farm = Farm(until_s=10.0, a=2)
    farm.all[0].outstanding = farm.all[1].outstanding = 1
    farm.order("a", -1)
    farm.kernel.run()
    assert farm.kernel.now_ns <= 11 * NS_PER_S


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(-3, 4), st.lists(st.integers(0, 2), max_size=6)), max_size=12)
)
@settings(max_examples=100, deadline=None)
def test_every_command_has_one_outcome_and_hours_add_up(
    orders: list[tuple[int, int, list[int]]],
) -> None:
    farm = Farm(a=2)
    given_commands = refused = 0
    now_s, paid_s = 0, 0
    for wait_s, delta, loads in sorted(orders, key=lambda order: order[0]):
        for second in range(now_s, wait_s):
            paid_s += len(farm.all)
            farm.until(second + 1)
        now_s = max(now_s, wait_s)
        for facts, outstanding in zip(farm.all.values(), loads, strict=False):
            facts.outstanding = outstanding if facts.accepting else 0
        given_commands += 1
        refused += farm.order("a", delta) is not None
        serving = [facts for facts in farm.facts_of("a") if facts.accepting]
        assert 1 <= len(farm.facts_of("a")) <= 10
        assert serving or farm.scaling.starting("a")
    for facts in farm.all.values():
        facts.outstanding = 0
    for second in range(now_s, now_s + 100):
        paid_s += len(farm.all)
        farm.until(second + 1)
    assert len(farm.told()) + refused == given_commands
    assert all(facts.accepting for facts in farm.all.values())
    assert farm.scaling.starting("a") == 0
    assert farm.scaling.counters.refused == refused
    assert farm.scaling.instance_hours() * 3600 == pytest.approx(paid_s, rel=1e-12)
