"""How probe and bench show what they found: units, medians over the reporting points only, coverage of the band."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from megalith.cli.bench import memory_table, step_table
from megalith.cli.main import run
from megalith.cli.probe import facts_table
from megalith.cost.profile import from_device
from megalith.engine.bench import BenchReport, BenchRow
from megalith.plan.machine import MachineFacts
from megalith.specs import catalog


def row(role: str, predicted_ns: int, measured_ns: int) -> BenchRow:
    return BenchRow(
        batch=1, context=2, prompt=0, role=role, predicted_ns=predicted_ns, low_ns=predicted_ns // 2,
        high_ns=2 * predicted_ns, measured_ns=measured_ns, median_ns=measured_ns, repetitions=3, binding="compute",
    )  # fmt: skip


def report() -> BenchReport:
    rows = (
        row("calibration", 100, 1_000_000), row("reporting", 110, 100), row("reporting", 80, 100),
        row("reporting", 100, 1000),
    )  # fmt: skip
    return BenchReport(
        model="m", runner="r", threads=1, clock="wall", machine="here", date="2026-01-01",
        profile=from_device(catalog.device("l4")), fitted=True, rows=rows,
        memory_predicted={"weights": 10, "margin": 1}, memory_measured={"weights": 12},
    )  # fmt: skip


def test_figures_are_of_the_reporting_points() -> None:
    assert report().median_error() == pytest.approx(0.2)
    assert report().coverage() == pytest.approx(2 / 3)
    table = step_table(report())
    assert len(table.rows) == 3
    assert "median error 20.0%, worst 90.0% over 3 points; 67% inside the band" in table.notes[0]
    assert {column.nature for column in table.columns} == {"given", "predicted", "measured"}


def test_memory_shows_both_columns() -> None:
    assert memory_table(report()).rows == [("weights", 10, 12), ("margin", 1, None)]


def test_a_report_survives_a_line_of_json() -> None:
    line = msgspec.json.encode(report())
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=BenchReport) == report()


def test_probe_units() -> None:
    figures = {"memory_read_1_bytes_per_s": 3 * 2.0**30, "x_flops_per_s": 5e10, "linear_native_macs_per_s": 2e9}
    facts = MachineFacts(machine="here", date="2026-01-01", threads=1, figures=figures)
    assert [cells[1] for cells in facts_table(facts).rows] == ["3.00 GiB/s", "50.0 GFLOP/s", "2.00 GMAC/s"]


def test_the_processor_clock_needs_one_thread(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))
    assert run(["bench", "--clock", "processor", "--threads", "2", "--json"]) == 2
    assert "--threads 1" in json.loads(capsys.readouterr().out)["error"]["hint"]
