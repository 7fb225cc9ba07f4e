"""The step times of splitwise-sim: measured medians by batch tokens, straight lines between them, in integers.

    prompts only      prompt curve at the prompt tokens of the step
    decodes only      token curve at the number of decodes ("artifact") or their tokens in the cache ("context_aware")
    both              1.1 x prompt curve at prompt tokens + decodes

After splitwise-sim (Patel et al., ISCA 2024; its performance model at commit 8f99e7d). The token curve was measured
over prompt size x batch size, that is over tokens in the cache, but the simulator asks it for the number of sequences:
that is the artifact mode, in which a decode step costs nearly the same whatever the batch. Before the first and after
the last measured point the nearest line goes on. A listed row of one token behind a context counts as a decode.

Times are rounded to the nearest picosecond. Only decodes in context-aware mode run along a line: there it has a whole
number of picoseconds a token, so that steps add up exactly, and is off by at most half of one for each token since the
last measured point. Knows tables by name; knows no cluster and no policy.
"""

from __future__ import annotations

import difflib
import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost.timer import Line, Prompt
from megalith.cost.timer_phases import (
    NO_END,
    POWER_EXPONENT,
    PhasePower,
    at_lower_clock,
    check_clock,
    check_factor,
    memory_slowdown,
    quick_line,
)
from megalith.specs import catalog

TokenQuery: TypeAlias = Literal["artifact", "context_aware"]
TOKEN_QUERIES: tuple[TokenQuery, ...] = ("artifact", "context_aware")
_PS_PER_MS = 1_000_000_000


class SplitwiseTable(Config, kw_only=True):
    """Measured medians of one model on one kind of machine."""

    model: str
    """Catalogue name."""
    device: str
    """Catalogue name."""
    capped: bool = False
    """The devices ran under a power cap of 70 %."""
    tensor_parallel: int
    batch_tokens: tuple[int, ...]
    prompt_ms: tuple[float, ...]
    token_ms: tuple[float, ...]
    power_w: tuple[float, float, float] | None = None
    """Idle, prompt and decode watts of one device."""

    def timer(self, token_query: TokenQuery = "artifact") -> SplitwiseTimer:
        """The timer of this table."""
        power = PhasePower(*self.power_w) if self.power_w else None
        curves = [Curve(self.batch_tokens, times) for times in (self.prompt_ms, self.token_ms)]
        return SplitwiseTimer(curves[0], curves[1], token_query, power)


