"""EnergonAI's study, a few points: mechanisms gain, and nothing is gained where there is nothing to gain from."""

from __future__ import annotations

from tests.studies.test_fast import assert_passed, report_of


def test_energonai() -> None:
    report = report_of("energonai")
    assert_passed(report)
    by_key = {finding.claim.key: finding for finding in report.judgement.findings}
    assert by_key["tp"].ours is not None
    assert by_key["tp"].ours < -0.4
    assert by_key["tp-even"].ours == 0.0
    assert by_key["tp-even"].word == "not reproduced"
    assert by_key["pp"].word == "reproduced"
    assert sorted(report.natures) == ["predicted", "simulated"]
