"""Disk rates past the page cache: sequential and random reads with O_DIRECT into aligned huge-page buffers.

Part of `probe`. Writes one file of its own and removes it.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megalith.base.errors import MachineError
from megalith.base.units import GIB, MIB, NS_PER_S, format_bytes
from megalith.tier.disk import ALIGN, open_direct
from megalith.tier.disk_rate import READ_BYTES, READERS, direct_rate
from megalith.tier.memory import HugeBuffer

_FILE_BYTES = 512 * MIB
_CHUNK_BYTES = 4 * MIB
_RANDOM = ((4 << 10, 1_000), (64 << 10, 500), (1 * MIB, 150))
"""(bytes of a read, reads)."""
_LIMIT_NS = 6 * NS_PER_S
"""No single disk figure takes longer; a slow disk is measured over less."""


def disk_figures(folder: Path, note: Callable[[str], None]) -> Iterator[tuple[str, float]]:
    """Write and read rates of the disk under `folder`. Raises MachineError without room."""
    folder.mkdir(parents=True, exist_ok=True)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < _FILE_BYTES + GIB:
        raise MachineError(f"{folder} has {format_bytes(free)} free, too little for a test file.")
    handle, name = tempfile.mkstemp(prefix=".probe-", dir=folder)
    os.close(handle)
    try:
        yield from _measure(Path(name), note)
    finally:
        os.unlink(name)


def _measure(path: Path, note: Callable[[str], None]) -> Iterator[tuple[str, float]]:
    direct = open_direct(path, os.O_WRONLY)
    if direct is None:
        note(f"disk: {path.parent} does not allow O_DIRECT, so the page cache is in these figures")
    size, rate = _write(path, direct)
    yield "disk_sequential_write_bytes_per_s", rate
    yield "disk_sequential_read_bytes_per_s", _sequential(path, size)
    handle = open_direct(path, os.O_RDONLY)
    handle = os.open(path, os.O_RDONLY) if handle is None else handle
    try:
        for piece, reads in _RANDOM:
            label = f"{piece >> 10}k" if piece < MIB else f"{piece >> 20}m"
            yield f"disk_random_read_{label}_bytes_per_s", _random(handle, size, piece, reads)
    finally:
        os.close(handle)


def _write(path: Path, direct: int | None) -> tuple[int, float]:
    """Fill the file; (bytes written, bytes a second)."""
    handle = os.open(path, os.O_WRONLY) if direct is None else direct
    buffer = HugeBuffer(_CHUNK_BYTES)
    buffer.view[:] = random.Random(1).randbytes(_CHUNK_BYTES)
    written, begin_ns = 0, time.perf_counter_ns()
    try:
        while written < _FILE_BYTES and time.perf_counter_ns() - begin_ns < _LIMIT_NS:
            written += os.pwrite(handle, buffer.view, written)
        os.fsync(handle)
    finally:
        os.close(handle)
        buffer.close()
    return written, written * NS_PER_S / (time.perf_counter_ns() - begin_ns)


def _sequential(path: Path, size: int) -> float:
    """Best of two passes of several readers, as streaming weights reads; in smaller reads where the file is small."""
    piece = min(READ_BYTES, size // READERS // ALIGN * ALIGN)
    return direct_rate(path, READERS, piece, most_bytes=size, limit_ns=_LIMIT_NS, passes=2)


def _random(handle: int, size: int, piece: int, reads: int) -> float:
    """Reads of `piece` bytes at random aligned places, one at a time."""
    draw, buffer = random.Random(2), HugeBuffer(piece)
    done, begin_ns = 0, time.perf_counter_ns()
    for _ in range(reads):
        done += os.preadv(handle, [buffer.view], draw.randrange(size // piece) * piece)
        if time.perf_counter_ns() - begin_ns > _LIMIT_NS // 2:
            break
    rate = done * NS_PER_S / (time.perf_counter_ns() - begin_ns)
    buffer.close()
    return rate
