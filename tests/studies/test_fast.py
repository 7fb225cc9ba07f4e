"""One fast gate for each system: a few seconds each, the mechanism on and off."""

from __future__ import annotations

from megalith.studies.page import Report
from megalith.studies.registry import study
from megalith.studies.run import run_study, timings


def report_of(name: str) -> Report:
    found = study(name)
    results = run_study(found, fast=True, workers=1)
    return Report(found, results, found.judge(results), timings(found, results))


def assert_passed(report: Report) -> None:
    assert report.results.failures == []
    assert [gate for gate in report.judgement.gates if not gate.passed] == []


def test_fastgen() -> None:
    report = report_of("fastgen")
    assert_passed(report)
    # With the mechanism off nothing is left of its gain: whole prompts in the same engine stall as they did.
    words = {finding.claim.key: finding.word for finding in report.judgement.findings if finding.counts}
    assert words == {"p95": "reproduced", "effective": "partly", "rate": "not reproduced"}
    assert report.verdict == "partly"
