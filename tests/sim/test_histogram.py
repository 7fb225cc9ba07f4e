"""The histogram against sorting, and progressions in closed form against values one by one."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.report.percentiles import percentile
from megalith.sim.histogram import RELATIVE_ERROR, Histogram, IntArray

# Every size of integer alike, and the edges of powers of two.
SIZES = st.integers(0, 62).flatmap(lambda bits: st.integers(0, 2**bits))
EDGES = st.integers(1, 62).flatmap(lambda bits: st.sampled_from([2**bits - 1, 2**bits, 2**bits + 1]))
VALUES = st.lists(st.one_of(SIZES, EDGES, st.just(2**63 - 1)), min_size=1, max_size=200)
ROWS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 5000), st.integers(0, 10**11)),
        st.one_of(st.integers(0, 50), st.integers(0, 10**7)),
        st.one_of(st.integers(0, 40), st.integers(0, 3000)),
        st.integers(0, 300),
    ),
    min_size=1,
    max_size=12,
)


def of(values: list[int], weights: list[int] | None = None) -> Histogram:
    histogram = Histogram()
    histogram.add(ints(values), None if weights is None else ints(weights))
    return histogram


def ints(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


@given(VALUES, st.sampled_from([0, 0.1, 10, 50, 90, 95, 99, 99.9, 100]))
def test_percentile_within_its_bound(values: list[int], percent: float) -> None:
    histogram = of(values)
    true = percentile(sorted(values), percent)
    assert abs(histogram.percentile(percent) - true) <= RELATIVE_ERROR * true
    assert min(values) <= histogram.percentile(percent) <= max(values)


@given(VALUES)
def test_count_sum_and_ends_are_exact(values: list[int]) -> None:
    histogram = of(values)
    assert (histogram.count, histogram.total) == (len(values), sum(values))
    assert (histogram.minimum, histogram.maximum) == (min(values), max(values))
    assert histogram.percentile(0) == min(values)
    assert histogram.percentile(100) == max(values)
    assert histogram.mean() == sum(values) / len(values)


@given(st.lists(st.integers(0, 2047), min_size=1, max_size=300), st.sampled_from([1, 33.3, 50, 99]))
def test_small_values_are_exact(values: list[int], percent: float) -> None:
    assert of(values).percentile(percent) == percentile(sorted(values), percent)


@given(st.lists(st.tuples(SIZES, st.integers(0, 9)), min_size=1, max_size=60))
def test_a_weight_is_as_many_samples(rows: list[tuple[int, int]]) -> None:
    weighted = of([v for v, _ in rows], [w for _, w in rows])
    plain = of([v for v, w in rows for _ in range(w)])
    assert weighted == plain


@given(VALUES, VALUES)
def test_merging_is_adding_both(left: list[int], right: list[int]) -> None:
    merged = of(left)
    merged.merge(of(right))
    assert merged == of(left + right) == of(right[::-1] + left)
    merged.merge(Histogram())
    assert merged == of(left + right)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_a_progression_is_its_values(rows: list[tuple[int, int, int, int]]) -> None:
    closed = Histogram()
    closed.add_progressions(*(ints([row[i] for row in rows]) for i in range(4)))
    values = [(a + j * d, w) for a, d, n, w in rows for j in range(n)]
    assert closed == of([v for v, _ in values], [w for _, w in values])


@given(st.integers(10**9, 10**11), st.integers(0, 10**7), st.integers(2, 3000), st.data())
def test_cutting_a_progression_changes_nothing(first: int, slope: int, steps: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, steps - 1))
    whole, parts = Histogram(), Histogram()
    whole.add_progressions(ints([first]), ints([slope]), ints([steps]), ints([7]))
    parts.add_progressions(ints([first]), ints([slope]), ints([cut]), ints([7]))
    parts.add_progressions(ints([first + cut * slope]), ints([slope]), ints([steps - cut]), ints([7]))
    assert whole == parts


def test_a_falling_progression() -> None:
    falling, rising = Histogram(), Histogram()
    falling.add_progressions(ints([50_000]), ints([-7]), ints([3000]), ints([2]))
    rising.add_progressions(ints([50_000 - 7 * 2999]), ints([7]), ints([3000]), ints([2]))
    assert falling == rising


def test_sums_beyond_64_bits_stay_exact() -> None:
    big = 2**62
    assert of([big] * 5, [3] * 5).total == 15 * big
    assert of([big, 1], [2**40, 1]).total == (big << 40) + 1
    progression = Histogram()
    progression.add_progressions(ints([2**50] * 3), ints([2**30] * 3), ints([5000] * 3), ints([1000] * 3))
    assert progression.total == 3000 * sum(2**50 + j * 2**30 for j in range(5000))


def test_large_batches_are_cut_and_agree() -> None:
    rng = np.random.default_rng(1)
    first, slope = rng.integers(10**9, 10**10, 3000), rng.integers(0, 10**7, 3000)
    steps, weights = rng.integers(1, 400, 3000), rng.integers(1, 64, 3000)
    closed = Histogram()
    closed.add_progressions(first, slope, steps, weights)
    row = np.repeat(np.arange(3000), steps)
    j = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps, steps)
    plain = Histogram()
    plain.add(first[row] + j * slope[row], weights[row])
    assert closed == plain


def test_size_is_fixed_and_a_copy_travels() -> None:
    histogram = of([0, 1, 10**9, 2**63 - 1])
    assert histogram._counts.nbytes <= 520_000
    copy = pickle.loads(pickle.dumps(histogram))
    assert copy == histogram
    assert len(pickle.dumps(histogram)) < 1000


@given(VALUES)
def test_cdf_rises_to_one(values: list[int]) -> None:
    histogram = of(values)
    points, shares = histogram.cdf(20)
    assert len(points) == len(shares) <= 20
    assert points == sorted(set(points))
    assert points[-1] == max(values)
    assert shares[-1] == 1
    for point, share in zip(points, shares, strict=True):
        assert sum(v <= point for v in values) == round(share * len(values))


@given(VALUES, SIZES)
def test_at_or_below_counts_its_own_bucket(values: list[int], limit: int) -> None:
    got = of(values).at_or_below(limit)
    assert sum(v <= limit for v in values) <= got <= sum(v <= limit * (1 + 2 * RELATIVE_ERROR) for v in values)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="No sample"):
        Histogram().percentile(50)
    with pytest.raises(ConfigError, match="between 0 and 100"):
        of([1]).percentile(101)
    with pytest.raises(ValueError, match="below zero"):
        of([-1])
    with pytest.raises(ValueError, match="a weight of -1"):
        of([1], [-1])
    assert Histogram().cdf() == ([], [])
    assert Histogram().at_or_below(5) == 0
