"""The guide to simulating: what it tells a person to type works, on a shorter load."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from megalith.sim.tables import INSTANCE_COLUMNS, REQUEST_COLUMNS
from tests.cli.command import COMMAND, environment, megalith

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "simulating.md").read_text(encoding="utf-8")
LINES = [
    line.strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def arguments(line: str) -> list[str]:
    """Of one command line of the guide, on so few requests that a test can afford it."""
    words = shlex.split(line)
    assert words.pop(0) == "megalith"
    if words[0] == "plan":
        return [*words, "--predict-only"]
    if "--requests" in words:
        words[words.index("--requests") + 1] = "40"
        return words
    return [*words, "--requests", "40"]


def run(line: str, folder: Path) -> str:
    """What it prints."""
    import subprocess

    done = subprocess.run(
        [*COMMAND, *arguments(line)], cwd=folder, capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line.split()[1:3]))
def test_a_command_of_the_guide_runs(line: str, tmp_path: Path) -> None:
    if "--mix" in line and importlib.util.find_spec("highspy") is None:
        pytest.skip("highspy (extra `plan`) is not installed")
    (tmp_path / "fleet.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])
    out = run(line, tmp_path)
    assert re.search(r"simulated|predicted", out)
    if "--parquet" in line:
        again = megalith("simulate", "--config", str(tmp_path / "run" / "scenario.json"), "--json")
        assert json.loads(again.stdout)["digest"] in out
        names = {path.name for path in tmp_path.iterdir()}
        assert {"run", "latencies.png", "latencies-occupancy.png", "latencies-power.png", "run.json.gz"} <= names


def test_the_guide_names_every_column() -> None:
    for column in (*REQUEST_COLUMNS, *INSTANCE_COLUMNS):
        assert f"`{column.name}`" in PAGE


def test_there_are_commands_of_all_three_verbs() -> None:
    assert {tuple(line.split()[1:2]) for line in LINES} == {("simulate",), ("sweep",), ("plan",)}
