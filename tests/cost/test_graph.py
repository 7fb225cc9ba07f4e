"""Operator graphs: schedules against brute force and bounds, the checker against wrong ones."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.graph import WHOLE, Moment, Op, Schedule, check, critical_ps, occupancy, schedule, work_ps


@st.composite
def graphs(draw: st.DrawFn) -> list[Op]:
    ops: list[Op] = []
    for number in range(draw(st.integers(0, 9))):
        after = tuple(sorted(draw(st.sets(st.integers(0, number - 1), max_size=3)))) if number else ()
        share = draw(st.sampled_from([100, 300, 500, 700, WHOLE]))
        use = {"memory": share / WHOLE}
        ops.append(Op(f"op{number}", draw(st.sampled_from("abc")), draw(st.integers(0, 20)), after, share, use))
    return ops


@given(graphs())
@settings(max_examples=200)
def test_a_schedule_is_sound_and_between_its_bounds(ops: list[Op]) -> None:
    plan = schedule(ops)
    check(ops, plan)
    least = max([critical_ps(ops), *work_ps(ops).values()], default=0)
    assert least <= plan.makespan_ps <= sum(op.duration_ps for op in ops)
    assert plan == schedule(ops)


@given(graphs())
def test_no_place_is_idle_while_something_that_fits_waits_there(ops: list[Op]) -> None:
    plan = schedule(ops)
    for number, op in enumerate(ops):
        ready = max((plan.end_ps[before] for before in op.after), default=0)
        for moment in set(plan.end_ps) | {ready}:
            if ready <= moment < plan.start_ps[number]:
                taken = sum(
                    other.share
                    for other, start, end in zip(ops, plan.start_ps, plan.end_ps, strict=True)
                    if other.at == op.at and start <= moment < end
                )
                assert taken + op.share > WHOLE


def _serial(ops: list[Op], order: tuple[int, ...]) -> int:
    """Makespan when one operator after the other is put in as early as it goes, in this order, at whole places."""
    ends: dict[int, int] = {}
    free: dict[str, int] = {}
    for number in order:
        op = ops[number]
        begin = max([free.get(op.at, 0), *(ends[before] for before in op.after)])
        ends[number] = free[op.at] = begin + op.duration_ps
    return max(ends.values())


def test_a_flow_of_two_batches_over_two_devices_is_as_short_as_the_best_order() -> None:
    ops: list[Op] = []
    for batch in range(2):
        for stage in range(3):
            after = (len(ops) - 1,) if stage else ()
            ops.append(Op(f"{batch}.{stage}", "ab"[stage % 2], 5 if stage % 2 else 3, after))
    orders = [
        order
        for order in permutations(range(6))
        if all(order.index(before) < order.index(number) for number, op in enumerate(ops) for before in op.after)
    ]
    assert schedule(ops).makespan_ps == min(_serial(ops, order) for order in orders) == 16


def test_shares_of_one_place_run_side_by_side() -> None:
    ops = [
        Op("a", "gpu", 10, share=600, uses={"compute": 0.6}),
        Op("b", "gpu", 4, share=600),
        Op("c", "gpu", 6, share=400),
    ]
    plan = schedule(ops)
    assert plan.start_ps == (0, 10, 0)
    assert occupancy(ops, plan, "compute") == [Moment(0, 6, 0.6), Moment(6, 10, 0.6), Moment(10, 14, 0.0)]


def test_the_checker_finds_what_is_wrong() -> None:
    ops = [Op("a", "gpu", 10), Op("b", "gpu", 5, (0,))]
    check(ops, Schedule((0, 10), (10, 15)))
    with pytest.raises(ValueError, match="begins before 0"):
        check(ops, Schedule((0, 9), (10, 14)))
    with pytest.raises(ValueError, match="does not take"):
        check(ops, Schedule((0, 10), (10, 16)))
    with pytest.raises(ValueError, match=r"gpu is 2\.0000 times full"):
        check([Op("a", "gpu", 10), Op("b", "gpu", 5)], Schedule((0, 3), (10, 8)))
    loud = [Op("a", "gpu", 9, share=500, uses={"memory": 0.7}), Op("b", "gpu", 9, share=500, uses={"memory": 0.7})]
    with pytest.raises(ValueError, match=r"memory of gpu is 1\.4"):
        check(loud, schedule(loud))


@pytest.mark.parametrize(
    "op",
    [
        Op("x", "a", 1, (0,)),
        Op("x", "a", -1),
        Op("x", "a", 1, share=0),
        Op("x", "a", 1, share=1001),
        Op("x", "a", 1, (-1,)),
    ],
)
def test_a_graph_that_cannot_be_is_refused(op: Op) -> None:
    with pytest.raises(ConfigError):
        schedule([op])
