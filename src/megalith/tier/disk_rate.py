"""What a disk gives to several direct readers at once: the rate that streaming can reach, measured in under a second.

Knows a file; must not know what is in it.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from megalith.base.errors import TierError
from megalith.base.units import MIB, NS_PER_S
from megalith.tier.disk import DirectFile
from megalith.tier.memory import HugeBuffer

READERS, READ_BYTES = 4, 8 * MIB
MOST_BYTES = 512 * MIB
LIMIT_NS = NS_PER_S // 2


def direct_rate(
    path: Path, readers: int = READERS, read_bytes: int = READ_BYTES, most_bytes: int = MOST_BYTES,
    limit_ns: int = LIMIT_NS, passes: int = 1,
) -> float:  # fmt: skip
    """Bytes a second of reads past the page cache from the middle of a file, one after the other, by `readers` threads.

    The best of `passes`, each of which reads at most `most_bytes` and begins no read after `limit_ns`. Raises TierError
    where the file cannot be read, or is smaller than one read of each.
    """
    with DirectFile(path) as file:
        reads = min(file.size, most_bytes) // read_bytes
        if reads < readers:
            raise TierError(f"{path} has {file.size} bytes: too few for {readers} reads of {read_bytes}.")
        first = (file.size // read_bytes - reads) // 2
        buffers = [HugeBuffer(read_bytes) for _ in range(readers)]
        try:
            for buffer in buffers:
                buffer.view[::4096] = bytes(-(-read_bytes // 4096))  # There before the clock runs.
            return max(_timed(file, buffers, first, reads, limit_ns) for _ in range(passes))
        finally:
            for buffer in buffers:
                buffer.close()


def _timed(file: DirectFile, buffers: list[HugeBuffer], first: int, reads: int, limit_ns: int) -> float:
    lock, done, failed = threading.Lock(), [0, 0], list[TierError]()
    begin_ns = time.perf_counter_ns()

    def read(buffer: HugeBuffer) -> None:
        try:
            while time.perf_counter_ns() - begin_ns < limit_ns and not failed:
                with lock:
                    number, done[0] = done[0], done[0] + 1
                if number >= reads:
                    return
                file.read_into((first + number) * buffer.num_bytes, buffer.view)
                with lock:
                    done[1] += buffer.num_bytes
        except TierError as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(buffer,), daemon=True) for buffer in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return done[1] * NS_PER_S / (time.perf_counter_ns() - begin_ns)
