"""The file of a posterior: what is written is read, what is damaged is refused, and what the next steps may bring."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.specs.posterior import Posterior, read_posterior, write_posterior


def posterior(rows: int = 3, count: int = 2, horizon: int = 4, step_s: float = 10.0) -> Posterior:
    return Posterior(step_s, rows, count, horizon, array("f", range(rows * count * horizon)), "a test")


def test_it_comes_back(tmp_path: Path) -> None:
    write_posterior(tmp_path / "p", posterior())
    assert read_posterior(tmp_path / "p") == posterior()


@pytest.mark.parametrize("cut", [0, 10, -4, -1])
def test_a_part_of_it_is_refused(tmp_path: Path, cut: int) -> None:
    write_posterior(tmp_path / "p", posterior())
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:cut])
    with pytest.raises(ConfigError):
        read_posterior(tmp_path / "p")


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_changed_bit_is_refused(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.posterior"
    write_posterior(path, posterior())
    whole = bytearray(path.read_bytes())
    body = whole.index(b"\n") + 1
    whole[body + place % (len(whole) - body)] ^= 1 << bit
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match="checksum"):
        read_posterior(path)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 5), st.floats(0, 100), st.floats(0.1, 80))
def test_peaks_are_those_of_every_step_that_is_touched(
    rows: int, count: int, horizon: int, from_s: float, more_s: float
) -> None:
    one = posterior(rows, count, horizon)
    until_s = from_s + more_s
    row = min(int(from_s // 10), rows - 1)
    known = [step for step in range(row, row + horizon) if step * 10 < until_s and (step + 1) * 10 > from_s]
    if from_s >= one.covered_s:
        with pytest.raises(ConfigError, match="covers"):
            one.peaks(from_s, until_s)
        return
    wanted = [
        max(one.values[(row * count + sample) * horizon + step - row] for step in known) for sample in range(count)
    ]
    assert one.peaks(from_s, until_s) == wanted


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not go with"):
        Posterior(1.0, 2, 2, 2, array("f", [1.0]))
