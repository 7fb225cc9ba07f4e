"""Clocks as arguments: the engine runs on the machine's, tests and the simulator on one they move by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Anything that says what time it is, in integer nanoseconds from an arbitrary start; never goes back."""

    def now_ns(self) -> int:
        """The time, in nanoseconds."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_ns(self) -> int:
        """The time, in nanoseconds."""
        return time.monotonic_ns()


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        """The time, in nanoseconds."""
        return self._now_ns

    def advance(self, duration_ns: int) -> None:
        """Move forward by `duration_ns`, which must not be negative."""
        if duration_ns < 0:
            raise ValueError(f"a clock cannot go back by {-duration_ns} ns")
        self._now_ns += duration_ns
