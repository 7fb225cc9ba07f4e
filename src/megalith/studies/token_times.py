"""When each token of each request came, on one instance that never idles: what a rule on running averages needs.

Knows steps and requests; must not know policies. A run keeps durations of steps and ends of requests, and on a single
busy instance the two together give every token: a request that decodes has one token in each step with decodes between
its first and its last. Runs with preemptions have holes and are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalith.cost.timer import PS_PER_NS
from megalith.sim.histogram import IntArray
from megalith.sim.record import Columns, Recorder

_TOLERANCE_NS = 2_000
"""Ends of steps are whole picoseconds, ends of requests nanoseconds, and each leap rounds once."""


class Answer(NamedTuple):
    """One finished request."""

    prompt_tokens: int
    ttft_ns: int
    gaps_s: NDArray[np.float64]
    """Between its tokens, in order."""


class TokenClock(Recorder):
    """A recorder that also keeps every step and every request; for runs of some thousand requests."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []
        self._ended: list[Columns] = []
        super().__init__(sink=self._ended.append)

    def steps(self, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        """See Recorder."""
        self._rows.append((first_ps, slope_ps, steps, decodes))
        super().steps(first_ps, slope_ps, steps, decodes)

    def prompt_step(self, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        """See Recorder."""
        self._rows.append((duration_ps, 0, 1, decodes))
        super().prompt_step(duration_ps, prompt_tokens, decodes)

    def late_step(self, duration_ps: int, prompt_tokens: int, decodes: int, waits: list[tuple[int, int]]) -> None:
        """See Recorder."""
        self._rows.append((duration_ps, 0, 1, decodes))
        super().late_step(duration_ps, prompt_tokens, decodes, waits)

    def answers(self) -> list[Answer]:
        """Every finished request with its gaps. ValueError where steps and requests do not fit together."""
        self.flush()
        ends_ns = self._token_ends_ns()
        found = []
        for columns in self._ended:
            names = ("arrival_ns", "first_ns", "finish_ns", "prompt_tokens", "generated", "outcome")
            for arrival, first, finish, prompt, tokens, outcome in zip(
                *(columns[name].tolist() for name in names), strict=True
            ):
                if outcome == 0:
                    gaps = _gaps(ends_ns, first, finish, tokens)
                    found.append(Answer(prompt, first - arrival, gaps))
        return found

    def _token_ends_ns(self) -> NDArray[np.float64]:
        """Ends of the steps that had decodes, when the instance has worked without a break since time zero."""
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, 4)
        first, slope, steps, decodes = rows.T
        row = np.repeat(np.arange(len(rows)), steps)
        place = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps, steps)
        durations: IntArray = first[row] + place * slope[row]
        ends: NDArray[np.float64] = np.cumsum(durations)[decodes[row] > 0] / PS_PER_NS
        return ends


def _gaps(ends_ns: NDArray[np.float64], first_ns: int, finish_ns: int, tokens: int) -> NDArray[np.float64]:
    """Seconds between the tokens of a request."""
    begin = np.searchsorted(ends_ns, first_ns + _TOLERANCE_NS)
    end = np.searchsorted(ends_ns, finish_ns + _TOLERANCE_NS)
    times = np.concatenate(([float(first_ns)], ends_ns[begin:end]))
    if len(times) != tokens or abs(times[-1] - finish_ns) > _TOLERANCE_NS:
        raise ValueError(f"{len(times)} steps for {tokens} tokens: the instance idled, or a request was preempted")
    gaps: NDArray[np.float64] = np.diff(times) / 1e9
    return gaps


def largest_average(gaps_s: NDArray[np.float64], span: int) -> float:
    """The largest exponentially weighted mean of the gaps up to each token; weights fall by (span - 1) / (span + 1).

    The rule of DeepSpeed's benchmark (span 16), whose early means have only the gaps that there are so far.
    """
    keep = (span - 1) / (span + 1)
    total = weight = largest = 0.0
    for gap in gaps_s.tolist():
        total, weight = gap + keep * total, 1.0 + keep * weight
        largest = max(largest, total / weight)
    return largest
