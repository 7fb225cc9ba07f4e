"""The study's points, small: what an instance alone cannot serve, and nothing to gain without skew."""

from __future__ import annotations

import msgspec

from megalith.sim.sweep import Point, PointResult
from megalith.studies import infinite_llm
from megalith.studies.study import Case, Simulated


def run(task: Simulated, requests: int | None = None) -> PointResult:
    scenario = task.scenario
    if requests is not None:
        load = msgspec.structs.replace(scenario.workload, requests=requests)
        scenario = msgspec.structs.replace(scenario, workload=load)
    return infinite_llm.measure(Point(labels={}, scenario=scenario))


def test_longer_than_an_instance_is_served_only_where_memory_is_pooled() -> None:
    served = {
        arm: run(infinite_llm._beyond(Case(arm, 1.2, 0, True)), 1).figures["served_share"]
        for arm in ("pooled", "alone", "single")
    }
    assert served == {"pooled": 1.0, "alone": 0.0, "single": 1.0}


def test_without_skew_nothing_is_gained() -> None:
    on, off = (run(infinite_llm._skew(Case(arm, 1000.0, 0, True)), 100) for arm in ("pooled", "alone"))
    assert on.figures["tokens_per_s"] == off.figures["tokens_per_s"]
    assert on.figures["moves"] == 0
    assert on.figures["overcommitted"] == 0
