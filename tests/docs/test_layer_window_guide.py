"""The guide to layer windows: its example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.cli.command import environment

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "layer-window.md").read_text(encoding="utf-8")


def test_the_example_of_the_guide_gives_the_same_bits(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 0, done.stderr
    near, of = map(int, re.fullmatch(r"same bits: True; (\d+) of (\d+) bytes near\n", done.stdout).groups())  # type: ignore[union-attr]
    assert 10 * near == 4 * of
