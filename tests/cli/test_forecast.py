"""`megalith forecast`: from a CSV to a posterior that drives a simulated fleet, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalith.cli.main import run
from megalith.specs.load_series import write_load_series
from megalith.specs.load_synthetic import SyntheticLoad, synthesize

SMALL = ["--window", "8", "--horizon", "2", "--width", "8", "--epochs", "1", "--samples", "20"]


@pytest.fixture
def load(tmp_path: Path) -> Path:
    write_load_series(tmp_path / "load.csv", synthesize(SyntheticLoad(steps=160), 1))
    return tmp_path / "load.csv"


def test_it_trains_scores_and_hands_on_to_a_fleet(
    load: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, posterior, workload = (tmp_path / name for name in ("load.npz", "load.posterior", "load.toml"))
    words = ["forecast", str(load), *SMALL, "--model", str(model), "--posterior", str(posterior), "--json"]
    files = ["--workload", str(workload), "--input", "50", "--output", "200"]
    assert run([*words, *files]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = {row["forecast"]: row for row in said["scores"]["rows"]}
    assert rows["flow"]["crps"] > 0
    assert {"last value", "a day ago with its errors"} <= set(rows)
    before = posterior.read_bytes()
    assert run(words) == 0  # read, not trained again
    assert posterior.read_bytes() == before
    capsys.readouterr()
    rule = f"posterior-scaling:path={posterior}:capacity_per_s=0.01:start_s=60:max_count=9"
    fleet = ["--model", "llama-3.1-8b", "--fleet", "1xl4:seqs2:max_count=9:start_s=60"]
    assert run(["simulate", "--trace", str(workload), *fleet, "--controller", rule, "--json"]) == 0
    played = json.loads(capsys.readouterr().out)
    assert "posterior-scaling" in json.dumps(played)


def test_a_run_beyond_the_posterior_is_an_error(load: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    posterior = tmp_path / "load.posterior"
    assert run(["forecast", str(load), *SMALL, "--posterior", str(posterior)]) == 0
    rule = f"posterior-scaling:path={posterior}:period_s=3600"
    trace = "poisson:rate=0.001,input=5,output=5,duration=40h"
    words = ["simulate", "--trace", trace, "--model", "llama-3.1-8b", "--fleet", "1xl4", "--controller", rule]
    assert run(words) == 2
    assert "simulate no longer than it covers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--window", "500"], "rows; a window of 500"),
        (["--target", "laod"], "Did you mean 'load'"),
        (["--level", "cpu"], "NAME=LEVEL"),
        (["--width", "7"], "do not divide"),
        (["--samples", "1"], "--samples"),
    ],
)
def test_mistakes(load: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["forecast", str(load), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_model_of_other_options_is_refused(load: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["forecast", str(load), *SMALL, "--model", str(tmp_path / "m.npz")]
    assert run(words) == 0
    assert run([*words, "--gaussian"]) == 2
    assert "other options" in capsys.readouterr().err
