"""A trace for Perfetto (ui.perfetto.dev) and chrome://tracing, written as it happens.

Knows processes, slices, spans, arrows, counters and instants; must not know what they mean. The format is the JSON
object form of the Chrome trace-event format: `X` complete slices, which on one thread must nest or follow one another;
`b`/`e` nestable asynchronous spans, matched by category and id; `s`/`f` flow arrows between slices; `C` counters; `i`
instants; `M` names. Times are microseconds with three decimals, so integer nanoseconds are kept exactly. Order in the
file is free.

The file is bounded by a number of events. What comes after is counted, not written, and the file says so.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from megalith.base.errors import ConfigError
from megalith.report.guarded import WholeFile, guarded

MOST_EVENTS = 1_000_000
"""About 120 MB of JSON, 8 MB compressed: what the viewers still open."""

_BUFFERED = 2_000
Arguments = Mapping[str, str | int | float | bool | None]


def check_trace_path(path: Path) -> None:
    """Raise ConfigError before the work, not after it."""
    if not path.name.endswith((".json", ".json.gz")):
        raise ConfigError(f"{path.name!r} is no trace file.", "End the name in .json or .json.gz.")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent}.", "Make it, or name another file.")


class TraceWriter(WholeFile):
    """Writes one trace. Use as a context manager: the file appears at the end, and not at all after an exception.

    `facts` (nature, settings) stand in the file's `otherData`. All times are integer nanoseconds. MachineError when the
    disk is full; nothing is left behind then.
    """

    def __init__(self, path: Path, facts: Mapping[str, str], most_events: int = MOST_EVENTS) -> None:
        check_trace_path(path)
        self.events = 0
        """Written, names of processes and threads not counted."""
        self.left_out = 0
        """Came after the bound was reached."""
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._facts = dict(facts)
        self._most = most_events
        self._last_ns = 0
        self._flow = 0
        self._encode = msgspec.json.Encoder().encode
        self._held: list[bytes] = []
        self._begun = False
        self._file: IO[bytes] | gzip.GzipFile | None = None
        with self._guarded():
            self._file = _open(self._partial, compressed=path.name.endswith(".gz"))
            self._file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')

    # Names

    def process(self, pid: int, name: str, sort_index: int | None = None) -> None:
        """Name a process; they are shown by rising `sort_index` (its pid if None)."""
        self._name(pid, 0, "process_name", {"name": name})
        self._name(pid, 0, "process_sort_index", {"sort_index": pid if sort_index is None else sort_index})

    def thread(self, pid: int, tid: int, name: str) -> None:
        """Name a thread of a process; shown by rising `tid`."""
        self._name(pid, tid, "thread_name", {"name": name})
        self._name(pid, tid, "thread_sort_index", {"sort_index": tid})

    # Events

    def slice(
        self, pid: int, tid: int, name: str, start_ns: int, end_ns: int, arguments: Arguments | None = None
    ) -> None:
        """Something that took from `start_ns` to `end_ns` on a thread, whose slices nest or follow one another."""
        if end_ns < start_ns:
            raise ValueError(f"slice {name!r} ends at {end_ns} ns, before it starts at {start_ns} ns")
        if self._room(1, end_ns):
            body = {"ph": "X", "ts": _us(start_ns), "dur": _us(end_ns - start_ns), "pid": pid, "tid": tid}
            self._put(body, name, arguments)

    def span(
        self, pid: int, key: tuple[str, int], name: str, start_ns: int, end_ns: int, arguments: Arguments | None = None
    ) -> None:
        """Something that may overlap others of its process. Spans of one key (category, id) are stacked by nesting."""
        if end_ns < start_ns:
            raise ValueError(f"span {name!r} ends at {end_ns} ns, before it starts at {start_ns} ns")
        if self._room(2, end_ns):
            place = {"cat": key[0], "id": key[1], "pid": pid, "tid": 0}
            self._put({"ph": "b", "ts": _us(start_ns), **place}, name, arguments)
            self._put({"ph": "e", "ts": _us(end_ns), **place}, name, None)

    def arrow(self, name: str, source: tuple[int, int, int], target: tuple[int, int, int]) -> None:
        """An arrow between two slices: (pid, tid, ns) of each, a time within the slice, the target's not earlier."""
        if target[2] < source[2]:
            raise ValueError(f"arrow {name!r} goes back in time, from {source[2]} ns to {target[2]} ns")
        if self._room(2, target[2]):
            self._flow += 1
            key = {"cat": "flow", "id": self._flow}
            self._put({"ph": "s", "ts": _us(source[2]), "pid": source[0], "tid": source[1], **key}, name, None)
            end = {"ph": "f", "bp": "e", "ts": _us(target[2]), "pid": target[0], "tid": target[1]}
            self._put({**end, **key}, name, None)

    def counter(self, pid: int, name: str, at_ns: int, values: Mapping[str, float]) -> None:
        """Values from `at_ns` on, drawn stacked under one name of a process."""
        if self._room(1, at_ns):
            self._put({"ph": "C", "ts": _us(at_ns), "pid": pid, "tid": 0}, name, values)

    def instant(
        self, pid: int, name: str, at_ns: int, arguments: Arguments | None = None, *, everywhere: bool = False
    ) -> None:
        """Something without duration, on one process or drawn over all of them."""
        if self._room(1, at_ns):
            scope = "g" if everywhere else "p"
            self._put({"ph": "i", "s": scope, "ts": _us(at_ns), "pid": pid, "tid": 0}, name, arguments)

    # Ends

    def close(self) -> None:
        """Complete the file and put it in its place."""
        if self._file is None:
            return
        if self.left_out:
            note = f"Cut at {self.events:,} events; {self.left_out:,} later ones are left out."
            self._facts["note"] = note
            self._put({"ph": "i", "s": "g", "ts": _us(self._last_ns), "pid": 0, "tid": 0}, note, None)
        with self._guarded():
            self._flush()
            self._file.write(b'\n],"otherData":' + self._encode(self._facts) + b"}\n")
            self._file.close()
            self._file = None
            self._partial.replace(self._path)

    def discard(self) -> None:
        """Give up; nothing is left behind but an older file of that name. After `close` it does nothing."""
        held, self._file = self._file, None
        self._held = []
        if held is not None:
            # On a full disk the last flush fails, and is unwanted anyway.
            with suppress(OSError):
                held.close()
            self._partial.unlink(missing_ok=True)

    def _guarded(self) -> AbstractContextManager[None]:
        return guarded(self._path, lambda: f"{self.events:,} events", self.discard)

    def _room(self, count: int, at_ns: int) -> bool:
        """Whether `count` more events may be written. Once one was left out all are: no gap looks like quiet."""
        if self.left_out or self.events + count > self._most:
            self.left_out += count
            return False
        self.events += count
        self._last_ns = max(self._last_ns, at_ns)
        return True

    def _name(self, pid: int, tid: int, what: str, arguments: Arguments) -> None:
        self._put({"ph": "M", "pid": pid, "tid": tid}, what, arguments)

    def _put(self, body: dict[str, Any], name: str, arguments: Arguments | None) -> None:
        body["name"] = name
        if arguments is not None:
            body["args"] = arguments
        self._held.append(self._encode(body))
        if len(self._held) >= _BUFFERED:
            with self._guarded():
                self._flush()

    def _flush(self) -> None:
        if self._file is None or not self._held:
            return
        self._file.write((b",\n" if self._begun else b"") + b",\n".join(self._held))
        self._begun = True
        self._held = []


def _open(path: Path, *, compressed: bool) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path, "wb", compresslevel=4) if compressed else path.open("wb")


def _us(time_ns: int) -> msgspec.Raw:
    """Nanoseconds as a JSON number of microseconds, exactly."""
    sign, time_ns = ("-", -time_ns) if time_ns < 0 else ("", time_ns)
    return msgspec.Raw(f"{sign}{time_ns // 1000}.{time_ns % 1000:03d}".encode())
