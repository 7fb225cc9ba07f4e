"""Samples: exact while few, within the histogram's error when many, the same when put together from parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.report.percentiles import percentile
from megalith.sim.attainment import Attainment, Latencies
from megalith.sim.histogram import RELATIVE_ERROR
from megalith.sim.samples import Samples, rounded_mean
from megalith.specs.slo import parse_slo

VALUES = st.lists(st.integers(0, 10**12), min_size=1, max_size=60)


def of(values: list[int], limit: int = 50) -> Samples:
    samples = Samples(limit)
    for start in range(0, len(values), 7):
        samples.add(np.array(values[start : start + 7], dtype=np.int64))
    return samples


@given(VALUES, st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_are_within_the_error_that_is_told(values: list[int], percent: float) -> None:
    samples = of(values)
    true = percentile(sorted(values), percent)
    assert samples.error == (0 if len(values) <= 50 else RELATIVE_ERROR)
    assert abs(samples.percentile(percent) - true) <= samples.error * true


@given(VALUES, VALUES)
def test_merging_is_adding_both(left: list[int], right: list[int]) -> None:
    merged = of(left)
    merged.merge(of(right))
    assert merged.describe() == of(left + right).describe()


@given(VALUES)
def test_cdf_passes_through_the_samples(values: list[int]) -> None:
    samples = of(values)
    points, shares = samples.cdf(10)
    assert len(points) <= 10
    assert points == sorted(set(points))
    assert (points[-1], shares[-1]) == (max(values), 1.0)
    for point, share in zip(points, shares, strict=True):
        assert round(share * len(values)) == sum(value <= point for value in values)


def test_nothing_has_no_percentile() -> None:
    assert Samples().describe() is None
    assert Samples().cdf() == ([], [])
    with pytest.raises(ConfigError, match="No sample"):
        Samples().percentile(50)
    with pytest.raises(ConfigError, match="no sample 2 of 1"):
        of([5]).at_rank(2)
    assert rounded_mean(5, 2) == 3


def test_an_answer_of_one_token_has_no_tpot_to_keep() -> None:
    """Left out of a percentile of TPOT, good in a joint promise."""
    attainment = Attainment(parse_slo("tpot=10ns@p50,ttft=5ns,tpot=20ns,attain=1"))
    ones = np.ones(5, dtype=np.int64)
    good = attainment.add(Latencies(ones, np.array([-1, -1, -1, 10, 30]), ones), ones, ones)
    assert good.tolist() == [True, True, True, True, False]
    by_bound = {verdict.bound: verdict for verdict in attainment.figures().verdicts}
    assert by_bound["tpot=10ns@p50"].kept
    assert by_bound["tpot=10ns@p50"].share == 0.5
    assert by_bound["ttft=5ns,tpot=20ns,attain=1"].share == 0.8
