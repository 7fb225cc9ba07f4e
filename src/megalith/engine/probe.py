"""Measures this machine: memory, matrix products, attention, disk and process-to-process copies, in under a minute.

Every figure is the best of several short trials, because other programs only ever slow a trial down. What is not
installed (torch, the native library) is skipped and said. Must not know models; the figures go into a MachineFacts.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megalith import __version__
from megalith.base.errors import MachineError
from megalith.base.units import GIB, MIB, NS_PER_S
from megalith.engine import probe_compute, probe_disk
from megalith.plan.machine import MachineFacts, available_memory_bytes, cores, machine_name

Progress = Callable[[str], None]

_READ_BYTES = 256 * MIB
_TRIAL_NS = 1_500_000_000
"""Time given to one figure."""
_COPY_BYTES = 256 * MIB
_PIECE_BYTES = 1 * MIB
_DEADLINE_S = 30.0


def best_ns(work: Callable[[], object], budget_ns: int = _TRIAL_NS, least: int = 3) -> int:
    """Shortest of as many runs of `work` as fit into the budget, at least `least` after one to warm up."""
    work()
    shortest, runs, begin_ns = 1 << 62, 0, time.perf_counter_ns()
    while runs < least or time.perf_counter_ns() - begin_ns < budget_ns:
        start_ns = time.perf_counter_ns()
        work()
        shortest = min(shortest, time.perf_counter_ns() - start_ns)
        runs += 1
    return max(shortest, 1)


def memory_figures(threads: int) -> Iterator[tuple[str, float]]:
    """Read bandwidth of one and of all threads, and copy (bytes read plus written), over buffers larger than caches."""
    if available_memory_bytes() < 4 * _READ_BYTES:
        raise MachineError(f"Less than {4 * _READ_BYTES / GIB:.0f} GiB of memory is free.", "Free some and try again.")
    data = np.ones(_READ_BYTES // 8, np.int64)
    yield "memory_read_1_bytes_per_s", _READ_BYTES * NS_PER_S / best_ns(lambda: data.max())
    parts = np.array_split(data, threads)
    together = best_ns(lambda: _on_threads([lambda part=part: part.max() for part in parts]))  # type: ignore[misc]
    yield "memory_read_all_bytes_per_s", _READ_BYTES * NS_PER_S / together
    other = np.empty_like(data)
    yield "memory_copy_bytes_per_s", 2 * _READ_BYTES * NS_PER_S / best_ns(lambda: np.copyto(other, data))


def _on_threads(works: list[Callable[[], object]]) -> None:
    """Run all at once and wait; NumPy lets go of the interpreter lock while it reduces."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_DEADLINE_S)


_SENDER = """
import socket, sys
pipe, total, piece = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
data = memoryview(bytearray(piece))
while pipe.recv(1):
    for _ in range(total // piece):
        pipe.sendall(data)
"""


def process_figures() -> Iterator[tuple[str, float]]:
    """Bytes a second from another process through a local socket, and out of memory that both share."""
    ours, theirs = socket.socketpair()
    ours.settimeout(_DEADLINE_S)
    buffer = memoryview(bytearray(_PIECE_BYTES))
    command = [sys.executable, "-c", _SENDER, str(theirs.fileno()), str(_COPY_BYTES // 4), str(_PIECE_BYTES)]
    with subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as child, ours:
        theirs.close()

        def fetch() -> None:
            ours.sendall(b"+")
            left = _COPY_BYTES // 4
            while left:
                got = ours.recv_into(buffer, min(left, _PIECE_BYTES))
                if got == 0:
                    raise MachineError("The other process of the socket test ended early.")
                left -= got

        try:
            yield "process_socket_bytes_per_s", (_COPY_BYTES // 4) * NS_PER_S / best_ns(fetch)
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            child.wait(_DEADLINE_S)
    yield "process_shared_memory_bytes_per_s", _shared_memory_rate()


def _copy_rate(block: memoryview) -> float:
    """Bytes a second of copying `block` into memory of our own; every view of it is gone on return."""
    source = np.frombuffer(block, np.uint8)
    target = np.empty_like(source)
    return source.nbytes * NS_PER_S / best_ns(lambda: np.copyto(target, source))


_FILLER = """
import sys
from multiprocessing import resource_tracker, shared_memory
block = shared_memory.SharedMemory(sys.argv[1])
resource_tracker.unregister(block._name, "shared_memory")
block.buf[:] = bytes([7]) * len(block.buf)
block.close()
"""


def _shared_memory_rate() -> float:
    """Copying out of a block that another process has just filled."""
    from multiprocessing import shared_memory

    block = shared_memory.SharedMemory(create=True, size=64 * MIB)
    try:
        subprocess.run([sys.executable, "-c", _FILLER, block.name], check=True, timeout=_DEADLINE_S)
        if block.buf is None or block.buf[0] != 7:
            raise MachineError("The other process did not fill the shared block.")
        return _copy_rate(block.buf)
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError(f"The shared-memory test failed: {error}.") from None
    finally:
        block.close()
        block.unlink()


def probe(folder: Path, progress: Progress | None = None, threads: int | None = None) -> MachineFacts:
    """Measure everything; `folder` says which disk. What fails or is missing becomes a note, never an end."""
    threads = threads or cores()
    figures: dict[str, float] = {}
    notes: list[str] = []
    parts: tuple[tuple[str, Callable[[], Iterator[tuple[str, float]]]], ...] = (
        ("memory", lambda: memory_figures(threads)),
        ("matrix products, native library", lambda: probe_compute.native_figures(threads)),
        ("matrix products, torch", lambda: probe_compute.torch_figures(threads)),
        ("attention, torch", lambda: probe_compute.attention_figures(threads)),
        ("disk", lambda: probe_disk.disk_figures(folder, notes.append)),
        ("process to process", process_figures),
    )
    for name, part in parts:
        if progress is not None:
            progress(name)
        try:
            figures.update(part())
        except (MachineError, OSError) as error:
            notes.append(f"{name}: {error}")
    return MachineFacts(
        machine=machine_name(),
        date=time.strftime("%Y-%m-%d"),
        threads=threads,
        figures=figures,
        notes=(*notes, _load_note()),
        versions={
            "megalith": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "kernel": platform.release(),
            **probe_compute.versions(),
        },
    )


def _load_note() -> str:
    """How busy the machine was: on a loaded one every figure is a lower bound."""
    load = os.getloadavg()[0]
    return f"load average {load:.1f} on {cores()} cores" + (": others slowed this down" if load > cores() else "")
