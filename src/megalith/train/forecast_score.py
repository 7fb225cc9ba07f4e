"""How good forecasts are: CRPS from samples, coverage, squared error; and the two forecasters to beat without training.

Knows arrays of samples and of what came; must not know who drew them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.specs.load_series import Values


class Score(NamedTuple):
    """Of one step of the horizon, over all rows, in the units of what was scored."""

    crps: float
    coverage: float
    """Share of what came that lies in the central 90 % of the samples."""
    width: float
    """Mean width of that interval."""
    mse: float
    """Of the samples' mean."""
    late: float
    """Share of what came above the samples' 95 % quantile: what an autoscaler that provisions by it would miss."""


def crps(samples: Values, came: Values) -> Values:
    """Continuous ranked probability score of each row: E|X - y| - E|X - X'| / 2.

    samples (rows, count), came (rows,) -> (rows,). The second term is taken over pairs of different samples, so that
    the estimate does not depend on their number on average (the fair CRPS: Ferro, 2014). One sample: |x - y|.
    """
    count = samples.shape[1]
    near: Values = np.abs(samples - came[:, None]).mean(axis=1)
    if count == 1:
        return near
    ordered = np.sort(samples, axis=1)
    weights = 2.0 * np.arange(count) - count + 1
    spread: Values = (ordered * weights).sum(axis=1) / (count * (count - 1))
    found: Values = near - spread
    return found


def score(samples: Values, came: Values) -> Score:
    """samples (rows, count), came (rows,). Raises ConfigError for no rows."""
    if not len(came) or len(samples) != len(came):
        raise ConfigError(f"{len(samples)} forecasts of {len(came)} rows cannot be scored.", "Give a row for each.")
    low, high = np.quantile(samples, [0.05, 0.95], axis=1)
    inside = (came >= low) & (came <= high)
    error = samples.mean(axis=1) - came
    return Score(
        float(crps(samples, came).mean()),
        float(inside.mean()),
        float((high - low).mean()),
        float((error * error).mean()),
        float((came > high).mean()),
    )


def naive(load: Values, rows: range, lag: int, horizon: int) -> Values:
    """The last value (`lag` 1), or the one a season ago: (rows, 1, horizon). Row r knows what is before r."""
    first = np.array(rows)[:, None] + np.arange(horizon)
    # A step further than the lag is not known yet: the newest one of the same phase is.
    back = lag * (1 + np.arange(horizon) // lag)
    forecast: Values = load[first - back][:, None, :]
    return forecast


def naive_spread(load: Values, rows: range, fitted: range, lag: int, horizon: int, count: int, seed: int) -> Values:
    """The same with the errors that it made on the `fitted` rows around it: (rows, count, horizon), drawn with
    replacement. A stronger thing to beat: CRPS of a single value is only its absolute error."""
    errors = np.stack([load[np.array(fitted) + step] for step in range(horizon)], axis=1)
    errors = errors - naive(load, fitted, lag, horizon)[:, 0]
    drawn = np.random.Generator(np.random.PCG64(splitmix64(seed, 1))).integers(len(errors), size=(len(rows), count))
    spread: Values = naive(load, rows, lag, horizon) + errors[drawn]
    return spread
