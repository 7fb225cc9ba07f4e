"""The files of a run hold what the recorder counted."""

from pathlib import Path

import numpy as np
import pytest

from megalith.report.parquet import read_parquet
from megalith.report.percentiles import percentile
from megalith.sim.record import Recorder
from megalith.sim.series import InstanceSample, Series
from megalith.sim.tables import RequestTable, write_series
from tests.sim.test_record import draw

pytest.importorskip("duckdb")


def test_requests_in_the_file_give_the_figures_of_the_report(tmp_path: Path) -> None:
    table = RequestTable(tmp_path / "requests.parquet", {"seed": "7"})
    recorder = Recorder(sink=table)
    lives = draw(5000)
    for one in lives[::50]:
        one.outcome, one.first_ns, one.scheduled_ns, one.finish_ns = "rejected", -1, -1, -1
    for one in lives:
        recorder.finished(one)
    figures = recorder.figures()
    assert table.close() == 5000
    found = read_parquet(tmp_path / "requests.parquet")
    assert (found["outcome"] == "rejected").sum() == figures.rejected == 100
    for name in ("ttft_ns", "tpot_ns", "e2e_ns"):
        samples = np.ma.compressed(found[name]).tolist()
        got = figures.latencies[name]
        assert got is not None
        assert (len(samples), percentile(sorted(samples), 99)) == (got.count, got.p99)
    assert np.ma.getmaskarray(found["finish_ns"]).sum() == 100
    assert np.ma.getmaskarray(found["decode_instance"]).all()


def test_the_series_in_the_file(tmp_path: Path) -> None:
    series = Series()
    for t in range(1, 5):
        series.add(t * 10**9, [InstanceSample(i, t, i, 0.5, 1.0, 2.0, 0.25, 300.0) for i in range(3)])
    assert write_series(tmp_path / "instances.parquet", series, {}) == 12
    found = read_parquet(tmp_path / "instances.parquet")
    assert found["running"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert found["power_w"].sum() == 3600


def test_a_run_that_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    table = RequestTable(tmp_path / "requests.parquet", {})
    recorder = Recorder(sink=table)
    for one in draw(3000):
        recorder.finished(one)
    table.discard()
    assert list(tmp_path.iterdir()) == []
