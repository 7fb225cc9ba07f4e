"""Ctrl-C waits for the end of the block, and only there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from megalith.base.interrupts import held_interrupts


def interrupted(then: Callable[[], object]) -> None:
    with held_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        then()


def test_it_comes_when_the_block_is_over() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: done.append(1))
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_inside_goes_first() -> None:
    with pytest.raises(ZeroDivisionError):
        interrupted(lambda: 1 // 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_whoever_ignores_it_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    seen = []

    def work() -> None:
        with held_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
