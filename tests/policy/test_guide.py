"""The tables of the scheduling guide are what the example prints."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("table", ["policies", "memory"])
def test_the_guide_shows_what_the_example_prints(table: str) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "scheduling.py"))
    assert example[table]() in (ROOT / "docs" / "guides" / "scheduling.md").read_text()
