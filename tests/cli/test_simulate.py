"""`megalith simulate` as a person runs it: report, JSON, files, a stored scenario again, mistakes, Ctrl-C."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalith.report.parquet import read_parquet

from .command import environment, megalith, start

LOAD = "poisson:rate=6,input=lognormal:300:1.0,output=lognormal:60:0.8,max_input=2000,max_output=300,requests=80"
SIMPLE = ("simulate", "--trace", LOAD, "--model", "llama-3.1-8b", "--fleet", "2xh100-sxm")


def document(*arguments: str) -> dict[str, Any]:
    ran = megalith(*arguments, "--json")
    assert ran.returncode == 0, ran.stderr
    body: dict[str, Any] = json.loads(ran.stdout, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    return body


def test_the_report_says_simulated_and_measures_only_its_own_time() -> None:
    ran = megalith(*SIMPLE, "--slo", "ttft=400ms,tpot=40ms@p90")
    assert ran.returncode == 0, ran.stderr
    for words in ("simulated", "TTFT", "goodput", "requests per CPU s", "measured", "binding", "digest"):
        assert words in ran.stdout, words


def test_files_of_a_splitwise_fleet_agree_with_the_report(tmp_path: Path) -> None:
    fleet = "prefill=2xh100-sxm:tp2,decode=1xa100-80gb:tp2"
    plot, trace = tmp_path / "run.png", tmp_path / "run.json.gz"
    body = document(
        "simulate", "--trace", LOAD, "--model", "llama-3.1-8b", "--fleet", fleet, "--policy", "splitwise",
        "--parquet", str(tmp_path / "out"), "--plot", str(plot), "--trace-events", str(trace),
    )  # fmt: skip
    assert body["record"]["finished"] == 80
    assert body["resources"]["events"]["hand-offs"] == body["record"]["transfers"] > 50
    rows = read_parquet(tmp_path / "out" / "requests.parquet")
    assert len(rows["id"]) == 80
    assert int(rows["generated"].sum()) == body["record"]["output_tokens"]
    assert len(read_parquet(tmp_path / "out" / "instances.parquet")["instance"]) > 0
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) > 80
    assert plot.stat().st_size > 10_000


def test_a_stored_scenario_runs_again_and_flags_change_it(tmp_path: Path) -> None:
    first = document(*SIMPLE, "--seed", "5", "--parquet", str(tmp_path))
    stored = ("simulate", "--config", str(tmp_path / "scenario.json"))
    assert document(*stored)["digest"] == first["digest"]
    assert document(*stored, "--seed", "0")["digest"] != first["digest"]


def test_the_digest_does_not_depend_on_the_process() -> None:
    digests = {json.loads(megalith(*SIMPLE, "--json", PYTHONHASHSEED=seed).stdout)["digest"] for seed in ("1", "2")}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("--trace", "azure-con"), "azure-conv"),
        (("--model", "lama-3.1-8b"), "llama-3.1-8b"),
        (("--fleet", "4xh10"), "h100-sxm"),
        (("--fleet", "1xh100-sxm:tp3"), "1, 2, 4, 8"),
        (("--policy", "splitwis"), "'splitwise'"),
        (("--policy", "splitwise"), "prefill=2xh100-sxm,decode=2xh100-sxm"),
        (("--policy", "polca"), "[power]"),
        (("--slo", "tft=4s"), "ttft=400ms"),
        (("--timer", "llumnx-7b"), "llumnix-7b"),
        (("--plot", "/nowhere/run.png"), "/nowhere"),
        (("--max-new", "²"), "max-new"),
        (("--config", "/nowhere/scenario.json"), "cannot be read"),
    ],
)
def test_a_mistake_gets_one_paragraph_with_what_works(changes: tuple[str, ...], says: str) -> None:
    flags = dict(zip(SIMPLE[1::2], SIMPLE[2::2], strict=True)) | {changes[0]: changes[1]}
    ran = megalith("simulate", *(part for flag in flags.items() for part in flag))
    assert ran.returncode in (1, 2), ran.stdout
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ctrl_c_says_how_far_it_came() -> None:
    long = LOAD.replace("requests=80", "requests=400000")
    process = start("simulate", "--trace", long, "--model", "llama-3.1-8b", "--fleet", "4xh100-sxm")
    time.sleep(4.0)
    process.send_signal(signal.SIGINT)
    output, messages = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped" in messages
    assert "simulated" in output


def test_what_can_be_named_and_no_torch() -> None:
    assert "rebalance" in megalith("simulate", "--list").stdout
    code = "import sys, megalith.cli.simulate, megalith.sim.run; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
