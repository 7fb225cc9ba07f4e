"""Load series: files, loads of our own, and the same load played as requests."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.specs.arrivals import CountedArrivals, arrival_times, arrivals_at
from megalith.specs.lengths import FixedLength
from megalith.specs.load_series import read_load_series, write_load_series
from megalith.specs.load_synthetic import LEVELS, SyntheticLoad, synthesize
from megalith.specs.workload import WorkloadSpec, open_workload

S = 10**9
GOOD = ["date,load,cpu", "2018-07-24 00:00:00,1.5,3", "2018-07-24 00:10:00,2,4", "2018-07-24 00:20:00,0,5"]


def file(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "load.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = synthesize(SyntheticLoad(steps=50), 3)
    write_load_series(tmp_path / "made.csv", made)
    back = read_load_series(tmp_path / "made.csv")
    assert back.names == made.names == tuple(LEVELS)
    assert (back.values == made.values).all()
    assert (back.start_s, back.step_s, back.target) == (made.start_s, 1800.0, made.target)


def test_times_and_columns(tmp_path: Path) -> None:
    series = read_load_series(file(tmp_path, *GOOD))
    assert (series.step_s, series.start_s % 86_400, list(series.load)) == (600.0, 0.0, [1.5, 2.0, 0.0])
    assert list(read_load_series(file(tmp_path, *GOOD), "cpu").load) == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "no column"),
        (["date,lod", "1,2", "2,3"], "Did you mean 'lod'"),
        (GOOD[:2], "1 rows"),
        ([*GOOD, "2018-07-24 00:50:00,1,2"], "Line 5 .* 1800 s after"),
        ([*GOOD[:3], "2018-07-24 00:20:00,,5"], "Line 4 .* '' in load"),
        ([*GOOD[:3], "2018-07-24 00:20:00,nan,5"], "Line 4"),
        ([*GOOD[:3], "2018-07-24 00:20:00,5"], "Line 4 .* 2 cells"),
        ([*GOOD[:3], "yesterday,5,6"], "'yesterday', which is no time"),
        (["date,load,load", "1,2,3", "2,3,4"], "same name"),
    ],
)
def test_what_is_broken_is_named_with_its_line(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_load_series(file(tmp_path, *lines))


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_load_series(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no CSV"):
        read_load_series(tmp_path / "binary.csv")


def test_a_seasonal_load_has_days_and_white_noise_has_no_memory() -> None:
    def memory(kind: str, lag: int) -> float:
        load = synthesize(SyntheticLoad(kind=kind, steps=4800), 1).load  # type: ignore[arg-type]
        return float(np.corrcoef(load[lag:], load[:-lag])[0, 1])

    assert memory("seasonal", 1) > 0.7
    assert memory("seasonal", 336) > 0.5  # a week
    assert abs(memory("white", 1)) < 0.06
    assert abs(memory("white", 48)) < 0.06


def test_no_indicator_of_white_noise_knows_what_comes() -> None:
    series = synthesize(SyntheticLoad(kind="white", steps=4800), 2)
    for name, column in zip(series.names, series.values.T, strict=True):
        assert abs(np.corrcoef(column[:-1], series.load[1:])[0, 1]) < 0.06, name


def test_a_load_is_a_pure_function_of_its_seed() -> None:
    first, again, other = (synthesize(SyntheticLoad(steps=100), seed) for seed in (4, 4, 5))
    assert (first.values == again.values).all()
    assert (first.values != other.values).any()
    requests = first.load * first.step_s
    assert np.allclose(requests, np.rint(requests))


COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any).map(tuple)


@given(COUNTS, st.integers(0, 9), st.integers(1, 50))
def test_every_step_gets_its_requests_however_they_are_drawn(counts: tuple[int, ...], seed: int, chunk: int) -> None:
    arrivals = CountedArrivals(step_s=2.0, counts=counts)
    times = list(arrival_times(arrivals, seed, chunk))
    assert times == list(arrival_times(arrivals, seed, 1024))
    assert all(before <= after for before, after in pairwise(times))
    assert np.histogram(times, np.arange(len(counts) + 1) * 2 * S)[0].tolist() == list(counts)


@given(COUNTS, st.floats(0.01, 30))
def test_another_rate_keeps_the_shape(counts: tuple[int, ...], rate: float) -> None:
    arrivals = CountedArrivals(step_s=2.0, counts=counts)
    if rate * 2 * len(counts) < 1:
        return
    other = arrivals_at(arrivals, rate)
    assert isinstance(other, CountedArrivals)
    ends = np.cumsum(counts) * rate / arrivals.rate_per_s
    assert (abs(np.cumsum(other.counts) - ends) <= 0.500001).all()


def test_a_workload_ends_with_its_counts() -> None:
    spec = WorkloadSpec(
        input=FixedLength(tokens=5),
        output=FixedLength(tokens=5),
        arrivals=CountedArrivals(step_s=1.0, counts=(3, 0, 2)),
    )
    assert not spec.endless
    assert [shape.at_ns is not None and shape.at_ns // S for shape in open_workload(spec)] == [0, 0, 0, 2, 2]


@pytest.mark.parametrize("counts", [(), (0, 0), (1, -1)])
def test_counts_that_cannot_be_played(counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        CountedArrivals(step_s=1.0, counts=counts)
