"""The Mélange study's own figures: arms, replays and published cells."""

from __future__ import annotations

import importlib.util
from math import inf
from typing import Any

import pytest

from megalith.studies import melange_cases as cases

needs_solver = pytest.mark.skipif(
    importlib.util.find_spec("highspy") is None, reason="highspy (extra `plan`) is not installed"
)


def options(**more: float | str) -> dict[str, float | str]:
    return {"arm": "sizes", "load": "lmsys", "tpot_ms": 120.0, "rate": 64.0, "seed": 0, **more}


@needs_solver
@pytest.mark.parametrize("tpot_ms", [40.0, 120.0])
def test_no_arm_is_cheaper_than_one_that_may_do_more(tpot_ms: float) -> None:
    cost = {
        arm: cases.cost(options(arm=arm, tpot_ms=tpot_ms))["cost"] or inf
        for arm in ("uncut", "sizes", "prompt", "single", *cases.DEVICES)
    }
    assert cost["uncut"] <= cost["sizes"] + 1e-9
    assert cost["sizes"] <= cost["single"] + 1e-9
    assert cost["prompt"] <= cost["single"] + 1e-9
    assert cost["single"] == min(cost[device] for device in cases.DEVICES)
    assert (cost["l4"] == inf) == (tpot_ms == 40.0), "a lone decode on L4 takes 59 ms"


@needs_solver
def test_a_replay_that_breaks_is_bought_larger_until_it_keeps() -> None:
    small = options(rate=2.0, tpot_ms=40.0, requests=1000, keep=0.95)
    found = cases.replay(small)
    assert found["within"] is not None
    assert found["within"] < 0.95
    assert found["kept_cost"] is not None
    assert found["cost"] is not None
    assert found["kept_cost"] > found["cost"]
    assert (found["kept_factor"] or 0) > 1
    assert cases.replay(options(arm="l4", rate=32.0, tpot_ms=40.0, requests=1500, keep=0.95))["cost"] is None


@needs_solver
def test_the_worked_example_depends_on_slices() -> None:
    costs = {slices: cases.worked({"arm": "sizes", "slices": slices})["cost"] for slices in (0.0, 1.0, 8.0, 12.0)}
    assert [round(cost or 0, 2) for cost in costs.values()] == [8.35, 11.01, 9.36, 8.35]
    alone: dict[str, Any] = cases.worked({"arm": "single", "slices": 0.0})
    assert (alone["n_a100-80gb"], alone["n_a10g"], round(alone["cost"], 2)) == (3.0, 0.0, 11.01)


def test_host_time_helps_the_slow_device_and_nothing_else_is_assumed() -> None:
    plain, slow = (cases.cells({"arm": "sizes", "host_ms": host})["agreement"] for host in (0.0, 40.0))
    assert plain is not None
    assert slow is not None
    assert plain == pytest.approx(16 / 28)
    assert plain < slow < 0.8, "not even that gives what was published"
    assert cases.advantage(25, 25, 40.0) > cases.advantage(25, 25) > cases.advantage(2000, 2000)


def test_the_published_table_is_whole() -> None:
    assert [len(row) for row in cases.PUBLISHED] == [len(cases.SIZES)] * len(cases.SIZES)
    assert sum(abs(cell) > cases.UNDECIDED for row in cases.PUBLISHED for cell in row) == 28


@needs_solver
def test_greedy_is_not_the_optimum() -> None:
    ratios = [cases.exact({"arm": "single", "case": float(case)})["over"] or 0 for case in range(20)]
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) > 1.1
