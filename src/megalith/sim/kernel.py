"""The event kernel: a heap of callbacks in integer nanoseconds, and a hash of all that was decided.

Knows time and order; knows nothing of requests. Two events of the same nanosecond run in the order (priority, order of
scheduling), so a run is the same on every machine.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from hashlib import blake2b
from heapq import heappop, heappush
from typing import Any, Final

ARRIVE: Final = 0
FIRST: Final = 1
FINISH: Final = 2
PREEMPT: Final = 3
COMMAND: Final = 4
MOVE: Final = 5
"""Kinds of entries in the log of decisions."""

OUTSIDE: Final = 0
STEP_END: Final = 1
"""Priorities: what comes from outside an instance is seen by the plan that is formed in the same nanosecond. Steps of
several instances that end in one are taken by instance (STEP_END + its id): a leap is scheduled earlier than a step."""

_LOG_WORDS: Final = 1 << 13


class Kernel:
    """Virtual time. `now_ns` is the time of the event that runs."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.turn_ns = self.turn = -1
        """The last nanosecond in which a step ended, and the instance whose step it was."""
        self.events = 0
        """Events that were run, as of the last return of run()."""
        self._heap: list[tuple[int, int, int, Callable[[Any], object], Any]] = []
        self._order = 0
        self._log: list[int] = []
        self._hash = blake2b(digest_size=16)

    def at(self, time_ns: int, call: Callable[[Any], object], argument: Any = None, priority: int = OUTSIDE) -> None:
        """Call `call(argument)` at `time_ns`, which must not be in the past."""
        if time_ns < self.now_ns:
            raise ValueError(f"{time_ns} ns is before now, {self.now_ns} ns")
        self._order = order = self._order + 1
        heappush(self._heap, (time_ns, priority, order, call, argument))

    def run(self, most: int | None = None) -> bool:
        """Run events in order, at most `most` of them; True when some are left."""
        heap, ran, last = self._heap, 0, -1 if most is None else most
        try:
            while heap and ran != last:
                self.now_ns, _, _, call, argument = heappop(heap)
                ran += 1
                call(argument)
        finally:
            self.events += ran
        return bool(heap)

    def log(self, kind: int, subject: int, value: int) -> None:
        """Add a decision to the hash. Only what leaping and stepping have in common may be logged."""
        log = self._log
        log += (self.now_ns, kind, subject, value)
        if len(log) >= _LOG_WORDS:
            self._flush()

    def digest(self) -> str:
        """Hash of everything logged so far, as hexadecimal text; the same for the same seed on every machine."""
        self._flush()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        words = array("q", self._log)
        if sys.byteorder == "big":
            words.byteswap()
        self._hash.update(words)
        self._log.clear()
