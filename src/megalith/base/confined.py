"""Runs a command inside a memory limit and watches it from outside: signals, exit code, peak, and a clear end.

The limit is imposed by a control group where one can be made, else sampled and asserted. The command is one of our own
verbs: over a pipe it says what it planned and when it is ready (`tell`). Must not know what the command does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from megalith.base.errors import ConfigError, LimitExceeded, MachineError
from megalith.base.memory_group import MemoryGroup, clear_stale, find_place
from megalith.base.memory_sample import MemorySampler, cached_bytes, drop_cached
from megalith.base.units import format_bytes

LimitBy = Literal["auto", "cgroup", "measure", "off"]
"""auto: cgroup where the machine allows one, else measure. off: the plan is the only limit."""
CHOICES = ("auto", "cgroup", "measure", "off")
_VARIABLE = "MEGALITH_WATCHER"
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_TICK_S = {"group": 0.5, "sample": 0.05}
_LAST_WORDS_S = 10.0
_PR_SET_PDEATHSIG = 1
_channel: int | None = None


@dataclass(frozen=True, slots=True)
class Peak:
    """The peak at one moment, and what it is held against."""

    event: Literal["ready", "exit"]
    peak_bytes: int
    limit_bytes: int
    planned_bytes: int | None
    means: str
    held_elsewhere_bytes: int = 0
    """Pages of the given files that were cached before the start and could not be dropped: not in the peak."""

    def __str__(self) -> str:
        planned = "" if self.planned_bytes is None else f", planned {format_bytes(self.planned_bytes)}"
        text = f"peak {format_bytes(self.peak_bytes)} of {format_bytes(self.limit_bytes)} ({self.means}){planned}"
        if self.held_elsewhere_bytes:
            held = format_bytes(self.held_elsewhere_bytes)
            text += f"; {held} of the model's pages were cached before by someone else and are not in the peak"
        return text


@dataclass(frozen=True, slots=True)
class Confinement:
    """What to confine to. `files` are those whose page cache shall count from the first byte (the model's)."""

    limit_bytes: int
    limit_by: LimitBy = "auto"
    files: tuple[Path, ...] = ()


def is_confined() -> bool:
    """Whether this process already runs under a watcher of ours."""
    return _channel is not None or _VARIABLE in os.environ


def tell(**facts: int | bool) -> None:
    """Tell the watcher `planned_bytes=...` or `ready=True`; without one, do nothing."""
    global _channel
    if _channel is None:
        # Taken out of the environment, so that commands which we start are not taken for confined ones.
        given = os.environ.pop(_VARIABLE, "")
        if not given.isdigit():
            return
        _channel = int(given)
        os.set_inheritable(_channel, False)
    with contextlib.suppress(OSError):
        os.write(_channel, json.dumps(facts).encode() + b"\n")


def run_confined(command: Sequence[str], wish: Confinement, on_peak: Callable[[Peak], None]) -> int:
    """Run `command` to its end; its exit code (128 + N where signal N ended it). `on_peak` is called when it is ready
    and at its end.

    Raises LimitExceeded when it needed more, MachineError when `limit_by` is cgroup and none can be had.
    """
    if wish.limit_by not in CHOICES[:3]:
        raise ConfigError(f"There is no way {wish.limit_by!r} to limit memory.", f"Take {', '.join(CHOICES)}.")
    place = find_place() if wish.limit_by != "measure" else "it was not asked for"
    if isinstance(place, str):
        if wish.limit_by == "cgroup":
            raise MachineError(f"No memory group can be had: {place}.", "Use --limit-by measure, or run as root.")
        sampler = MemorySampler(wish.limit_bytes, wish.files)
        return _Watch(command, wish, sampler, None, on_peak).run()
    clear_stale(place)
    with contextlib.closing(MemoryGroup(place, wish.limit_bytes)) as group:
        return _Watch(command, wish, None, group, on_peak).run()


class _Watch:
    """One run; exactly one of `sampler` and `group` is given."""

    def __init__(
        self, command: Sequence[str], wish: Confinement, sampler: MemorySampler | None, group: MemoryGroup | None,
        on_peak: Callable[[Peak], None],
    ) -> None:  # fmt: skip
        self._command, self._wish, self._sampler, self._group = command, wish, sampler, group
        self._on_peak = on_peak
        self._planned_bytes: int | None = None
        self._over_bytes = 0
        # Cached pages are charged to whoever touched them first: those of the model shall be charged to the group.
        drop_cached(wish.files)
        self._elsewhere_bytes = sum(cached_bytes(path) for path in wish.files) if group is not None else 0

    def run(self) -> int:
        reader, writer = os.pipe()
        try:
            with self._started(writer) as child, _forwarding(child):
                os.close(writer)
                writer = -1
                self._follow(child, reader)
                code = child.wait(_LAST_WORDS_S)
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        self._report("exit")
        kills = self._group.kills() if self._group is not None else 0
        if self._over_bytes or (kills and code in (-signal.SIGKILL, 128 + signal.SIGKILL)):
            raise self._exceeded()
        return code if code >= 0 else 128 - code

    def _started(self, writer: int) -> subprocess.Popen[bytes]:
        libc = ctypes.CDLL(None)
        group = self._group

        def enter() -> None:
            # The watcher's death ends the command, too: it drains as after SIGTERM.
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if group is not None:
                group.enter()

        try:
            # A session of its own: Ctrl-C reaches the watcher alone, which passes it on once.
            return subprocess.Popen(
                self._command, pass_fds=(writer,), env={**os.environ, _VARIABLE: str(writer)}, preexec_fn=enter,
                start_new_session=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            raise MachineError(f"{self._command[0]} cannot be started inside the limit: {error}.") from None

    def _follow(self, child: subprocess.Popen[bytes], reader: int) -> None:
        """Until the command has ended."""
        heard, tick_s = b"", _TICK_S["group" if self._sampler is None else "sample"]
        open_pipe = True
        while child.poll() is None:
            readable, _, _ = select.select([reader] if open_pipe else [], [], [], tick_s)
            if readable:
                piece = os.read(reader, 65536)
                open_pipe = bool(piece)
                *lines, heard = (heard + piece).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
            if self._sampler is not None and child.poll() is None and not self._over_bytes:
                held = self._sampler.sample(child.pid)
                if held > self._wish.limit_bytes:
                    self._over_bytes = held
                    child.kill()

    def _hear(self, facts: dict[str, int | bool]) -> None:
        if "planned_bytes" in facts:
            self._planned_bytes = int(facts["planned_bytes"])
        if facts.get("ready"):
            self._report("ready")

    def _report(self, event: Literal["ready", "exit"]) -> None:
        meter = self._group or self._sampler
        assert meter is not None
        means = f"measured from outside: {meter.means}, page cache counted"
        self._on_peak(
            Peak(event, meter.peak_bytes(), self._wish.limit_bytes, self._planned_bytes, means, self._elsewhere_bytes)
        )

    def _exceeded(self) -> LimitExceeded:
        limit = format_bytes(self._wish.limit_bytes)
        planned = "" if self._planned_bytes is None else f"; the plan had said {format_bytes(self._planned_bytes)}"
        hint = "Give a larger --memory, or fewer --max-sequences or a shorter --context."
        if self._sampler is not None:
            what = f"The process held {format_bytes(self._over_bytes)}, sampled from outside with the page cache of its"
            return LimitExceeded(f"{what} files, which is above the limit of {limit}; it was ended{planned}.", hint)
        return LimitExceeded(
            f"The process wanted more than its limit of {limit}, and nothing inside could be given up, so the kernel "
            f"ended it{planned}.", hint,
        )  # fmt: skip


@contextlib.contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals that come to us go to the child; what it does about them is its affair."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # Whatever ended the watch early (a bug of ours) must not leave the command behind.
        if child.poll() is None:
            child.kill()
