"""The study of HARMONY: hours at equal violation, scenarios of every rule, and the capacities that decide."""

from __future__ import annotations

import pytest

from megalith.sim.sweep import PointResult
from megalith.studies import harmony, harmony_month
from megalith.studies.results import Results
from megalith.studies.study import Case


def results(points: dict[str, list[tuple[float, float]]]) -> Results:
    found = Results(harmony.STUDY, fast=True)
    for arm, settings in points.items():
        for at, (hours, violation) in zip(found.places("month"), settings, strict=True):
            figures: dict[str, float | None] = {"gpu_hours": hours, "violation": violation}
            found.add("month", Case(arm, at, 0, True), PointResult(key="", labels={}, figures=figures))
    return found


def test_hours_are_read_on_a_line_over_the_logarithm() -> None:
    found = results(
        {"harmony": [(100, 0.1), (150, 0.001), (200, 0.0001)], "target": [(160, 0.1), (240, 0.001), (300, 0)]}
    )
    assert harmony.hours_at(found, "month", "harmony", 0, 0.01) == pytest.approx(125)
    assert harmony.hours_at(found, "month", "target", 0, 0.01) == pytest.approx(200)
    assert harmony.ratios(found, "month", "target", "harmony", 0.01) == pytest.approx([1.6])
    assert harmony.hours_at(found, "month", "harmony", 0, 0.2) is None
    assert harmony.hours_at(found, "month", "harmony", 0, 0.00001) is None


def test_a_setting_that_costs_more_and_misses_more_does_not_count() -> None:
    found = results({"harmony": [(100, 0.1), (140, 0.2), (150, 0.001)]})
    assert harmony.hours_at(found, "month", "harmony", 0, 0.01) == pytest.approx(125)


def test_every_rule_has_as_many_settings_and_plays_the_same_requests() -> None:
    assert {len(knobs) for knobs in harmony_month.KNOBS.values()} == {len(harmony.SETTINGS)}
    loads = {
        harmony_month.scenario(arm, "seasonal", 1, 0, True).workload.arrivals for arm in ("harmony", "target", "peak")
    }
    assert len(loads) == 1


def test_a_small_fleet_carries_less_than_its_share_of_a_large_one() -> None:
    """Pooling: what is measured is not a straight line through zero."""
    one, four = (harmony_month._capacity(count, 0.1) for count in (1, 4))
    assert 4 * one < four
