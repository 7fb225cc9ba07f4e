"""Pictures of simulations say that they are, show the settings, and draw what they were given."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megalith.base.errors import ConfigError, MachineError
from megalith.report.plot_frame import Caption, framed, save
from megalith.report.plot_run import plot_cdfs, plot_occupancy, plot_power
from megalith.report.plot_sweep import knee, plot_curves, plot_knee

CAPTION = Caption("Splitwise for $40", {"fleet": "25 + 15 H100", "trace": "azure-conv", "seed": "7"})
S = 10**9


def texts(path: Path) -> str:
    """The words of an SVG, which matplotlib writes as comments beside their outlines."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8")))


def draw_all(folder: Path, suffix: str) -> list[Path]:
    paths = [folder / f"{name}{suffix}" for name in ("cdfs", "occupancy", "power", "curves", "knee")]
    curves = {"TTFT": ([0, 10**8, 10**9], [0.2, 0.5, 1.0]), "TPOT": ([10**7], [1.0]), "E2E": ([], [])}
    plot_cdfs(paths[0], CAPTION, curves, {"TTFT": [(4 * 10**8, 0.9)], "E2E": [(10**9, 0.5)]})
    times = [S, 2 * S, 3 * S]
    plot_occupancy(paths[1], CAPTION, times, {"running": [1, 2, 3], "waiting": [0, 0, 9], "used_share": [0, 0.5, 1]})
    plot_power(paths[2], CAPTION, times, {"prefill": [1e4, 2e4, 1e4], "decode": [5e3, 5e3, 6e3]}, budget_w=3e4)
    sweep = {"splitfuse": {1.0: [10.0, 12.0], 2.0: [20.0, 40.0]}, "fcfs": {1.0: [11.0], 2.0: []}}
    plot_curves(paths[3], CAPTION, {"TTFT p90, ms": sweep, "TPOT p90, ms": sweep}, {"TTFT p90, ms": 30.0})
    plot_knee(paths[4], CAPTION, "baseline / ours, p99", {"llumnix": {8.0: [1.0], 9.0: [16.0, 14.0]}}, ("claim", 15.0))
    return paths


def test_every_picture_says_simulated_and_its_settings(tmp_path: Path) -> None:
    for path in draw_all(tmp_path, ".svg"):
        said = texts(path)
        assert "Splitwise for" in said
        assert "(simulated)" in said
        for setting in ("25 + 15 H100", "azure-conv", "seed 7"):
            assert setting in said, path


def test_draws_curves_limits_and_bands(tmp_path: Path) -> None:
    paths = draw_all(tmp_path, ".svg")
    assert "90% within 400 ms" in texts(paths[0])
    assert "budget" in texts(paths[2])
    assert "splitfuse (2 seeds)" in texts(paths[3])
    assert "service level" in texts(paths[3])
    assert "15x at 9/s" in texts(paths[4])


def test_pixels(tmp_path: Path) -> None:
    for path in draw_all(tmp_path, ".png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 5


def test_nothing_to_draw_is_an_empty_picture(tmp_path: Path) -> None:
    plot_cdfs(tmp_path / "a.png", CAPTION, {})
    plot_occupancy(tmp_path / "b.png", CAPTION, [], {"running": []})
    plot_power(tmp_path / "c.png", CAPTION, [], {})
    plot_curves(tmp_path / "d.png", CAPTION, {})
    plot_knee(tmp_path / "e.png", CAPTION, "ratio", {"none": {}})
    assert [path.read_bytes()[:4] for path in sorted(tmp_path.iterdir())] == 5 * [b"\x89PNG"]


def test_the_knee_is_the_largest_median() -> None:
    assert knee({8.0: [1.0, 50.0, 2.0], 9.0: [16.0, 3.0], 9.5: [2.4]}) == (9.0, 9.5)
    with pytest.raises(ConfigError, match="no knee"):
        knee({1.0: []})


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\.png"):
        plot_power(tmp_path / "a.txt", CAPTION, [], {})
    figure, _ = framed(CAPTION)
    (tmp_path / ".a.partial.png").mkdir()
    with pytest.raises(MachineError, match="could not be written"):
        save(figure, tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MachineError, match=r"megalith\[analysis\]"):
        plot_curves(tmp_path / "a.png", CAPTION, {})
