"""`megalith plan serve`: the golden text of a plan that does not fit, JSON, exit codes and messages."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megalith.cli.main import run

GOLDEN = Path(__file__).parent.parent / "golden" / "plan_llama-3.1-70b_h100.txt"


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))


def test_golden_of_a_plan_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """When a formula or constant changes on purpose, look at the difference and store the new text."""
    assert run(["plan", "serve", "llama-3.1-70b", "--device", "h100", "--batch", "4"]) == 1
    text = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_json_carries_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = shlex.split("plan serve llama-3.1-8b --device a100 --memory 40GiB --batch 8 --context 2048 --json")
    assert run(tokens) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["limit_bytes"] == 40 << 30
    assert plan["parameters"] == 8_030_261_248
    assert plan["kv_bytes_per_token"] == 131_072
    assert {point["batch"] for point in plan["points"]} >= {1, 2, 4, 8}
    assert plan["points"][0]["joules_per_token"]["low"] < plan["points"][0]["joules_per_token"]["high"]


def test_here_is_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split("plan serve smollm2-1.7b --format q4_1 --memory 4GiB --context 2048")) == 0
    out = capsys.readouterr().out
    assert "fits" in out
    assert "run `megalith probe`" in out


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("plan serve lama-3.1-8b --device h100", "llama-3.1-8b"),
        ("plan serve llama-3.1-8b --device h101", "h100"),
        ("plan serve llama-3.1-8b --device h100 --memory 4Gig", "4GiB"),
        ("plan serve llama-3.1-8b --device h100 --format q9", "q4_1"),
        ("plan serve llama-3.1-8b --device h100 --contxt 5", "--context"),
        ("plan serve ./no/such.gguf", "no file"),
        ("plan serve smollm2 --context 0", "context"),
    ],
)
def test_mistakes_name_what_works(tokens: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(tokens)) in (1, 2)
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
