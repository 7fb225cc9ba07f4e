"""One fast gate for each system: a few seconds each, the mechanism on and off."""

from __future__ import annotations

import importlib.util

import pytest

from megalith.specs.published_roofline import published_tables
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


def test_llumnix() -> None:
    report = report_of("llumnix")
    assert_passed(report)
    # The control is the same dispatch: with nobody short of room there is nothing to gain.
    by_key = {finding.claim.key: finding for finding in report.judgement.findings}
    assert by_key["p99"].word in {"reproduced", "exceeded"}
    assert by_key["downtime"].word == "reproduced"
    assert by_key["preemptions"].ours is not None
    assert by_key["preemptions"].ours < -0.5


def test_splitwise() -> None:
    report = report_of("splitwise")
    assert_passed(report)
    assert report.verdict == "reproduced"
    cells = report.judgement.tables["cells"]
    broken = {row[1] for row in cells.rows if not row[3]}
    assert "Base-A100" in broken
    assert {"HA", "HHcap"}.isdisjoint(broken)


def test_genz() -> None:
    report = report_of("genz")
    assert_passed(report)
    assert report.natures == ["predicted"]
    assert report.verdict == "reproduced"
    # One roof alone misses by far where the other binds: a decode by its FLOPs, a dense prompt by its bytes.
    tables = list(published_tables())
    for name, roof in (("llama2-7b-decode", "compute"), ("llama2-7b-prefill", "memory")):
        alone = report.results.middle("layers", roof, "ms", tables.index(name))
        both = report.results.middle("layers", "both", "ms", tables.index(name))
        assert alone is not None
        assert both is not None
        assert alone < 0.5 * both


def test_long_context() -> None:
    report = report_of("long-context")
    assert_passed(report)
    assert report.natures == ["predicted"]
    words = {finding.claim.key: finding.word for finding in report.judgement.findings if finding.counts}
    assert words.pop("users-4k") == "partly", "the published 20 do not follow from the formula"
    assert words.pop("switch") == "exceeded", "bytes are counted, not GiB taken for GB"
    assert words.pop("source-prefill") == "partly", "most of a longer prefill has no KV in it"
    assert set(words.values()) == {"reproduced"}
    assert report.verdict == "partly"
    assert any("a100-80gb" in timing for timing in report.timings)


@pytest.mark.skipif(importlib.util.find_spec("highspy") is None, reason="highspy (extra `plan`) is not installed")
def test_melange() -> None:
    report = report_of("melange")
    assert_passed(report)
    by_note = {(finding.claim.key, finding.note): finding for finding in report.judgement.findings}
    words = {key: finding.word for (key, _), finding in by_note.items() if finding.counts}
    assert words["worked"] == "reproduced"
    # Which type is better is not as published, and knowing the size of a request is worth nothing in that.
    assert words["cells"] == "not reproduced"
    assert report.verdict == "partly"


def test_blockllm() -> None:
    report = report_of("blockllm")
    assert_passed(report)
    assert report.verdict == "partly"


def test_instinfer() -> None:
    report = report_of("instinfer")
    assert_passed(report)
    by_key = {finding.claim.key: finding for finding in report.judgement.findings if finding.counts}
    assert by_key["dense"].word == "partly", "two bandwidths are 2.0x, not 6.85x"
    assert by_key["simulated"].ours == pytest.approx(2.0, rel=0.05)
    assert report.verdict == "partly"
