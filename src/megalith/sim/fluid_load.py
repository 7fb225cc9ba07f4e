"""Arrivals at the servers of a row, some thousand steps at a time.

Requests are drawn one by one: those of each kind are a Poisson process whose clock runs as fast as the rate of that
moment says, and each goes to a server of its priority's pool, with equal chances, from the seed. So spikes of different
servers meet as often as chance has it. The draws of the router `by-priority` are the same ones: an exact run of these
requests puts each on the same server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalith.base.random import splitmix64
from megalith.specs import draws
from megalith.specs.draws import Floats, Ints
from megalith.specs.row_load import Rates, RequestKind

_ARRIVALS = 60
_DRAWS = 4096
_SHARE = 2.0**-52


class Arrivals(NamedTuple):
    """Requests of some steps, in the order of (step, rank)."""

    at_s: Floats
    server: Ints
    kind: Ints
    bounds: list[list[int]]
    """By step, where each rank begins and the last ends: within a rank no server comes twice, and those of a server
    come in the order of time."""


@dataclass
class _Stream:
    """Unit-rate Poisson process of one kind."""

    seed: int
    drawn: int = 0
    clock: float = 0.0
    """Of the process, up to the last step."""
    ahead: Floats | None = None
    """Arrivals that were drawn and have not come."""

    def until(self, clock: float) -> Floats:
        """Arrivals up to then, by the clock of the process."""
        ahead = np.empty(0) if self.ahead is None else self.ahead
        while not len(ahead) or ahead[-1] < clock:
            last = ahead[-1] if len(ahead) else (0.0 if self.drawn == 0 else self._last)
            more = last + np.cumsum(draws.exponentials(self.seed, self.drawn, _DRAWS))
            self.drawn += _DRAWS
            self._last = float(more[-1])
            ahead = np.concatenate([ahead, more])
        here = int(np.searchsorted(ahead, clock))
        self.ahead = ahead[here:]
        return ahead[:here]

    _last: float = 0.0


class RowArrivals:
    """Arrivals at one row of `low` and `high` servers; `first` is the number of its first server."""

    def __init__(self, kinds: Sequence[RequestKind], low: int, high: int, first: int, seed: int) -> None:
        self._streams = [_Stream(splitmix64(seed, _ARRIVALS + index)) for index in range(len(kinds))]
        self._pools = ((0, first, low), (1, first + low, high))
        self._kinds = [[index for index, kind in enumerate(kinds) if kind.priority == pool] for pool in (0, 1)]
        self._servers = low + high
        self._seed = seed
        self._routed = [0, 0]

    def take(self, rates: Rates, first_step: int, step_s: float) -> tuple[Floats, Ints, Ints]:
        """(time, server, kind) of the arrivals in the next steps, the first of which has that number."""
        steps = rates.shape[1]
        edges = (first_step + np.arange(steps + 1)) * step_s
        found = []
        for priority, first, count in self._pools:
            times, kinds = [], []
            for kind in self._kinds[priority]:
                stream = self._streams[kind]
                clocks = np.concatenate([[0.0], np.cumsum(rates[kind] * self._servers * step_s)]) + stream.clock
                stream.clock = float(clocks[-1])
                at_s = np.interp(stream.until(stream.clock), clocks, edges)
                times.append(at_s)
                kinds.append(np.full(len(at_s), kind))
            at_s, kind_of = np.concatenate(times), np.concatenate(kinds)
            order = np.argsort(at_s, kind="stable")
            server = first + pick_servers(self._seed, priority, self._routed[priority], len(at_s), count)
            self._routed[priority] += len(at_s)
            found.append((at_s[order], server, kind_of[order]))
        at_s, servers, kind_of = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return at_s, servers, kind_of


def pick_servers(seed: int, priority: int, routed: int, count: int, servers: int) -> Ints:
    """Which of its pool's servers the requests number `routed` and following go to: the draws of `by-priority`."""
    words = draws.words(splitmix64(seed, priority), routed + 1, count)
    return np.minimum(((words >> np.uint64(12)).astype(np.float64) * _SHARE * servers).astype(np.int64), servers - 1)


def in_steps(parts: Sequence[tuple[Floats, Ints, Ints]], first_step: int, steps: int, step_s: float) -> Arrivals:
    """The arrivals of several rows, sorted for a simulation that goes step by step."""
    at_s, server, kind = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    step = np.clip((at_s / step_s).astype(np.int64) - first_step, 0, steps - 1)
    order = np.lexsort((at_s, server, step))
    at_s, server, kind, step = at_s[order], server[order], kind[order], step[order]
    rank = _ranks(step, server)
    order = np.lexsort((server, rank, step))
    width = int(rank.max(initial=0)) + 1
    edges = np.searchsorted((step * width + rank)[order], np.arange(steps * width + 1))
    starts = edges[:-1].reshape(steps, width)
    ends = edges[1:].reshape(steps, width)
    bounds = [
        [row[0], *(end for start, end in zip(row, stop, strict=True) if end > start)]
        for row, stop in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return Arrivals(at_s[order], server[order], kind[order], bounds)


def _ranks(step: Ints, server: Ints) -> NDArray[np.int64]:
    """How many of the same step and server stand before each, in sorted columns."""
    count = len(step)
    if not count:
        return np.zeros(0, dtype=np.int64)
    fresh = np.ones(count, dtype=bool)
    fresh[1:] = (step[1:] != step[:-1]) | (server[1:] != server[:-1])
    begins = np.maximum.accumulate(np.where(fresh, np.arange(count), 0))
    return np.arange(count) - begins