class Curve:
    """Straight lines through (tokens, milliseconds), the outer ones without end; at least two points."""

    __slots__ = ("_milliseconds", "_points", "_slopes", "_starts", "_tokens")

    def __init__(self, tokens: Sequence[int], milliseconds: Sequence[float], factor: float = 1.0) -> None:
        """Raises ConfigError unless there are two points or more, at rising tokens, above 0 ms."""
        if len(tokens) < 2 or len(tokens) != len(milliseconds) or list(tokens) != sorted(set(tokens)):
            raise ConfigError(f"A curve has times {list(milliseconds)} at tokens {list(tokens)}.", "Give rising pairs.")
        if min(milliseconds) <= 0.0:
            raise ConfigError(f"A measured time is {min(milliseconds)} ms.", "Times must be above 0.")
        points = [(x, round(y * factor * _PS_PER_MS)) for x, y in zip(tokens, milliseconds, strict=True)]
        self._tokens, self._milliseconds = tuple(tokens), tuple(milliseconds)
        self._starts = [start for start, _ in points[1:-1]]
        """Tokens from which on another line than the first holds."""
        self._points = points
        self._slopes = [round((y1 - y0) / (x1 - x0)) for (x0, y0), (x1, y1) in pairwise(points)]

    def at(self, tokens: int) -> int:
        """Picoseconds, to the nearest. Raises ConfigError where the last line has gone below 0."""
        line = bisect_right(self._starts, tokens)
        (x0, y0), (x1, y1) = self._points[line : line + 2]
        return self._above(tokens, y0 + ((tokens - x0) * (y1 - y0) * 2 + x1 - x0) // (2 * (x1 - x0)))

    def line(self, tokens: int) -> tuple[int, int, int]:
        """(picoseconds, picoseconds a token, tokens until the line ends) at and from `tokens` on, in whole slopes."""
        line = bisect_right(self._starts, tokens)
        (x0, y0), slope = self._points[line], self._slopes[line]
        ahead = self._starts[line] - tokens if line < len(self._starts) else NO_END
        return self._above(tokens, y0 + (tokens - x0) * slope), slope, ahead

    def _above(self, tokens: int, value: int) -> int:
        if value <= 0:
            raise ConfigError(
                f"The measured times end at {self._tokens[-1]} tokens and fall there; at {tokens} nothing is left.",
                "Use smaller steps, or another table.",
            )
        return value

    def scaled(self, factor: float) -> Curve:
        """The same points, taking `factor` times as long."""
        return Curve(self._tokens, self._milliseconds, factor)


class SplitwiseTimer:
    """See the module and StepTimer."""

    def __init__(
        self, prompt: Curve, token: Curve, token_query: TokenQuery = "artifact", power: PhasePower | None = None
    ) -> None:
        if token_query not in TOKEN_QUERIES:
            near = difflib.get_close_matches(token_query, TOKEN_QUERIES, n=1, cutoff=0.0)[0]
            raise ConfigError(f"There is no token query {token_query!r}.", f"Did you mean {near!r}?")
        self.token_query = token_query
        self._prompt, self._token, self._power = prompt, token, power
        self._by_context = token_query == "context_aware"
        self._nominal, self._factor, self._clock = self, 1.0, 1.0
        self._lines: dict[int, Line] = {}
        """Artifact mode: the line for each number of decodes."""

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:  # noqa: ARG002
        """See StepTimer."""
        tokens = 0
        for new, context, _ in prompts:
            if new == 1 and context:
                decodes += 1
                context_sum += context
            else:
                tokens += new
        if not tokens:
            return self._token.line(context_sum)[0] if self._by_context else self._token.at(decodes)
        if not decodes:
            return self._prompt.at(tokens)
        return (self._prompt.at(tokens + decodes) * 11 + 5) // 10

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:  # noqa: ARG002
        """See StepTimer. Artifact: the same for ever. Context aware: until the next measured point."""
        if not self._by_context:
            line = self._lines.get(decodes)
            if line is None:
                line = self._lines[decodes] = quick_line((self._token.at(decodes), 0, NO_END))
            return line
        first, slope, ahead = self._token.line(context_sum)
        steps = NO_END if ahead == NO_END else -(-ahead // decodes)
        if slope < 0 and ahead == NO_END:
            steps = 1  # it will reach 0
        return quick_line((first, slope * decodes, steps))

    def scaled(self, factor: float) -> SplitwiseTimer:
        """See DeviceTimer."""
        return self._nominal._slower(self._factor * check_factor(factor), self._clock)

    def at_clock(self, fraction: float) -> SplitwiseTimer:
        """See DeviceTimer: prompts (and steps with both) count as compute, decodes as memory."""
        return self._nominal._slower(self._factor, check_clock(fraction))

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer. Raises ConfigError where splitwise-sim has no figures."""
        if self._power is None:
            raise ConfigError("splitwise-sim has no power figures for this machine.", "Use an uncapped one.")
        return at_lower_clock(self._power, self._clock, exponent)

    def _slower(self, factor: float, clock: float) -> SplitwiseTimer:
        prompt, token = self._prompt.scaled(factor / clock), self._token.scaled(factor * memory_slowdown(clock))
        timer = SplitwiseTimer(prompt, token, self.token_query, self._power)
        timer._nominal, timer._factor, timer._clock = self, factor, clock
        return timer


@functools.cache
def splitwise_tables() -> Mapping[str, SplitwiseTable]:
    """Every table of the catalogue by its name, such as "llama2-70b/h100-80gb/tp8"."""
    return catalog.entries("timers", "splitwise", SplitwiseTable)


def splitwise(name: str) -> SplitwiseTable:
    """The table of that name. Raises ConfigError with the nearest names."""
    return catalog.named(name, splitwise_tables(), "table of splitwise-sim")
