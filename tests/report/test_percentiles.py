"""Percentiles against the definition written out by counting, and against NumPy's `inverted_cdf`."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.report.percentiles import percentile, rank, summarize

SAMPLES = st.lists(st.integers(min_value=-(10**15), max_value=10**15), min_size=1, max_size=200)
PERCENTS = st.one_of(st.integers(0, 100), st.sampled_from([0.1, 12.5, 99.9, 99.99]))


@given(SAMPLES, PERCENTS)
def test_is_the_smallest_sample_with_that_share_at_or_below(samples: list[int], percent: float) -> None:
    value = percentile(sorted(samples), percent)
    share = Fraction(str(percent)) / 100
    assert value in samples
    assert sum(s <= value for s in samples) >= share * len(samples)
    lower = [s for s in set(samples) if s < value]
    assert all(sum(s <= candidate for s in samples) < share * len(samples) for candidate in lower)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300), st.sampled_from([0, 25, 50, 75, 100]))
def test_equals_numpy_where_the_share_is_exact_in_binary(samples: list[int], percent: int) -> None:
    expected = np.percentile(np.array(samples, dtype=np.int64), percent, method="inverted_cdf")
    assert percentile(sorted(samples), percent) == int(expected)


@given(SAMPLES)
def test_summary_against_numpy(samples: list[int]) -> None:
    got = summarize(samples)
    assert got is not None
    array = np.array(samples, dtype=np.float64)
    assert got.count == len(samples)
    assert (got.minimum, got.maximum) == (min(samples), max(samples))
    assert got.minimum <= got.p50 <= got.p90 <= got.p95 <= got.p99 <= got.maximum
    assert got.mean == pytest.approx(array.mean(), abs=0.51 + 1e-6 * abs(array).max())
    assert got.deviation == pytest.approx(array.std(), abs=1.0 + 1e-6 * abs(array).max())


def test_exact_where_floats_round_up() -> None:
    # 0.07 * 100 is 7.000000000000001 in binary: a float ceil would say the 8th.
    assert rank(100, 7) == 7
    assert rank(1000, 99.9) == 999


def test_refusals() -> None:
    assert summarize([]) is None
    with pytest.raises(ConfigError, match="between 0 and 100"):
        rank(3, 101)
    with pytest.raises(ConfigError, match="No sample"):
        percentile([], 50)
