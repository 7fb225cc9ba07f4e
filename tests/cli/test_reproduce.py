"""`megalith reproduce`: the list, names, a fast run, Ctrl-C and going on."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from megalith.cli.main import run
from megalith.studies.registry import STUDIES

from .command import megalith, start


def test_the_list_has_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in STUDIES)
    assert run(["reproduce", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["studies"]["rows"]
    assert [row["name"] for row in rows] == list(STUDIES)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fastgn"], "Did you mean 'fastgen'"),
        ([], "needs the name of a study"),
        (["fastgen", "--all"], "needs the name of a study"),
        (["fastgen", "--seeds", "0"], "--seeds is 0"),
        (["fastgen", "--workers", "0"], "--workers is 0"),
        (["fastgen", "--quick"], "no flag `--quick`"),
    ],
)
def test_what_cannot_be_run_says_why(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_expected_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(["reproduce", "fastgen", "--fast", "--out", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_ctrl_c_keeps_what_has_ended_and_the_next_run_goes_on(tmp_path: Path) -> None:
    points = tmp_path / "fastgen" / "points.jsonl"
    process = start("reproduce", "fastgen", "--out", str(tmp_path), "--workers", "1")
    deadline = time.monotonic() + 60
    while not points.exists() or points.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    kept = points.read_bytes()

    whole = megalith("reproduce", "fastgen", "--fast", "--json", "--out", str(tmp_path))
    report = json.loads(whole.stdout)
    assert whole.returncode == 0, whole.stderr
    assert points.read_bytes().startswith(kept)
    assert report["nature"] == ["simulated"]
    assert report["passed"] is True
    assert report["verdict"] == "partly"
    assert "fastgen-70b" in report["timing"][0]
    page = (tmp_path / "fastgen.md").read_text()
    assert "ours (simulated)" in page
    assert (tmp_path / "fastgen" / "p95.png").exists()

    again = megalith("reproduce", "fastgen", "--fast", "--out", str(tmp_path))
    assert again.returncode == 0
    assert "Verdict: partly" in again.stdout
    assert (tmp_path / "fastgen.md").read_text() == page
