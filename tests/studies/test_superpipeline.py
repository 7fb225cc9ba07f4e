"""Points of the Superpipeline study: bytes and bits exactly, times in the right order only."""

from __future__ import annotations

import pytest

from megalith.studies.study import Case
from megalith.studies.superpipeline import STUDY
from megalith.studies.superpipeline_cases import curve, memory


def test_the_vision_model_keeps_its_bits_in_two_fifths_of_its_layers() -> None:
    found = memory({"model": 2.0, "arm": "window"})
    assert found["same"] == 1.0
    assert found["saved"] == pytest.approx(0.6, abs=0.02)


def test_a_point_of_the_curve_has_measured_and_predicted() -> None:
    (experiment,) = [one for one in STUDY.experiments if one.name == "whole"]
    task = experiment.task(Case("window", 4.0, 0, True))
    found = curve(task.options)  # type: ignore[union-attr]
    assert found["ratio"] == pytest.approx(1.0, abs=0.6), "neighbours may be loud"
    assert found["slower"] is not None
    assert found["slower"] > 1.2, "nothing overlaps from one window to the next, on a slow link"


def test_the_control_of_a_curve_is_measured_once() -> None:
    for name in ("inference", "whole", "fast-link"):
        (experiment,) = [one for one in STUDY.experiments if one.name == name]
        assert {repr(experiment.task(Case("resident", at, 0, True))) for at in experiment.at} == {
            repr(experiment.task(Case("resident", 2.0, 0, True)))
        }
