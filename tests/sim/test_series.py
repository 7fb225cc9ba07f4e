"""Periodic samples: joined by pairs when they are too many, with means, energy and peaks kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.sim.series import FIGURES, InstanceSample, Series

S = 10**9


def row(instance: int, running: int, power_w: float = 0.0, used: float = 0.0) -> InstanceSample:
    return InstanceSample(instance, running, 2 * running, used, 1.0, 2.0, 0.5, power_w)


def test_rows_come_back_sorted() -> None:
    series = Series()
    series.add(S, [row(2, 5), row(0, 3)])
    series.add(3 * S, [row(0, 4, 100.0)])
    columns = series.columns()
    assert columns["time_ns"].tolist() == [S, S, 3 * S]
    assert columns["start_ns"].tolist() == [0, 0, S]
    assert columns["instance"].tolist() == [0, 2, 0]
    assert columns["running"].tolist() == [3, 5, 4]
    assert set(columns) == {"start_ns", "time_ns", "instance", *FIGURES}
    assert series.energy_j == 200
    assert series.cluster()["running"].tolist() == [8, 4]
    assert series.cluster()["busy_share"].tolist() == [0.5, 0.5]


@given(st.integers(1, 120), st.integers(1, 5), st.integers(8, 40))
def test_joining_keeps_means_energy_and_bounds(samples: int, instances: int, limit: int) -> None:
    """At every length: rows bounded, stretches cover the time, time-weighted means unchanged."""
    series = Series(most_rows=limit)
    table = np.zeros((samples, instances))
    for t in range(samples):
        table[t] = [(7 * t + 3 * i) % 11 for i in range(instances)]
        series.add((t + 1) * S, [row(i, int(table[t, i]), 10.0 * table[t, i]) for i in range(instances)])
    columns = series.columns()
    assert len(columns["time_ns"]) <= limit + 2 * instances
    for i in range(instances):
        here = columns["instance"] == i
        length = (columns["time_ns"] - columns["start_ns"])[here]
        assert length.sum() == samples * S
        assert (columns["start_ns"][here][1:] == columns["time_ns"][here][:-1]).all()
        assert (columns["running"][here] * length).sum() / length.sum() == pytest.approx(table[:, i].mean())
    assert series.mean("running") == pytest.approx(table.mean())
    assert series.energy_j == pytest.approx(10 * table.sum())
    assert series.peak_power_w == pytest.approx(10 * table.sum(axis=1).max())
    assert series.peak_waiting == 2 * table.sum(axis=1).max()


def test_an_instance_that_comes_late_is_averaged_over_its_own_time() -> None:
    series = Series(most_rows=8)
    for t in range(16):
        series.add((t + 1) * S, [row(0, 1), *([row(1, 6)] if t >= 9 else [])])
    columns = series.columns()
    late = columns["instance"] == 1
    assert set(columns["running"][late].tolist()) == {6.0}
    assert set(columns["running"][~late].tolist()) == {1.0}


def test_nothing_sampled_and_time_running_backwards() -> None:
    series = Series()
    series.add(S, [])
    assert len(series.columns()["time_ns"]) == 0
    assert len(series.cluster()["time_ns"]) == 0
    assert series.mean("power_w") is None
    with pytest.raises(ValueError, match="after one at"):
        series.add(0, [row(0, 1)])
