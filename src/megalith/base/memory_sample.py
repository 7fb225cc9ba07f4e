"""Memory of a process tree, sampled from outside: the second-best means, where no control group can be had.

Counts anonymous and shared memory of every process, and the resident pages of every file that one of them maps or has
had open, each file once. Locked pages are among these already. A peak between two samples is missed, and library pages
that others use too are counted in full: the figure is measured, not imposed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_CACHESTAT = 451
"""Number of the system call, the same on all architectures (Linux 6.5)."""
_MAX_FILES = 4096
_ANONYMOUS = ("Anonymous:", "Pss_Shmem:", "Private_Hugetlb:", "Shared_Hugetlb:")


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recent"))


def cached_bytes(path: Path | str) -> int:
    """Bytes of a file in the page cache; 0 where it cannot be opened."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        pages = _CacheStat()
        whole = _Range(0, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(_CACHESTAT, handle, ctypes.byref(whole), ctypes.byref(pages), 0) == 0:
            return int(pages.cache) * mmap.PAGESIZE
        return _resident_by_mincore(libc, handle)
    finally:
        os.close(handle)


def _resident_by_mincore(libc: ctypes.CDLL, handle: int) -> int:
    """The same by mapping the file, for kernels before 6.5."""
    size = os.fstat(handle).st_size
    if size == 0:
        return 0
    # A private writable mapping, never written: ctypes takes the address of writable memory only.
    with mmap.mmap(handle, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        anchor = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), pages)
        del anchor
        return 0 if failed else sum(page & 1 for page in pages) * mmap.PAGESIZE


def drop_cached(paths: Iterable[Path | str]) -> None:
    """Ask the kernel to forget the clean, unmapped pages of these files."""
    for path in paths:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


class MemorySampler:
    """Samples of one process and its descendants. `peak_bytes` is the largest sample so far."""

    means = "sampled, not imposed"

    def __init__(self, limit_bytes: int, files: Iterable[Path] = ()) -> None:
        self._limit_bytes = limit_bytes
        self._peak_bytes = 0
        self._files: dict[tuple[int, int], str] = {}
        for path in files:
            self._note(str(path))

    def peak_bytes(self) -> int:
        """The largest sample that remained after the page cache had been asked to shrink."""
        return self._peak_bytes

    def sample(self, pid: int) -> int:
        """Bytes held now. Above the limit the page cache of the files is dropped first, then measured again."""
        total = self._measure(pid)
        if total > self._limit_bytes:
            drop_cached(self._files.values())
            total = self._measure(pid)
        self._peak_bytes = max(self._peak_bytes, total)
        return total

    def _measure(self, pid: int) -> int:
        total = 0
        for process in _tree(pid):
            self._look_for_files(process)
            for line in kernel_lines(_PROC / str(process) / "smaps_rollup"):
                if line.startswith(_ANONYMOUS):
                    total += int(line.split()[1]) * 1024
        return total + sum(cached_bytes(path) for path in self._files.values())

    def _look_for_files(self, pid: int) -> None:
        for entry in _children(_PROC / str(pid) / "fd"):
            self._note(str(entry))
        maps = kernel_lines(_PROC / str(pid) / "maps")
        for path in {line.split(maxsplit=5)[5] for line in maps if line.count("/") and len(line.split(maxsplit=5)) > 5}:
            if path.startswith("/") and not path.startswith(("/dev/", "/memfd:", "/SYSV")):
                self._note(path)

    def _note(self, path: str) -> None:
        if len(self._files) >= _MAX_FILES:
            return
        with contextlib.suppress(OSError):
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode):
                # The real name: an entry of /proc/PID/fd is gone once the file is closed, its pages are not.
                real = os.readlink(path) if path.startswith("/proc/") else path
                self._files.setdefault((found.st_dev, found.st_ino), real)


def _tree(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        process = waiting.pop()
        found.append(process)
        for thread in _children(_PROC / str(process) / "task"):
            waiting += [int(word) for line in kernel_lines(thread / "children") for word in line.split()]
    return found


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def kernel_lines(path: Path) -> list[str]:
    """Lines of a file of the kernel's; none where it is not there or may not be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
