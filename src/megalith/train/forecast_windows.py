"""Windows of a load series as a forecaster sees them: scaled by the training part, then each by itself.

Knows arrays; must not know networks. Scaling is that of the published study: 70 % of the rows train, 10 % choose when
to stop, 20 % report; every column runs from 0 to 1 over the training rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.specs.load_series import LoadSeries, Values

_DAY_S, _WEEK_S = 86_400.0, 604_800.0
_MONDAY_S = 4 * _DAY_S
"""1970-01-05 was a Monday."""
_LEAST_VARIANCE = 1e-5
"""Added to the variance of a window, as in the released code: a column that stands still stays near 0."""


class SplitOptions(Config):
    """What is seen, what is forecast, and which rows train."""

    window: int = 144
    """Steps that are seen."""
    horizon: int = 4
    """Steps that are forecast together."""
    train_share: float = 0.7
    valid_share: float = 0.1
    """The rest reports."""

    def __post_init__(self) -> None:
        if not 2 <= self.window <= 100_000 or not 2 <= self.horizon <= 1000:
            what = f"A window of {self.window} steps and a horizon of {self.horizon} cannot be."
            raise ConfigError(what, "Give at least 2 of each, such as 144 and 4.")
        if not (self.train_share > 0 and self.valid_share > 0 and self.train_share + self.valid_share < 1):
            what = (
                f"Shares of {self.train_share:g} to train and {self.valid_share:g} to choose leave nothing to report."
            )
            raise ConfigError(what, "Give two shares above 0 that make less than 1, such as 0.7 and 0.1.")


class Parts(NamedTuple):
    """Rows whose first forecast step they are: each part's windows may begin before it, what it forecasts may not."""

    train: range
    valid: range
    test: range


@dataclass(frozen=True, slots=True)
class Scale:
    """From a column's own units to 0..1 over the training rows."""

    low: Values
    span: Values

    def __call__(self, values: Values) -> Values:
        """(rows, columns) -> the same shape."""
        scaled: Values = (values - self.low) / self.span
        return scaled


def parts(rows: int, options: SplitOptions, what: str = "The series") -> Parts:
    """Which rows train, choose and report. Raises ConfigError when a part has no room for a window and a horizon."""
    trained = int(rows * options.train_share)
    tested = rows - int(rows * (1 - options.train_share - options.valid_share))
    found = Parts(
        range(options.window, trained - options.horizon + 1),
        range(trained, tested - options.horizon + 1),
        range(tested, rows - options.horizon + 1),
    )
    if not all(found):
        least = max((options.window + options.horizon) / options.train_share, options.horizon / options.valid_share)
        raise ConfigError(
            f"{what} has {rows} rows; a window of {options.window} and a horizon of {options.horizon} need "
            f"{int(least) + 2}.",
            "Give more rows, or a shorter window.",
        )
    return found


def scale_of(values: Values, trained: int) -> Scale:
    """The scale of the first `trained` rows. A column that stands still keeps its units."""
    low, high = values[:trained].min(axis=0), values[:trained].max(axis=0)
    return Scale(low, np.where(high > low, high - low, 1.0))


def calendar(times_s: Values) -> Values:
    """(rows,) seconds since 1970 -> (rows, 4): sine and cosine of the time of day and of the week."""
    day, week = 2 * np.pi * times_s / _DAY_S, 2 * np.pi * (times_s - _MONDAY_S) / _WEEK_S
    return np.stack([np.sin(day), np.cos(day), np.sin(week), np.cos(week)], axis=1)


@dataclass(frozen=True, slots=True)
class Windows:
    """All windows of a scaled series, cut when asked for."""

    scaled: Values
    """(rows, indicators)."""
    marks: Values
    """(rows, 4)."""
    target: int
    options: SplitOptions

    @classmethod
    def of(cls, series: LoadSeries, scale: Scale, options: SplitOptions) -> Windows:
        """Of a series under a scale."""
        return cls(scale(series.values), calendar(series.times_s()), series.target, options)

    def seen(self, rows: Values) -> tuple[Values, Values, Values]:
        """What is known before each of `rows` (n,): windows (n, window, indicators + 4), in units of each window, and
        mean and standard deviation of the load in it, (n, 1)."""
        places = rows.astype(np.int64)[:, None] + np.arange(-self.options.window, 0)
        raw = self.scaled[places]
        mean = raw.mean(axis=1, keepdims=True)
        std = np.sqrt(raw.var(axis=1, keepdims=True) + _LEAST_VARIANCE)
        windows = np.concatenate([(raw - mean) / std, self.marks[places]], axis=2)
        return windows, mean[:, :, self.target], std[:, :, self.target]

    def coming(self, rows: Values) -> Values:
        """What came: the scaled load from each of `rows` on, (n, horizon)."""
        places = rows.astype(np.int64)[:, None] + np.arange(self.options.horizon)
        loads: Values = self.scaled[places, self.target]
        return loads
