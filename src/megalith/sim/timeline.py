"""Levels over simulated time (requests in the cluster, tokens a second) in a fixed number of equal bins.

Knows times and changes of a level; must not know what the level is. Changes come in any order: a request says at its
end when it came and when it left. When a time lies past the last bin, bins are joined by pairs, so memory never grows.
The integral of a level over any run of bins is exact up to floating point.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megalith.sim.histogram import IntArray

FloatArray: TypeAlias = NDArray[np.float64]

FIRST_WIDTH_NS = 1 << 20


class Timeline:
    """`levels` piecewise constant curves and `counts` numbers of happenings, on the same bins from time 0.

    Within a bin only sums are known, so a window is a run of whole bins; a bin is at most 2/bins of the time covered.
    """

    def __init__(self, levels: int, counts: int, bins: int = 2048) -> None:
        if bins < 2 or bins % 2:
            raise ValueError(f"{bins} bins cannot be joined by pairs")
        self.bins = bins
        self.width_ns = FIRST_WIDTH_NS
        # Of each change, what it adds to the level of all later bins, and its integral over the rest of its own bin.
        self._steps = np.zeros((levels, bins + 1))
        self._rests = np.zeros((levels, bins))
        self._counts = np.zeros((counts, bins))

    def change(self, level: int, times_ns: IntArray, by: FloatArray | float) -> None:
        """At each time the level goes up by `by` (down below zero)."""
        if len(times_ns) == 0:
            return
        at = self._bins_of(times_ns)
        rest = ((at + 1) * self.width_ns - times_ns).astype(np.float64)
        if isinstance(by, float | int):
            self._rests[level] += np.bincount(at, weights=rest, minlength=self.bins) * by
            self._steps[level] += np.bincount(at + 1, minlength=self.bins + 1) * float(by)
        else:
            self._rests[level] += np.bincount(at, weights=rest * by, minlength=self.bins)
            self._steps[level] += np.bincount(at + 1, weights=by, minlength=self.bins + 1)

    def count(self, counter: int, times_ns: IntArray, weights: IntArray | None = None) -> None:
        """`weights` (else 1) happened at each time."""
        if len(times_ns):
            self._counts[counter] += np.bincount(self._bins_of(times_ns), weights=weights, minlength=self.bins)

    def means(self, level: int, start: int = 0, stop: int | None = None) -> FloatArray:
        """The mean level in each bin of start..stop."""
        held = np.cumsum(self._steps[level])[: self.bins]
        means: FloatArray = held + self._rests[level] / self.width_ns
        return means[start : self.bins if stop is None else stop]

    def counted(self, counter: int, start: int = 0, stop: int | None = None) -> FloatArray:
        """How much happened in each bin of start..stop."""
        return self._counts[counter, start : self.bins if stop is None else stop].copy()

    def window(self, start_ns: int, end_ns: int) -> tuple[int, int]:
        """The bins that lie wholly in [start_ns, end_ns), as start and stop; empty when there is none."""
        start = -(-start_ns // self.width_ns)
        return start, max(start, min(end_ns // self.width_ns, self.bins))

    def merge(self, other: Timeline) -> None:
        """Add the levels and counts of `other`, which has the same shape."""
        if (self._steps.shape, self._counts.shape) != (other._steps.shape, other._counts.shape):
            raise ValueError("two timelines of different shapes")
        while other.width_ns < self.width_ns:
            other._join()
        while self.width_ns < other.width_ns:
            self._join()
        self._steps += other._steps
        self._rests += other._rests
        self._counts += other._counts

    def _bins_of(self, times_ns: IntArray) -> IntArray:
        last = int(times_ns.max())
        while last >= self.bins * self.width_ns:
            self._join()
        at: IntArray = times_ns // self.width_ns
        return at

    def _join(self) -> None:
        """Bins by pairs. A change in the first of a pair held for all of the second; that moves into the rest."""
        half = self.bins // 2
        steps, rests = self._steps, self._rests
        new_steps, new_rests = np.zeros_like(steps), np.zeros_like(rests)
        # steps[:, b] holds from bin b on, so those at odd b act for one old bin, the second of pair b // 2, ...
        odd = steps[:, 1 : self.bins : 2]
        new_rests[:, :half] = rests[:, 0::2] + rests[:, 1::2] + odd * self.width_ns
        # ... and from the next pair on as a step of it.
        new_steps[:, : half + 1] = steps[:, 0 : self.bins + 1 : 2]
        new_steps[:, 1 : half + 1] += odd
        self._steps, self._rests = new_steps, new_rests
        counts = np.zeros_like(self._counts)
        counts[:, :half] = self._counts[:, 0::2] + self._counts[:, 1::2]
        self._counts = counts
        self.width_ns *= 2
