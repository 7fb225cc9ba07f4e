"""The load on a row of servers over days: kinds of requests, the hours of a week, and bursts of minutes and seconds.

Knows rates and lengths; must not know who serves them. Rates are a pure function of (load, seed). A burst process is
the exponential of an Ornstein-Uhlenbeck process, with mean one: a rate that wanders about its mean with a given
coefficient of variation and forgets itself in a given time. Two are multiplied for each kind of request, a slow and a
fast one, and every kind has its own.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64
from megalith.specs import draws
from megalith.specs.draws import Floats

S_PER_DAY = 86_400.0
WEEK_S = 7 * S_PER_DAY
_BURSTS = 40
"""Number of the first random stream of bursts under a seed; those of arrivals begin at 60 (sim/fluid_load.py)."""


class Bursts(Config, kw_only=True):
    """How a rate wanders within minutes and seconds: coefficients of variation and correlation times."""

    slow_cv: float = 0.22
    slow_s: float = 480.0
    fast_cv: float = 0.11
    fast_s: float = 2.0

    def __post_init__(self) -> None:
        if not (0 <= self.slow_cv <= 5 and 0 <= self.fast_cv <= 5 and self.slow_s > 0 and self.fast_s > 0):
            raise ConfigError(f"{self} are no bursts.", "Coefficients of variation are 0 to 5, times above 0 s.")


NO_BURSTS = Bursts(slow_cv=0.0, fast_cv=0.0)
CONVERSATION = Bursts()
"""Rates of the Azure conversation trace of 2023 (19,366 requests in 3,502 s): counts in bins of 2 s vary by 0.25 more
than Poisson's, of which 0.22 are still there between bins minutes apart (autocorrelation 0.85, 0.73, 0.64 and 0.62 of
60-s bins at 1, 2, 3 and 5 minutes, Poisson noise included)."""
CODE = Bursts(slow_cv=0.0, fast_cv=2.1, fast_s=6.0)
"""Rates of the Azure code trace of 2023 (8,819 requests in 3,436 s): 2.1 more than Poisson's in bins of 2 s, with an
autocorrelation of 0.70, 0.49 and 0.38 after 2, 4 and 6 s. The mean of two-second peaks is 25 times the rate."""
BURSTS = {"none": NO_BURSTS, "conversation": CONVERSATION, "code": CODE}


class RequestKind(Config, kw_only=True):
    """Requests of one length and priority."""

    name: str
    input_tokens: int
    output_tokens: int
    priority: int
    """0 is low, 1 high."""
    share: float
    """Of all requests."""
    bursts: Bursts = CONVERSATION

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 2 or self.priority not in (0, 1) or not 0 < self.share <= 1:
            raise ConfigError(
                f"Requests of the kind {self.name!r} cannot be.",
                "Give at least 1 token in and 2 out, priority 0 or 1, and a share above 0.",
            )


POLCA_KINDS = (
    RequestKind(name="summarize", input_tokens=2048, output_tokens=256, priority=0, share=0.25, bursts=CODE),
    RequestKind(name="search", input_tokens=512, output_tokens=1024, priority=1, share=0.25),
    RequestKind(name="chat-low", input_tokens=2048, output_tokens=1024, priority=0, share=0.25),
    RequestKind(name="chat-high", input_tokens=2048, output_tokens=1024, priority=1, share=0.25),
)
"""POLCA's workloads (ASPLOS 2024) as accounts of it give them: lengths, priorities, and half of the requests chats.

Nobody published how they come. Each kind has the bursts of the public trace that is most like it: long prompts with
short answers those of the code trace (2,048 tokens in on average), the others those of the conversation trace.
"""


class Week(Config, kw_only=True):
    """The rate over a week as a share of the busiest hour's, from Monday at midnight."""

    valley: float = 0.3
    """Least of a weekday. Recalled of Azure's conversations in 2024: peak 3.3 times the valley, 1.7 times the mean;
    with the weekend below, the peak is here 1.66 times the mean."""
    weekend: float = 0.75
    """Saturday and Sunday against weekdays: an assumption."""
    peak_hour: float = 15.0

    def __post_init__(self) -> None:
        if not (0 < self.valley <= 1 and 0 < self.weekend <= 1 and 0 <= self.peak_hour < 24):
            raise ConfigError(f"{self} is no week.", "valley and weekend are above 0 and at most 1, hours 0 to 24.")

    def shares(self, at_s: Floats) -> Floats:
        """The rate at these times."""
        turn = 2 * math.pi * (at_s / S_PER_DAY - self.peak_hour / 24.0)
        day = self.valley + (1.0 - self.valley) * (0.5 + 0.5 * np.cos(turn))
        weekend = (at_s % WEEK_S) >= 5 * S_PER_DAY
        return np.where(weekend, day * self.weekend, day)


class RowLoad(Config, kw_only=True):
    """All requests to a row."""

    rate_per_server: float
    """Requests a second in the busiest hour, over the servers of the row."""
    kinds: tuple[RequestKind, ...] = POLCA_KINDS
    week: Week = Week()
    start_s: float = 0.0
    """Since Monday at midnight."""

    def __post_init__(self) -> None:
        if not 0 < self.rate_per_server <= 1e3:
            what = f"{self.rate_per_server:g} requests a second and server cannot be."
            raise ConfigError(what, "Give a rate above 0, at most 1000.")
        if not self.kinds or abs(sum(kind.share for kind in self.kinds) - 1.0) > 1e-9:
            raise ConfigError("The shares of the kinds of requests do not add up to 1.", "Give each its share.")
        if {kind.priority for kind in self.kinds} != {0, 1}:
            raise ConfigError("A row needs requests of both priorities.", "Give at least one kind of each.")


Rates: TypeAlias = Floats
"""Kinds x steps."""


def rates(load: RowLoad, seed: int, steps: int, step_s: float) -> Rates:
    """Requests a second and server of each kind in each step."""
    at_s = load.start_s + (np.arange(steps, dtype=np.float64) + 0.5) * step_s
    week = load.week.shares(at_s) * load.rate_per_server
    return np.stack(
        [
            week * kind.share * _wandering(kind.bursts, splitmix64(seed, _BURSTS + index), steps, step_s)
            for index, kind in enumerate(load.kinds)
        ]
    )


def _wandering(bursts: Bursts, stream: int, steps: int, step_s: float) -> Floats:
    factor = np.ones(steps)
    for number, (variation, time_s) in enumerate([(bursts.slow_cv, bursts.slow_s), (bursts.fast_cv, bursts.fast_s)]):
        if variation > 0.0:
            factor *= _mean_one(variation, _correlated(splitmix64(stream, number), steps, math.exp(-step_s / time_s)))
    return factor


def _mean_one(variation: float, normal: Floats) -> Floats:
    """Lognormal numbers with mean one."""
    square = math.log1p(variation * variation)
    return np.exp(math.sqrt(square) * normal - square / 2)


def _correlated(stream: int, steps: int, kept: float) -> Floats:
    """Normal numbers, each of which keeps this share of the one before."""
    fresh = (draws.normals(stream, 0, steps) * math.sqrt(1.0 - kept * kept)).tolist()
    value = float(draws.normals(splitmix64(stream, 1), 0, 1)[0])
    found = []
    for new in fresh:
        value = kept * value + new
        found.append(value)
    return np.array(found)
