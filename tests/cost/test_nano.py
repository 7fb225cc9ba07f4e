"""Nano-batch pipelines: dependencies, resources, steady state against whole models, and the control."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.graph import WHOLE, check, schedule, work_ps
from megalith.cost.lowering import StepWork, layer_costs, sequential
from megalith.cost.nano import Cuts, Enough, Order, Pipeline, cut, dependencies, frame, layers_ps, operators
from megalith.cost.nano_choice import candidate_cuts, choose, orders
from megalith.cost.timer import Prompt
from megalith.cost.timer_choice import choose_timer

COSTS = layer_costs(choose_timer("analytic", "llama-2-70b", "a100-80gb", 8))
WORK = StepWork(1024, 1024 * 768, (Prompt(512, 0, True), Prompt(512, 0, True)))
ENOUGH = Enough()
SHARES = st.sampled_from([100, 200, 400, 600, 800, WHOLE])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 7),
    st.integers(0, 3),
    st.lists(SHARES, min_size=40, max_size=40),
    st.sampled_from([(400, 200), (200, 100), (1000, 1000)]),
)
def test_no_resource_is_ever_above_one(which: int, order: int, shares: list[int], enough: tuple[int, int]) -> None:
    """Whatever the shares: bandwidth and links are not handed out twice."""
    found = candidate_cuts(WORK.rows)
    cuts = found[which % len(found)]
    parts = cut(COSTS, WORK, cuts)
    ways = orders(parts, cuts)
    pipeline = Pipeline(parts, ways[order % len(ways)], tuple(shares[: len(parts)]))
    ops = operators(pipeline, frame(parts, pipeline.order, 3), Enough(*enough))
    plan = schedule(ops)
    check(ops, plan)  # raises for a place or resource above 1
    assert plan.makespan_ps >= max(work_ps(ops).values())


def test_every_range_waits_for_all_that_overlaps_it() -> None:
    cuts = Cuts((0, 256, 640, 1408, 2048), (0, 640, 2048))
    parts = cut(COSTS, WORK, cuts)
    within, across = dependencies(parts)
    for number, piece in enumerate(parts):
        before = [parts[each] for each in (*within[number], *across[number])]
        if piece.kind == "o":
            rows = {row for each in before for row in range(*each.rows)}
            assert rows >= set(range(*piece.rows))
        if piece.kind == "prefill":
            # Later prompt rows read the keys of earlier ones, so of all ranges that have prompt rows up to them.
            assert min(each.rows[0] for each in before) <= 1024 < piece.rows[1] <= max(each.rows[1] for each in before)
        assert bool(across[number]) == (piece.kind == "kqv")


def test_what_a_few_layers_say_is_what_the_whole_model_takes() -> None:
    best = choose(COSTS, WORK)
    assert best.pipeline is not None
    whole = frame(best.pipeline.parts, best.pipeline.order, 80)
    ops = operators(best.pipeline, whole, ENOUGH)
    plan = schedule(ops)
    check(ops, plan)
    assert plan.makespan_ps == pytest.approx(best.layers_ps, rel=2e-3)
    assert max(work_ps(ops).values()) <= plan.makespan_ps


def test_overlap_gains_and_without_it_nothing_is_left() -> None:
    """The control: the same nano-batches one at a time are slower than none, so then the answer is not to split."""
    both, links, none = (choose(COSTS, WORK, overlap=overlap) for overlap in ("both", "link", "none"))
    assert 1.05 < both.sequential_ps / both.layers_ps < 1.3
    assert both.layers_ps < links.layers_ps < links.sequential_ps
    assert none.pipeline is None
    assert none.layers_ps == none.sequential_ps
    assert both.unoverlapped_ps > both.sequential_ps


def test_where_everything_needs_the_whole_device_there_is_nothing_to_gain() -> None:
    assert choose(COSTS, WORK, Enough(WHOLE, WHOLE)).saving_ps == 0


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1500), st.integers(0, 4_000), st.integers(0, 1500))
def test_never_slower_than_sequential_nor_faster_than_the_work(decodes: int, context: int, rows: int) -> None:
    if not decodes and not rows:
        return
    work = StepWork(decodes, decodes * context, (Prompt(rows, 0, True),) if rows else ())
    found = choose(COSTS, work, keep=1)
    plain = sum(piece.duration_ps for piece in sequential(COSTS, work)) * 80
    assert found.layers_ps <= found.sequential_ps == plain
    best = {"memory": 0.4, "reduce": 0.2}
    least = sum(
        piece.duration_ps * (best["memory"] if piece.kind == "decode" else best["reduce"] if piece.link_ps else 1.0)
        for piece in sequential(COSTS, work)
    )
    assert found.layers_ps >= 0.999 * least * 80


def test_small_steps_are_not_split() -> None:
    assert candidate_cuts(200) == []
    assert choose(COSTS, StepWork(200, 200 * 500)).pipeline is None


def test_an_order_that_cannot_be() -> None:
    cuts = candidate_cuts(WORK.rows)[0]
    parts = cut(COSTS, WORK, cuts)
    order = orders(parts, cuts)[0]
    with pytest.raises(ConfigError, match="not every operator"):
        frame(parts, order._replace(memory=()), 2)
    with pytest.raises(ConfigError, match="waits for itself"):
        frame(parts, Order(tuple(reversed(order.compute)), order.memory, order.link), 2)


def test_few_layers_are_scheduled_whole() -> None:
    parts = cut(COSTS, WORK, candidate_cuts(WORK.rows)[0])
    order = orders(parts, candidate_cuts(WORK.rows)[0])[0]
    pipeline = Pipeline(parts, order, (WHOLE,) * len(parts))
    assert layers_ps(pipeline, frame(parts, order, 3), ENOUGH, 3)[0] >= sum(piece.duration_ps for piece in parts)
