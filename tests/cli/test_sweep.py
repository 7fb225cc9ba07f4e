"""`megalith sweep` as a person runs it: table, JSON, resume, refusal, failures, Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from .command import megalith, start

LOAD = "poisson:rate=5,input=lognormal:200:1.0,output=lognormal:50:0.8,max_input=1000,max_output=200,requests={}"


def arguments(out: Path, requests: int = 60, **changes: str) -> list[str]:
    flags = {
        "trace": LOAD.format(requests),
        "model": "llama-3.1-8b",
        "fleet": "2xa100-80gb",
        "rate": "4,8",
        "seeds": "2",
        "slo": "ttft=400ms,tpot=50ms",
        "out": str(out),
    }
    flags |= changes
    return ["sweep", *(part for name, text in flags.items() for part in (f"--{name}", text))]


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_sweep_from_the_first_point_to_the_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / "runs" / "first", tmp_path / "curves.svg"
    first = megalith(
        *arguments(out), "--policy", "prefill-first", "--policy", "llumnix+splitfuse", "--plot", str(picture)
    )
    assert first.returncode == 0, first.stderr
    assert "Simulated sweep" in first.stdout
    assert "mean of 2 seeds" in first.stdout
    assert len(results(out)) == 8
    assert "(simulated)" in picture.read_text()
    again = megalith(*arguments(out), "--policy", "prefill-first", "--policy", "llumnix+splitfuse", "--json")
    document = json.loads(again.stdout)
    assert len(results(out)) == 8, "nothing ran twice"
    assert (document["nature"], document["failures"]) == ("simulated", [])
    assert [(row["policy"], row["rate_per_s"]) for row in document["rows"]] == [
        ("prefill-first", 4.0), ("prefill-first", 8.0), ("llumnix+splitfuse", 4.0), ("llumnix+splitfuse", 8.0)
    ]  # fmt: skip
    for row in document["rows"]:
        assert row["seeds"] == 2
        assert row["figures"]["ttft_p50_ns"]["minimum"] < row["figures"]["ttft_p50_ns"]["maximum"]
        # 2 devices: what is good is at most what comes.
        assert row["figures"]["good_per_s_device"]["mean"] == pytest.approx(row["rate_per_s"] / 2, rel=0.35)


def test_a_changed_sweep_is_refused_and_restart_starts_anew(tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert megalith(*arguments(out, 20)).returncode == 0
    changed = arguments(out, 20, rate="4,9")
    refused = megalith(*changed)
    assert refused.returncode == 2
    assert "rate was 4,8 and is 4,9" in refused.stderr
    assert "--restart" in refused.stderr
    assert len(results(out)) == 4
    assert megalith(*changed, "--restart").returncode == 0
    assert len(results(out)) == 4


def test_what_cannot_be_is_told_and_the_rest_is_done(tmp_path: Path) -> None:
    done = megalith(
        *arguments(tmp_path / "a", 20, seeds="1"), "--fleet", "1xl4", "--fleet", "1xl4:max_sequences=0", "--json"
    )
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert [row["fleet"] for row in document["rows"]][:2] == ["2xa100-80gb"] * 2
    assert {failure["labels"]["fleet"] for failure in document["failures"]} <= {"1xl4", "1xl4:max_sequences=0"}
    assert document["failures"]
    split = megalith(*arguments(tmp_path / "b", 20), "--policy", "splitwise", "--policy", "splitfuse")
    assert split.returncode == 1
    assert "splitwise needs instances" in " ".join(split.stdout.split())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": "0"}, "1..8x0.5"),
        ({"seeds": "0"}, "--seeds 0"),
        ({"policy": "splitfus"}, "Did you mean 'splitfuse'?"),
        ({"trace": "poisson:rate=5,input=9,output=9"}, "never ends"),
        ({"fleet": "2h100"}, "is no pool"),
    ],
)
def test_flags_that_cannot_be_used(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    done = megalith(*arguments(tmp_path / "a", 20, **changes))
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "a").exists()


def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a"
    many = arguments(out, 300, seeds="60")
    process = start(*many, "--workers", "2")
    deadline = time.monotonic() + 60
    while not (out / "results.jsonl").exists() or len(results_so_far(out)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    kept = len(results(out))
    assert 2 <= kept < 120
    assert f"stopped: {kept} of 120 points are in {out}" in errors
    assert "Simulated sweep" in shown


def results_so_far(out: Path) -> list[str]:
    return [line for line in (out / "results.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
