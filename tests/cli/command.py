"""The `megalith` command as a person runs it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "megalith"]


def environment(**changes: str) -> dict[str, str]:
    """Our own environment with the package in reach; an empty value removes a name."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100", **changes}
    return {name: value for name, value in merged.items() if value or name == "PATH"}


def megalith(*arguments: str, text: str = "", timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdin is `text`."""
    return subprocess.run(
        [*COMMAND, *arguments], input=text, capture_output=True, text=True, timeout=timeout, env=environment(**env)
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start and leave running, in a process group of its own."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
