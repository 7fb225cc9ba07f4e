"""`megalith doctor` on this machine, and on ones that lack something."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from megalith.cli import doctor_checks as checks

from .command import ROOT, megalith


def findings(**env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = megalith("doctor", "--json", timeout=280, **env)
    assert result.stderr == ""
    return result.returncode, {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}


def test_this_machine(tmp_path: Path) -> None:
    code, found = findings(MEGALITH_HOME=str(tmp_path))
    assert {"python", "processor", "instructions", "memory", "disk", "compiler", "native", "torch", "models"} <= set(
        found
    )
    assert code == int(any(finding["state"] == "bad" for finding in found.values()))
    assert all(finding["remedy"] for finding in found.values() if finding["state"] != "ok")
    assert "predictions are guesses" in found["profile"]["what"]


def test_for_a_person() -> None:
    result = megalith("doctor", timeout=280)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("ok   python")
    assert lines[-1].endswith("bad")
    assert "Traceback" not in result.stderr


def test_without_a_compiler_says_what_is_lost() -> None:
    _, found = findings(PATH="", CC="")
    assert found["compiler"]["state"] == "warn"
    assert "native backend cannot be built" in found["compiler"]["what"]
    assert "torch serves" in found["compiler"]["remedy"]


def test_without_a_compiler_and_without_a_library_says_what_is_lost(tmp_path: Path) -> None:
    """A copy of the package as an installer without a compiler would leave it."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    home = tmp_path / "home"
    _, found = findings(PATH="", CC="", PYTHONPATH=str(tmp_path / "src"), MEGALITH_HOME=str(home))
    assert found["native"]["state"] == "warn"
    assert "torch path serves instead" in found["native"]["what"]
    assert "C compiler" in found["native"]["remedy"]
    assert found["compiler"]["state"] == "warn"


def test_a_native_library_that_was_asked_for_but_cannot_run() -> None:
    code, found = findings(MEGALITH_NATIVE_ISA="mmx")
    if shutil.which("cc") is None and found["native"]["state"] == "warn":
        pytest.skip("no compiler and no native library here")
    assert (code, found["native"]["state"]) == (1, "bad")
    assert "mmx" in found["native"]["what"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's read-only /proc")
def test_a_home_that_cannot_be_written_is_bad() -> None:
    code, found = findings(MEGALITH_HOME="/proc/megalith")
    assert (code, found["disk"]["state"]) == (1, "bad")
    assert "MEGALITH_HOME" in found["disk"]["remedy"]


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = next(f for f in checks.network(port) if f.name == "port")
    assert (finding.state, f"--port {port + 1}" in finding.remedy) == ("warn", True)
    assert next(f for f in checks.network(port) if f.name == "port").state == "ok"


@pytest.mark.parametrize(
    ("flags", "state", "words"),
    [
        ({"avx512_vnni", "avx512bw", "avx512_bf16", "avx2"}, "ok", "AVX-512 VNNI and bf16"),
        ({"avx2", "fma", "f16c"}, "ok", "AVX2 kernels"),
        ({"asimddp"}, "warn", "ARM"),
        ({"sse4_2"}, "warn", "portable C"),
    ],
)
def test_instruction_sets(flags: set[str], state: str, words: str) -> None:
    finding = checks._instructions(frozenset(flags))
    assert finding.state == state
    assert words in finding.what


def test_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "rich": "12.9"}
    monkeypatch.setattr(checks, "_version", installed.get)
    assert checks._mismatch('torch==2.13.0; extra == "engine"') is None
    assert checks._mismatch("numpy<3,>=1.26") is None
    assert checks._mismatch("rich>=13") == "rich 12.9 (needs >=13)"
    assert checks._mismatch("absent>=1") is None
    assert checks._numbers("2.13.0+cpu") == (2, 13)
    assert checks._numbers("3.0rc1") == (3,)
