"""A load that Megalith makes itself, with indicators: days, weeks, drift, bursts; or white noise as the control.

Every figure here is an assumption, and what is made is called synthetic wherever it is shown. The load is counted
requests in each step, so that the series that is forecast is the one that is played. Indicators follow from traffic
down: sessions and connections move first, the service next, resources last. Knows random numbers; must not know who
forecasts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.specs.load_series import LoadSeries, Values

LEVELS = {"sessions": 1, "connections": 1, "queued_tokens": 2, "active": 2, "kv_share": 3, "power_w": 3, "load": 3}
"""Level of each indicator, 1 the top: what the attention of the forecaster is built from."""
_MONDAY_S = 1_767_571_200.0
"""2026-01-05 00:00 UTC: days and weeks begin with the first row."""
_DAY_S = 86_400.0


class SyntheticLoad(Config):
    """What the load looks like."""

    kind: Literal["seasonal", "white"] = "seasonal"
    steps: int = 4800
    step_s: float = 1800.0
    mean_per_step: float = 36.0
    """Requests in a step, on average."""
    daily: float = 0.7
    """Amplitude of the day in the logarithm of the rate; a second harmonic has a third of it."""
    weekend: float = -0.5
    """Added to the logarithm on days six and seven."""
    drift: float = 0.12
    """Standard deviation of a slow drift of the logarithm, forgotten over some 25 steps."""
    bursts_per_day: float = 1.2
    burst: float = 0.6
    """Mean size of a burst in the logarithm (exponential); it falls by 30 % a step."""
    most_burst: float = 1.0
    """Bursts together level off here."""
    warning: float = 0.6
    """Share of the bursts that sessions and connections show a step earlier."""
    spread: float = 0.35
    """`white`: standard deviation of the logarithm of the rate, independent from step to step."""

    def __post_init__(self) -> None:
        if self.most_burst <= 0:
            raise ConfigError(f"A most_burst of {self.most_burst:g} cannot be.", "Give a number above 0.")
        if not 2 <= self.steps <= 10_000_000 or not 0.1 <= self.mean_per_step <= 1e7 or not 1 <= self.step_s <= 1e6:
            what = f"{self.steps} steps of {self.step_s:g} s with {self.mean_per_step:g} requests cannot be made."
            raise ConfigError(what, "Give at least 2 steps of at least 1 s, with at least 0.1 requests.")


def synthesize(options: SyntheticLoad, seed: int = 0) -> LoadSeries:
    """The series of that seed: `load` in requests a second, whole requests in every step; six indicators."""
    dice = np.random.Generator(np.random.PCG64(splitmix64(seed, 11)))
    shown, coming = _logarithms(options, dice)
    rate = np.exp(shown)
    counts = dice.poisson(rate * (options.mean_per_step / rate.mean())).astype(np.float64)
    load = counts / options.step_s
    ahead = np.exp(coming) / np.exp(coming).mean()
    if options.kind == "white":  # nothing shows what comes
        ahead = rate[dice.permutation(len(rate))]
    columns = {
        "sessions": _noisy(ahead * 400, 0.08, dice),
        "connections": _noisy(0.5 * ahead * 120 + 0.5 * rate / rate.mean() * 120, 0.1, dice),
        "queued_tokens": _noisy(_behind(counts, 0.3) * 900, 0.15, dice),
        "active": _noisy(_behind(counts, 0.5), 0.1, dice),
        "kv_share": np.clip(_noisy(_behind(counts, 0.6) / (3 * options.mean_per_step), 0.05, dice), 0, 1),
        "power_w": 300 + _noisy(_behind(counts, 0.6) * 4, 0.05, dice),
        "load": load,
    }
    names = tuple(columns)
    values = np.stack([columns[name] for name in names], axis=1)
    return LoadSeries(names, values, names.index("load"), _MONDAY_S, options.step_s)


def _logarithms(options: SyntheticLoad, dice: np.random.Generator) -> tuple[Values, Values]:
    """(steps,) twice: the logarithm of the rate, and what traffic already shows of the next step."""
    steps = options.steps
    if options.kind == "white":
        noise = dice.normal(0, options.spread, steps)
        return noise, noise
    times_s = options.step_s * np.arange(steps + 1)
    day = 2 * np.pi * times_s / _DAY_S
    shape = -options.daily * (np.cos(day) + np.sin(2 * day + 1) / 3)
    shape = shape + np.where(times_s // _DAY_S % 7 >= 5, options.weekend, 0.0)
    keep = 0.96
    shocks = dice.normal(0, options.drift * np.sqrt(1 - keep * keep), steps + 1)
    begins = dice.random(steps + 1) < options.bursts_per_day * options.step_s / _DAY_S
    sizes = np.where(begins, dice.exponential(options.burst, steps + 1), 0.0)
    warned = np.where(dice.random(steps + 1) < options.warning, sizes, 0.0)
    drift, burst = np.zeros(steps + 1), np.zeros(steps + 1)
    drift[0], burst[0] = shocks[0], sizes[0]
    for step in range(1, steps + 1):
        drift[step] = keep * drift[step - 1] + shocks[step]
        burst[step] = 0.7 * burst[step - 1] + sizes[step]
    most = options.most_burst
    whole = shape + drift + most * np.tanh(burst / most)
    # A step ahead traffic shows the shape and the bursts that were warned of, not the others.
    seen = shape[1:] + drift[:-1] + most * np.tanh((0.7 * burst[:-1] + warned[1:]) / most)
    return whole[:-1], seen


def _behind(values: Values, keep: float) -> Values:
    """A resource that follows: an exponential mean."""
    out = np.empty_like(values)
    level = values[0]
    for place, value in enumerate(values):
        level = keep * level + (1 - keep) * value
        out[place] = level
    return out


def _noisy(values: Values, share: float, dice: np.random.Generator) -> Values:
    noisy: Values = values * np.exp(dice.normal(0, share, len(values)))
    return noisy
