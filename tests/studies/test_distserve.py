"""The studies of DistServe and of Splitwise's designs: how figures are put together, and a few real points."""

from __future__ import annotations

import pytest

from megalith.sim.sweep import PointResult
from megalith.studies import distserve, splitwise_designs
from megalith.studies.distserve_cases import measure
from megalith.studies.results import Results
from megalith.studies.run import StudyPoint
from megalith.studies.study import Case, Simulated

RATES = {"2p1d": 3.0, "colocated": 2.0, "splitfuse-512": 2.5, "splitfuse-2048": 1.0, "prefill": 6.0, "decode": 12.0}


def filled(study_name: str = "figure1-vllm") -> Results:
    results = Results(distserve.STUDY, fast=True)
    for case in results.cases[study_name]:
        figures: dict[str, float | None] = {"per_device": RATES[case.arm], "residences": 12.0}
        results.add(study_name, case, PointResult(key="", labels={}, figures=figures))
    return results


def test_the_ideal_split_has_as_many_of_each_phase_as_match() -> None:
    """6 a second need 1/6 of a device, 12 need 1/12: together a quarter."""
    assert distserve.ideal(filled(), "figure1-vllm") == {40.0: [pytest.approx(4.0)], 100.0: [pytest.approx(4.0)]}


def test_gains_are_over_the_arm_that_they_name() -> None:
    results = filled()
    gain = {chunked: distserve.gains(results, "figure1-vllm", chunked=chunked)[40.0] for chunked in (False, True)}
    assert gain == {False: [pytest.approx(2.0)], True: [pytest.approx(1.6)]}
    assert distserve.gains(results, "figure1-vllm", "2p1d")[40.0] == [pytest.approx(1.5)]


@pytest.mark.parametrize(
    ("curve", "limit"),
    [
        ({40.0: [2.0], 80.0: [1.0]}, 80.0),
        ({40.0: [1.5, 1.4, 9.0], 60.0: [0.5]}, 50.0),
        ({40.0: [2.0], 80.0: [1.2]}, None),
        ({40.0: [0.8], 80.0: [0.7]}, None),
        ({}, None),
    ],
)
def test_where_a_gain_is_gone(curve: dict[float, list[float]], limit: float | None) -> None:
    assert distserve.crossover(curve) == (None if limit is None else pytest.approx(limit))


def test_an_arm_without_any_goodput_gives_no_ratio() -> None:
    results = Results(distserve.STUDY, fast=True)
    for case in results.cases["figure1-vllm"]:
        rate = 0.0 if case.arm == "colocated" else 1.0
        results.add("figure1-vllm", case, PointResult(key="", labels={}, figures={"per_device": rate}))
    assert distserve.gains(results, "figure1-vllm", "2p1d") == {}


def test_a_phase_alone_does_not_hang_on_the_limit_of_the_other() -> None:
    """So it is measured once for all limits."""
    experiment = distserve.STUDY.experiments[0]
    tasks = [experiment.task(Case("prefill", at, 0, True)) for at in (40.0, 100.0)]
    assert tasks[0] == tasks[1]


def test_a_point_is_a_goodput_a_device() -> None:
    task = distserve.STUDY.experiments[0].task(Case("2p1d", 40.0, 0, True))
    assert isinstance(task, Simulated)
    options: dict[str, float | str] = {"step": 1.3, "least": 100, "residences": 0.0}
    found = measure(StudyPoint(labels={}, scenario=task.scenario, options=options)).figures
    assert found["per_device"] == pytest.approx((found["rate"] or 0) / 3)
    assert 2.0 < (found["per_device"] or 0) < 5.0


def test_designs_spend_the_same_power_whatever_their_split() -> None:
    for arm in splitwise_designs.KINDS:
        powers = [splitwise_designs.mix(arm, share).power for share in splitwise_designs.SHARES["artifact"]]
        assert max(powers) <= splitwise_designs.POWER
        assert min(powers) > splitwise_designs.POWER - 50


def test_machines_that_do_both_are_the_same_at_every_split() -> None:
    tasks = [splitwise_designs.STUDY.experiments[0].task(Case("Base-H100", at, 0, True)) for at in (30.0, 60.0)]
    assert tasks[0] == tasks[1]
