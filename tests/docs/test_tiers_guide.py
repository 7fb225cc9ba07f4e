"""The guide to tiers: its example runs as it stands, under its cap."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.cli.command import environment

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "tiers.md").read_text(encoding="utf-8")


def test_the_example_of_the_guide_runs_and_moves_what_it_says(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 0, done.stderr
    # 8 puts, 4 layers at first, 11 times 2 more; the last 2 nobody waits for, so they may be cancelled.
    assert re.search(r"^3[234] moves", done.stdout), done.stdout
    assert f"peak {4 * (2 << 20)} of {4 * (2 << 20)} bytes" in done.stdout
