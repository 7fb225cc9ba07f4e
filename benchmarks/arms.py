"""One arm of a comparison: a driver process that has its engine loaded and answers case after case.

Knows processes and the drivers' line protocol (see `peers/driver.py`); knows no engine.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import pinned

HERE = Path(__file__).resolve().parent
LOAD_TIMEOUT_S = 600.0


@dataclass
class ArmSpec:
    """One entry of arms.toml, joined with where its peer is installed."""

    name: str
    driver: str
    peer: str = ""
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    faithful: bool = False
    server: str = ""
    install: dict[str, Any] = field(default_factory=dict)

    def missing(self) -> str:
        """Why this arm cannot take part, or an empty string."""
        if not self.peer:
            return ""
        if not self.install:
            return f"no [{self.peer}] in the peers file"
        if self.model not in self.install.get("models", {}):
            return f"no model `{self.model}` of {self.peer} in the peers file"
        python = self.install.get("python", sys.executable)
        return "" if Path(python).exists() else f"{python} does not exist"


def read_arms(peers_file: Path | None) -> list[ArmSpec]:
    """arms.toml with the installations of `peers_file` (TOML: one table a peer with python or bin, and models)."""
    installs = tomllib.loads(peers_file.read_text()) if peers_file else {}
    arms = [ArmSpec(**entry) for entry in tomllib.loads((HERE / "arms.toml").read_text())["arm"]]
    for arm in arms:
        arm.install = installs.get(arm.peer, {})
    return arms


class ArmProcess:
    """The driver of one arm, pinned to `cores`, with its engine loaded."""

    def __init__(self, spec: ArmSpec, cores: tuple[int, ...], log: Path) -> None:
        self.spec, self.version, self.load_s = spec, "", 0.0
        self.skipped = spec.missing()
        if self.skipped:
            return
        python = spec.install.get("python", sys.executable)
        path = os.pathsep.join(filter(None, (str(HERE / "peers"), os.environ.get("PYTHONPATH", ""))))
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [*pinned(cores), python, str(HERE / spec.driver)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=HERE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(len(cores))},
        )  # fmt: skip
        opening = {
            "threads": len(cores), "core": cores[0], "bind": ",".join(map(str, cores)), "source": spec.model,
            "model": spec.install.get("models", {}), "bin": spec.install.get("bin", ""), **spec.settings,
        }  # fmt: skip
        answer = self.ask({"open": opening}, LOAD_TIMEOUT_S)
        self.version, self.load_s = answer.get("version", ""), answer.get("load_s", 0.0)
        self.skipped = answer.get("skipped") or answer.get("failed") or ""
        if self.skipped:
            self.close()

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its answer; {"failed": ...} when it does not come."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"failed": f"the driver has ended with status {self._process.poll()}"}
        deadline, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                return {"failed": f"no answer within {timeout_s:.0f} s"}
            piece = os.read(self._process.stdout.fileno(), 65536)
            if not piece:
                return {"failed": f"the driver ended with status {self._process.wait(10)}"}
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the driver."""
        if self.skipped and not hasattr(self, "_process"):
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._log.close()
