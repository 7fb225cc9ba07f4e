"""A load and its indicators over time, in equal steps: what monitoring recorded, from a CSV.

    date,load,sessions,cpu
    2018-07-24 00:00:00,1.88,310,47.9

Knows columns and times; must not know what is forecast from them. The first column is the time (ISO 8601, or seconds),
one column is the load, all others are indicators.
"""

from __future__ import annotations

import csv
import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError

Values: TypeAlias = NDArray[np.float64]
_MOST_CELLS = 200_000_000
_SHAPE = "A load series is a CSV with a time first, a column `load` and indicators, a row for each equal step."


@dataclass(frozen=True, slots=True)
class LoadSeries:
    """Equal steps of one load and its indicators."""

    names: tuple[str, ...]
    """Of the columns of `values`."""
    values: Values
    """(steps, columns)."""
    target: int
    """Which column is the load."""
    start_s: float
    """Time of the first row, in seconds since 1970 (UTC): it says where the day and the week begin."""
    step_s: float

    def __len__(self) -> int:
        return len(self.values)

    @property
    def load(self) -> Values:
        """(steps,)."""
        return self.values[:, self.target]

    def times_s(self) -> Values:
        """(steps,), seconds since 1970."""
        times: Values = self.start_s + self.step_s * np.arange(len(self), dtype=np.float64)
        return times


def read_load_series(path: Path, target: str = "load") -> LoadSeries:
    """The series in a CSV. Raises ConfigError, with the line, for what is missing, no number, or not in equal steps."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            column = _target(header, target, path)
            times, values = _columns(rows, header, path)
    except OSError as error:
        raise ConfigError(f"The load series {path} cannot be read ({error.strerror}).", _SHAPE) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"The load series {path} is no CSV ({error}).", _SHAPE) from None
    if len(times) < 2:
        raise ConfigError(f"The load series {path} has {len(times)} rows.", _SHAPE)
    step_s = _step(times, path)
    return LoadSeries(tuple(header[1:]), values, column, times[0], step_s)


def write_load_series(path: Path, series: LoadSeries) -> None:
    """The same as a CSV; what is read back is equal. Times are written as UTC."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["date", *series.names])
        for at_s, row in zip(series.times_s().tolist(), series.values.tolist(), strict=True):
            out.writerow([datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S"), *map(repr, row)])


def _target(header: Sequence[str], target: str, path: Path) -> int:
    names = list(header[1:])
    if target not in names:
        near = difflib.get_close_matches(target, names, n=1, cutoff=0.0)
        hint = f"Did you mean {near[0]!r}? It has {', '.join(names[:12])}." if near else _SHAPE
        raise ConfigError(f"The load series {path} has no column {target!r}.", hint)
    if len(set(names)) < len(names):
        raise ConfigError(f"Two columns of {path} have the same name.", "Give each its own.")
    return names.index(target)


def _columns(rows: Iterator[list[str]], header: Sequence[str], path: Path) -> tuple[list[float], Values]:
    times: list[float] = []
    cells: list[float] = []
    for line, row in enumerate(rows, 2):
        if not row:
            continue
        if len(row) != len(header):
            raise ConfigError(
                f"Line {line} of {path} has {len(row)} cells, the header {len(header)}.", "Mend the line."
            )
        times.append(_time(row[0], line, path))
        for name, cell in zip(header[1:], row[1:], strict=True):
            cells.append(_number(cell, name, line, path))
        if len(cells) > _MOST_CELLS:
            raise ConfigError(f"{path} has more than {_MOST_CELLS:,} cells.", "Cut it, or take longer steps.")
    return times, np.array(cells, dtype=np.float64).reshape(len(times), len(header) - 1)


def _time(text: str, line: int, path: Path) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        what = f"Line {line} of {path} begins with {text!r}, which is no time."
        raise ConfigError(what, "Write 2018-07-24 00:10:00, or seconds since 1970.") from None
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


def _number(text: str, name: str, line: int, path: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise ConfigError(f"Line {line} of {path} has {text!r} in {name}, which is no number.", "Fill or drop the gap.")
    return value


def _step(times: Sequence[float], path: Path) -> float:
    step_s = times[1] - times[0]
    for number, (before, after) in enumerate(itertools.pairwise(times), 3):
        if step_s <= 0 or abs(after - before - step_s) > 0.01 * step_s:
            what = f"Line {number} of {path} comes {after - before:g} s after the one before it, the first step is "
            raise ConfigError(f"{what}{step_s:g} s.", "Forecasts need equal steps: fill the gap or cut the file there.")
    return step_s
