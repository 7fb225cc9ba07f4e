"""Threads or io_uring: which of them gets more of a disk, by size of read and reads under way.

    python benchmarks/disk_readers.py FILE [--rounds 5] [--gib 1]

Both read the same file past the page cache into the same buffers of huge pages; the arms take turns within a round.
Threads are `tier.disk_rate.direct_rate`, which is what the mover does. The ring is the kernel's own interface, entered
from one thread. Linux only. A line for each size and depth: median rates, the median of their ratios, and processor
seconds a GiB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import struct
import time
from pathlib import Path
from statistics import median

from megalith.base.units import MIB
from megalith.tier.disk_rate import direct_rate
from megalith.tier.memory import HugeBuffer, address_of

_SETUP, _ENTER = 425, 426
_SQES_AT = 0x10000000
_GETEVENTS, _READ = 1, 22
_SYSCALL = ctypes.CDLL(None, use_errno=True).syscall


class Ring:
    """An io_uring of so many entries, for reads of one file."""

    def __init__(self, entries: int) -> None:
        numbers = (ctypes.c_uint32 * 30)()
        self.fd = _SYSCALL(_SETUP, entries, ctypes.byref(numbers))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
        self.sq, self.cq = list(numbers[10:17]), list(numbers[20:26])
        size = max(self.sq[6] + 4 * numbers[0], self.cq[5] + 16 * numbers[1])
        self.rings = mmap.mmap(self.fd, size, offset=0)
        self.sqes = mmap.mmap(self.fd, 64 * numbers[0], offset=_SQES_AT)

    def _number(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.rings, at)[0])

    def submit(self, file: int, offset: int, address: int, num_bytes: int, tag: int) -> None:
        """Put one read into the queue and tell the kernel."""
        tail = self._number(self.sq[1])
        slot = tail & self._number(self.sq[2])
        struct.pack_into("<BBHiQQIIQ24x", self.sqes, 64 * slot, _READ, 0, 0, file, offset, address, num_bytes, 0, tag)
        struct.pack_into("<I", self.rings, self.sq[6] + 4 * slot, slot)
        struct.pack_into("<I", self.rings, self.sq[1], tail + 1)
        self._enter(1, 0)

    def wait(self) -> tuple[int, int]:
        """(tag, bytes read or a negative error) of the next read that is done."""
        head = self._number(self.cq[0])
        while head == self._number(self.cq[1]):
            self._enter(0, 1)
        tag, result, _ = struct.unpack_from("<QiI", self.rings, self.cq[5] + 16 * (head & self._number(self.cq[2])))
        struct.pack_into("<I", self.rings, self.cq[0], head + 1)
        return tag, result

    def _enter(self, submit: int, wait: int) -> None:
        if _SYSCALL(_ENTER, self.fd, submit, wait, _GETEVENTS if wait else 0, None, 0) < 0:
            raise OSError(ctypes.get_errno(), "io_uring_enter")

    def close(self) -> None:
        """Give it back."""
        self.rings.close()
        self.sqes.close()
        os.close(self.fd)


def ring_rate(path: Path, depth: int, read_bytes: int, most_bytes: int) -> float:
    """Bytes a second of reads from the middle of a file, `depth` under way at once."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    reads = min(os.fstat(file).st_size, most_bytes) // read_bytes
    first = (os.fstat(file).st_size // read_bytes - reads) // 2
    buffers = [HugeBuffer(read_bytes) for _ in range(depth)]
    for buffer in buffers:
        buffer.view[::4096] = bytes(-(-read_bytes // 4096))
    ring = Ring(depth)
    try:
        begin_ns = time.perf_counter_ns()
        for number in range(reads + depth):
            tag = number
            if number >= depth:
                tag, result = ring.wait()
                if result != read_bytes:
                    raise OSError(f"a read of {read_bytes} bytes gave {result}")
            if number < reads:
                slot = tag % depth
                at = (first + number) * read_bytes
                ring.submit(file, at, address_of(buffers[slot].view), read_bytes, slot)
        return reads * read_bytes * 1e9 / (time.perf_counter_ns() - begin_ns)
    finally:
        ring.close()
        os.close(file)
        for buffer in buffers:
            buffer.close()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=1.0)
    given = parser.parse_args()
    most = int(given.gib * 1024 * MIB)
    for read_bytes in (64 * 1024, MIB, 8 * MIB):
        for depth in (1, 4, 16):
            amount = min(most, 4096 * read_bytes)
            found: dict[str, list[tuple[float, float]]] = {"threads": [], "ring": []}
            for _ in range(given.rounds):
                for arm, rates in found.items():
                    cpu = time.process_time()
                    if arm == "threads":
                        rate = direct_rate(given.file, depth, read_bytes, amount, 60_000_000_000)
                    else:
                        rate = ring_rate(given.file, depth, read_bytes, amount)
                    rates.append((rate, (time.process_time() - cpu) * 1024 * MIB / amount))
            row: dict[str, float] = {"read_kib": read_bytes // 1024, "depth": depth}
            for arm, rates in found.items():
                row[f"{arm}_gb_per_s"] = round(median(rate for rate, _ in rates) / 1e9, 3)
                row[f"{arm}_cpu_s_per_gib"] = round(median(cpu for _, cpu in rates), 3)
            row["ring_over_threads"] = round(
                median(ring / threads for (ring, _), (threads, _) in zip(found["ring"], found["threads"], strict=True)),
                3,
            )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
