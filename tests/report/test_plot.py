"""Pictures are drawn, and what stands in the way is told before the work."""

import sys
from pathlib import Path

import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.report.plot import LoadPicture, check_plot_path, plot_load

PICTURE = LoadPicture(
    "t",
    "measured",
    {"TTFT": [10**8, 2 * 10**8], "ITL": [0, 10**6, 2 * 10**6], "TPOT": [], "E2E": [10**9]},
    [(i * 10**7, 1.0) for i in range(100)],
    {"TTFT": 15 * 10**7},
)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_draws(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"load{suffix}"
    plot_load(PICTURE, path)
    head = path.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in head


def test_draws_an_empty_run(tmp_path: Path) -> None:
    plot_load(LoadPicture("t", "measured", {}, [], {}), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\.png"):
        check_plot_path(tmp_path / "load.txt")
    with pytest.raises(ConfigError, match="no folder"):
        check_plot_path(tmp_path / "nowhere" / "load.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MachineError, match=r"megalith\[analysis\]"):
        check_plot_path(tmp_path / "load.png")
