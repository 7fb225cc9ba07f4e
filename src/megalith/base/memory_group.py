"""A memory control group of the kernel: a limit on processes from outside, which counts the page cache that they fill.

Knows the two interfaces: version 1 (kernel documentation, admin-guide/cgroup-v1/memory.rst) and version 2
(admin-guide/cgroup-v2.rst). Must not know what runs inside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megalith.base.errors import MachineError
from megalith.base.memory_sample import kernel_lines
from megalith.base.units import format_bytes

_PREFIX = "megalith-"
_PROC = Path("/proc")
_REMOVE_S = 5.0
_RETRY_S = 0.01


class Names(NamedTuple):
    """What the files of one version of the interface are called."""

    version: int
    limit: str
    swap_limit: str
    peak: str
    events: str


V1 = Names(1, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
V2 = Names(2, "memory.max", "memory.swap.max", "memory.peak", "memory.events")


@dataclass(frozen=True, slots=True)
class Place:
    """A group below which we may make others."""

    folder: Path
    names: Names

    @property
    def means(self) -> str:
        """For people: which controller."""
        return f"cgroup v{self.names.version}"


def find_place(proc: Path = _PROC) -> Place | str:
    """Where a limited group can be made, or why nowhere. Makes and removes an empty group to know it for certain."""
    reasons = []
    for place in _candidates(proc):
        probe = place.folder / f"{_PREFIX}{os.getpid()}-probe"
        try:
            probe.mkdir()
        except OSError as error:
            reasons.append(f"{place.folder} ({error.strerror})")
            continue
        usable = all((probe / name).exists() for name in (place.names.limit, place.names.peak, "cgroup.procs"))
        with contextlib.suppress(OSError):
            probe.rmdir()
        if usable:
            return place
        reasons.append(f"{place.folder} (no {place.names.limit} or no {place.names.peak})")
    return f"no group can be made in {', '.join(reasons)}" if reasons else "the kernel shows no memory control group"


def _candidates(proc: Path) -> list[Place]:
    """Groups to try, ours first. In version 2 ours holds processes, so the group above, where it is lent to us."""
    groups = {}
    for line in kernel_lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        groups[controllers or "v2"] = path
    found = []
    for mount in kernel_lines(proc / "self/mountinfo"):
        fields, _, source = mount.partition(" - ")
        root, point = (_unescaped(text) for text in fields.split()[3:5])
        kind, _, options = source.split(" ", 2)
        if kind == "cgroup" and "memory" in options.split(" ")[-1].split(","):
            path = next((p for names, p in groups.items() if "memory" in names.split(",")), "/")
            found.append(Place(_below(point, root, path), V1))
        elif kind == "cgroup2":
            own = _below(point, root, groups.get("v2", "/"))
            for folder in (own, *own.parents):
                if not folder.is_relative_to(point):
                    break
                if "memory" in " ".join(kernel_lines(folder / "cgroup.subtree_control")).split():
                    found.append(Place(folder, V2))
    return found


def _below(point: str, root: str, path: str) -> Path:
    """The folder of the group `path` in a file system mounted at `point` that shows the groups from `root` on."""
    inside = path.removeprefix(root.rstrip("/")) if path.startswith(root) else "/"
    return Path(point) / inside.strip("/")


def _unescaped(text: str) -> str:
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


class MemoryGroup:
    """One group with a hard limit, made on construction, gone after `close` (idempotent).

    Raises MachineError when the kernel refuses it. The name holds our process id and start time, so that a later run
    can tell groups whose maker is gone (`clear_stale`).
    """

    def __init__(self, place: Place, limit_bytes: int) -> None:
        self._names = place.names
        self.means = place.means
        self.folder = place.folder / f"{_PREFIX}{os.getpid()}-{_started(os.getpid())}-{time.monotonic_ns()}"
        try:
            self.folder.mkdir()
            (self.folder / self._names.limit).write_text(str(limit_bytes))
        except OSError as error:
            self.close()
            raise MachineError(
                f"The memory group {self.folder} of {format_bytes(limit_bytes)} cannot be made: {error.strerror}.",
                "Use --limit-by measure.",
            ) from None
        # Swapped-out pages are not memory saved but time lost; where swap is not accounted there is nothing to set.
        with contextlib.suppress(OSError):
            (self.folder / self._names.swap_limit).write_text(str(limit_bytes if self._names.version == 1 else 0))
        self._entry = os.open(self.folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def enter(self) -> None:
        """Put the calling process into the group; for the child between fork and exec. Raises OSError."""
        os.write(self._entry, b"0")

    def peak_bytes(self) -> int:
        """The most that the group ever held: anonymous memory, page cache and what the kernel keeps for it."""
        return int((self.folder / self._names.peak).read_text())

    def kills(self) -> int:
        """Processes that the kernel killed because the limit left no other way."""
        for line in kernel_lines(self.folder / self._names.events):
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
        return 0

    def processes(self) -> list[int]:
        """Process ids inside."""
        return [int(line) for line in kernel_lines(self.folder / "cgroup.procs")]

    def close(self) -> None:
        """End what is still inside, and remove the group; what cannot be removed now is left to `clear_stale`."""
        if hasattr(self, "_entry"):
            os.close(self._entry)
            del self._entry
        deadline = time.monotonic() + _REMOVE_S
        while self.folder.exists() and time.monotonic() < deadline:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(_RETRY_S)


def clear_stale(place: Place) -> int:
    """Remove empty groups whose maker is dead; their number. Groups with processes are left alone."""
    removed = 0
    for folder in place.folder.glob(f"{_PREFIX}*"):
        parts = folder.name.removeprefix(_PREFIX).split("-")
        if not parts[0].isdigit() or (len(parts) > 1 and _started(int(parts[0])) == parts[1]):
            continue
        with contextlib.suppress(OSError):  # EBUSY: someone is inside
            folder.rmdir()
            removed += 1
    return removed


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty when there is none of that id."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
