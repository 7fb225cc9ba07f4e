"""Token times from steps: they add up, and their percentiles are those of the simulator's own gaps."""

from __future__ import annotations

import numpy as np
import pytest

from megalith.sim.run import simulate
from megalith.studies.fastgen import OFF, ON, scenario
from megalith.studies.study import Case
from megalith.studies.token_times import TokenClock, largest_average


@pytest.mark.parametrize("arm", [ON, OFF])
def test_gaps_are_those_of_the_run(arm: object) -> None:
    clock = TokenClock()
    result = simulate(scenario(Case(arm.name, 8.0, 1, True), 700, 40, 8), recorder=clock)  # type: ignore[attr-defined]
    answers = clock.answers()
    assert len(answers) == result.figures.finished == 300
    gaps = np.concatenate([answer.gaps_s for answer in answers])
    shown = result.figures.latencies["itl_ns"]
    assert shown is not None
    assert len(gaps) == shown.count
    assert gaps.mean() == pytest.approx(shown.mean / 1e9, rel=1e-5)
    for percent, told in ((50, shown.p50), (95, shown.p95), (99, shown.p99)):
        assert np.percentile(gaps, percent, method="inverted_cdf") == pytest.approx(told / 1e9, rel=1e-3)
    assert gaps.max() == pytest.approx(shown.maximum / 1e9, rel=1e-5)


def test_the_running_average_is_that_of_pandas() -> None:
    """pandas.Series([1, 3, 2, 8]).ewm(span=16).mean() has its maximum at the end."""
    gaps = np.array([1.0, 3.0, 2.0, 8.0])
    keep = 15 / 17
    weights = keep ** np.arange(3, -1, -1)
    assert largest_average(gaps, 16) == pytest.approx(float((weights * gaps).sum() / weights.sum()))
    assert largest_average(gaps[::-1], 16) == 8.0
    assert largest_average(np.array([]), 16) == 0.0
