"""The machinery of studies: controls, verdicts, gates, resumption, failures, and what the page says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.report.table import Nature
from megalith.sim.scenario import Scenario
from megalith.sim.sweep import Point, PointResult, Store, run_point
from megalith.specs.fleet import FleetSpec, PoolSpec
from megalith.specs.workload_text import parse_workload
from megalith.studies import registry
from megalith.studies.page import Report, document, markdown, write
from megalith.studies.results import Results, read
from megalith.studies.run import run_study, timings
from megalith.studies.study import (
    Arm,
    Case,
    Claim,
    Computed,
    Experiment,
    Finding,
    Gate,
    Judgement,
    Picture,
    Simulated,
    Study,
    assess,
    overall,
    sentence,
)

ON, OFF = Arm("on", "on", "with it"), Arm("off", "off", "without it")
CLAIM = Claim("gain", "the gain", "a small set-up", 2.0, (1.8, 2.4))
called: list[float] = []


def square(options: Mapping[str, float]) -> dict[str, float | None]:
    """What a planner might answer."""
    called.append(options["at"])
    if options["at"] == 13:
        raise MachineError("No 13 here.", "Take 12.")
    return {"figure": options["at"] ** 2 * options["factor"]}


def computed(case: Case) -> Computed:
    factor = 2.0 if case.arm == "on" else 1.0
    return Computed(call=f"{__name__}:square", options={"at": case.at, "factor": factor, "seed": float(case.seed)})


def simulated(case: Case) -> Simulated:
    pool = PoolSpec(name="all", device="a10g", count=1, policy="splitfuse" if case.arm == "on" else "first-come")
    load = parse_workload(f"poisson:rate={case.at:g},input=64,output=8,requests=20")
    fleet = FleetSpec(pools=(pool,))
    return Simulated(
        scenario=Scenario(model="llama-2-7b", timer="llumnix-7b", fleet=fleet, workload=load, seed=case.seed)
    )


def judge(results: Results) -> Judgement:
    ours = results.middle_ratio("only", "on", "off", "figure", 2.0)
    gates = [Gate("gain", ours, 1.5, 2.5, "arithmetic")]
    picture = Picture(
        "gain", "Gain", "place", ratios={"gain": results.ratio("only", "on", "off", "figure")}, ylabel="gain"
    )
    return Judgement([Finding(CLAIM, ours, "8", "4")], gates, pictures=[picture])


def make(
    task: Callable[[Case], Simulated | Computed] = computed,
    at: tuple[float, ...] = (1.0, 2.0),
    nature: Nature = "predicted",
    arms: tuple[Arm, ...] = (ON, OFF),
    shown: Mapping[str, str] | None = None,
) -> Study:
    experiment = Experiment(
        "only", "Only one", arms, "place", at, task, 2, at[:1], nature=nature, shown=shown or {"figure": "figure"}
    )
    return Study(
        "small", "Small study", ("A test.",), "Nobody, 2026", (CLAIM,), (experiment,), judge, ("Everything differs.",)
    )


def report_of(study: Study, results: Results) -> Report:
    return Report(study, results, study.judge(results), timings(study, results))


def test_a_study_needs_a_control() -> None:
    with pytest.raises(ConfigError, match="no control"):
        make(arms=(ON, Arm("other", "baseline", "another system")))
    with pytest.raises(ConfigError, match="no claim"):
        Study("empty", "", (), "", (), (), judge, ())


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        (2.0, "reproduced"), (1.8, "reproduced"), (2.4, "reproduced"), (2.41, "exceeded"), (1.79, "partly"),
        (1.06, "partly"), (1.04, "not reproduced"), (0.96, "not reproduced"), (0.94, "goes against"),
        (None, "no result"), (float("nan"), "no result"), (float("inf"), "no result"),
    ],
)  # fmt: skip
def test_the_word_for_a_figure(ours: float | None, word: str) -> None:
    assert assess(CLAIM, ours) == word


@pytest.mark.parametrize(
    ("ours", "word"),
    [(-0.7, "reproduced"), (-0.9, "exceeded"), (-0.3, "partly"), (0.01, "not reproduced"), (0.2, "goes against")],
)
def test_a_claim_may_go_down(ours: float, word: str) -> None:
    """Such as 70 % fewer preemptions, where nothing is 0."""
    assert assess(Claim("loss", "loss", "", -0.7, (-0.8, -0.6), neutral=0.0), ours) == word


@pytest.mark.parametrize(
    ("figures", "word"),
    [
        ((2.0, 2.0), "reproduced"), ((2.0, 3.0), "reproduced"), ((2.0, 1.0), "partly"), ((1.0, 1.0), "not reproduced"),
        ((0.5, 0.5), "goes against"), ((0.5, 1.0), "goes against"), ((0.5, 2.0), "partly"), ((2.0, None), "no result"),
    ],
)  # fmt: skip
def test_the_verdict_on_several_claims(figures: tuple[float | None, ...], word: str) -> None:
    findings = [Finding(CLAIM, figure, "", "") for figure in figures]
    assert overall(findings) == word
    beside = Finding(CLAIM, 0.1, "", "", counts=False)
    assert overall([*findings, beside]) == word, "what does not count has no say"
    assert "goes against" not in sentence([findings[0], beside]) or figures[0] == 0.5


def test_a_gate_has_two_ends_and_needs_a_figure() -> None:
    gates = [Gate("", value, 1.0, 2.0, "") for value in (0.99, 1.0, 2.0, 2.01, None)]
    assert [gate.passed for gate in gates] == [False, True, True, False, False]


def test_points_come_by_place_arm_and_seed() -> None:
    study = make()
    called.clear()
    results = run_study(study)
    assert sorted(called) == [1.0] * 4 + [2.0] * 4
    assert results.curve("only", "on", "figure") == {1.0: [2.0, 2.0], 2.0: [8.0, 8.0]}
    assert results.ratio("only", "on", "off", "figure") == {1.0: [2.0, 2.0], 2.0: [2.0, 2.0]}
    assert (results.places("only"), results.seeds("only")) == ([1.0, 2.0], 2)
    assert run_study(study, fast=True).places("only") == [1.0]
    assert run_study(study, seeds=3).seeds("only") == 3


def test_ratios_are_taken_seed_by_seed() -> None:
    """The ratio of medians would be 1: ratios are of runs that had the same requests."""
    study = make()
    results = Results(study)
    for case in results.cases["only"]:
        value = {("on", 0): 2.0, ("on", 1): 30.0, ("off", 0): 1.0, ("off", 1): 10.0}[case.arm, case.seed]
        results.add("only", case, PointResult(key="", labels={}, figures={"figure": value}))
    assert results.ratio("only", "on", "off", "figure")[1.0] == [2.0, 3.0]
    assert results.middle_ratio("only", "on", "off", "figure", 1.0) == 2.5


def test_a_figure_that_does_not_exist_is_named() -> None:
    result = PointResult(key="", labels={}, figures={"share": 0.5, "tpot=1.25x@p50": 0.9}, preemptions=3)
    assert read(result, "tpot=1.25x@p50") == 0.9
    assert (read(result, "share"), read(result, "preemptions"), read(result, "ttft_ns.p99")) == (0.5, 3.0, None)
    with pytest.raises(ConfigError, match="share"):
        read(result, "shar")


def test_a_stored_point_is_not_run_again(tmp_path: Path) -> None:
    study, path = make(), tmp_path / "points.jsonl"
    called.clear()
    first = run_study(study, store=Store(path))
    again = run_study(study, store=Store(path))
    assert len(called) == 8
    assert again.curve("only", "on", "figure") == first.curve("only", "on", "figure")


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, path, ran = make(simulated, nature="simulated"), tmp_path / "points.jsonl", list[str]()

    def counted(point: Point) -> PointResult:
        ran.append(point.key)
        return run_point(point)

    def stop(_: int) -> None:
        if len(ran) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("megalith.studies.run.run_study_point", counted)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, store=Store(path), workers=1, done=stop)
    results = run_study(study, store=Store(path), workers=1)
    assert len(ran) == len(set(ran)) == 8
    assert results.curve("only", "on", "ttft_ns.p99").keys() == {1.0, 2.0}


def test_a_failed_point_is_told_kept_apart_and_tried_again(tmp_path: Path) -> None:
    study, path = make(at=(2.0, 13.0)), tmp_path / "points.jsonl"
    called.clear()
    for _ in range(2):
        results = run_study(study, store=Store(path))
        report = report_of(study, results)
        assert results.curve("only", "on", "figure").keys() == {2.0}
        assert len(results.failures) == 4
        assert "only, on at 13, seed 0: No 13 here. Take 12." in results.failures
        assert not report.passed
        assert "No 13 here" in markdown(report, [])
    assert called.count(13.0) == 8
    assert called.count(2.0) == 4


def test_a_measure_of_its_own_decides_the_key() -> None:
    from megalith.studies.run import StudyPoint

    scenario = simulated(Case("on", 1.0, 0, False)).scenario
    plain = StudyPoint(labels={}, scenario=scenario)
    measured = StudyPoint(labels={"any": "thing"}, scenario=scenario, measure="a:b")
    other = StudyPoint(labels={}, scenario=scenario, measure="a:b", options={"share": 0.5})
    assert len({plain.key, measured.key, other.key}) == 3
    assert measured.key == StudyPoint(labels={}, scenario=scenario, measure="a:b").key


def test_the_page_says_what_its_figures_are(tmp_path: Path) -> None:
    study = make()
    report = report_of(study, run_study(study))
    page = write(report, tmp_path).read_text()
    assert "ours (predicted)" in page
    assert "simulated" not in page
    assert "**reproduced**: the gain: 2x where 2x was published" in page
    assert "![Gain](small/gain.png)" in page
    assert (tmp_path / "small" / "gain.png").stat().st_size > 1000
    assert report.passed
    assert write(report_of(study, run_study(study)), tmp_path).read_text() == page, "the same results, the same page"


def test_a_simulated_page_names_its_timing() -> None:
    study = make(simulated, nature="simulated", shown={"P99 TTFT, s": "ttft_ns.p99"}, at=(1.0,))
    results = run_study(study, workers=1)
    report = Report(study, results, Judgement([], []), timings(study, results))
    page = markdown(report, [])
    assert "published model llumnix-7b" in page
    assert "P99 TTFT, s (simulated)" in page
    body = document(report)
    assert body["timing"] == list(report.timings)
    assert {row["arm"] for row in body["points"][0]["rows"]} == {"on", "off"}
    assert all(len(row["digest"]) > 10 for row in body["points"][0]["rows"])


@pytest.mark.parametrize("name", registry.STUDIES)
def test_every_study_is_whole(name: str) -> None:
    study = registry.study(name)
    assert study.name == name
    assert 4 <= len(study.summary) <= 6
    assert study.differences
    for experiment in study.experiments:
        fast, full = experiment.cases(fast=True), experiment.cases(fast=False)
        assert {case.arm for case in fast} == {case.arm for case in full} == {arm.name for arm in experiment.arms}
        assert {case.at for case in fast} <= {case.at for case in full}
        for case in (fast[0], full[-1]):
            assert experiment.task(case) == experiment.task(case)


def test_an_unknown_study_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'fastgen'"):
        registry.study("fastgn")
