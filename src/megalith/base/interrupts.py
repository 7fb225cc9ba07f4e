"""Ctrl-C at a time of our choosing: between two events of a simulation, not in the middle of one.

Knows signals; must not know what is being done meanwhile.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[None]:
    """A Ctrl-C that comes inside takes effect when the block is over, by whatever handler there was before.

    What is half done is not left half done. It also matters to compiled code: there an exception in the middle of the
    arithmetic of long integers, where CPython looks for signals, ends the process. Keep the block short (a second).
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _number, frame: held.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(signal.SIGINT, held[0])
