"""Borrowed layers: the formula against a walk through the layers, lines against steps, what stays of the weights."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.borrow import BUFFERS, BorrowingCostModel, BorrowingTimer, Loan, exposed_ps, layer_bytes, resident
from megalith.cost.compute import CostModel
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import from_device
from megalith.cost.timer import Prompt
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.specs import catalog

SPEC = catalog.model("opt-13b")
WEIGHTS = weight_bytes(SPEC, "bf16")
PROFILE = from_device(catalog.device("a100-80gb"))
COST = CostModel(SPEC, PROFILE, WEIGHTS)


def walk(compute_ps: int, layers: int, borrowed: list[int], fetch_ps: int) -> int:
    """Layer by layer: a fetch begins with the layer before it, and its layer begins when both are over."""
    now = begun_before = 0
    for layer in range(layers):
        ready = begun_before + fetch_ps if layer in borrowed else 0
        begin = max(now, ready)
        now, begun_before = begin + compute_ps, begin
    return now


@given(st.integers(2, 12), st.integers(1, 1000), st.integers(0, 3000), st.data())
def test_the_formula_is_a_walk_through_the_layers(layers: int, compute: int, fetch: int, data: st.DataObject) -> None:
    # The first layer is there: it was fetched in the step before.
    borrowed = data.draw(st.lists(st.integers(1, layers - 1), unique=True))
    expected = walk(compute, layers, borrowed, fetch)
    assert compute * layers + exposed_ps(compute * layers, layers, [Loan(len(borrowed), fetch)]) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 1500), st.integers(0, 40), st.integers(1, 10**10))
def test_lines_are_steps(decodes: int, context: int, layers: int, fetch: int) -> None:
    timer = BorrowingTimer(AnalyticTimer(COST), SPEC.num_layers, [Loan(layers, fetch)])
    line = timer.decode_line(decodes, decodes * context, context)
    for step in {0, 1, 17, 5000}:
        if step < line.steps:
            alone = timer.step_ps((), decodes, decodes * (context + step), context + step)
            assert line.first_ps + step * line.slope_ps == alone


def test_nothing_borrowed_changes_nothing() -> None:
    inner = AnalyticTimer(COST)
    timer = BorrowingTimer(inner, SPEC.num_layers, [Loan(0, 10**12)])
    assert timer.step_ps([Prompt(100, 0, True)], 3, 900, 400) == inner.step_ps([Prompt(100, 0, True)], 3, 900, 400)
    assert timer.decode_line(3, 900, 400) == inner.decode_line(3, 900, 400)
    assert resident(WEIGHTS, SPEC.num_layers, 0) == WEIGHTS


def test_a_straggler_waits_less_for_its_layers() -> None:
    fetch = AnalyticTimer(COST).step_ps((), 1, 100, 100) // SPEC.num_layers * 2
    timer = BorrowingTimer(AnalyticTimer(COST), SPEC.num_layers, [Loan(20, fetch)])
    slow = timer.scaled(3.0)
    assert slow.step_ps((), 1, 100, 100) == AnalyticTimer(COST).scaled(3.0).step_ps((), 1, 100, 100)
    assert timer.at_clock(0.5).step_ps((), 1, 100, 100) > timer.step_ps((), 1, 100, 100)
    assert timer.power_w() == AnalyticTimer(COST).power_w()


def test_the_cost_model_says_the_same() -> None:
    fetch = 5_000_000_000
    model = BorrowingCostModel(COST, [Loan(10, fetch)])
    plain = COST.decode_step(4, 500)
    waits = exposed_ps(plain.duration_ns * 1000, SPEC.num_layers, [Loan(10, fetch)])
    assert waits > 0
    assert model.decode_step(4, 500).duration_ns == plain.duration_ns + -(-waits // 1000)
    assert model.decode_step(4, 500).binding == "links"


@given(st.integers(0, 40))
def test_what_stays_and_what_is_lent_are_all(borrowed: int) -> None:
    stay = resident(WEIGHTS, SPEC.num_layers, borrowed)
    buffers = min(borrowed, BUFFERS) if borrowed else 0
    lent = layer_bytes(WEIGHTS, SPEC.num_layers) * (borrowed - buffers)
    assert abs(stay.layers + stay.vectors + lent - WEIGHTS.layers - WEIGHTS.vectors) <= 2 * SPEC.num_layers
    assert (stay.head, stay.tables) == (WEIGHTS.head, WEIGHTS.tables)


def test_more_layers_than_there_are_cannot_be_borrowed() -> None:
    with pytest.raises(ConfigError, match="at most 40"):
        resident(WEIGHTS, SPEC.num_layers, 41)


def test_no_link_no_loan() -> None:
    from megalith.cost.borrow import loans

    alone = msgspec.structs.replace(PROFILE, peer_bytes_per_s=0.0)
    with pytest.raises(ConfigError, match="No link"):
        loans(WEIGHTS, SPEC.num_layers, 1, alone, 4, 0, 25e9)
    peer, host = loans(WEIGHTS, SPEC.num_layers, 1, PROFILE, 4, 2, 25e9)
    assert (peer.layers, host.layers) == (4, 2)
    assert host.fetch_ps > peer.fetch_ps
