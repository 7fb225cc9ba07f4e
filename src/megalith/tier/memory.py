"""Memory that disks and kernels like: anonymous, aligned to 2 MiB, in huge pages where the machine gives them.

A device is given one address for 2 MiB of it, not 512. Knows addresses and bytes; must not know what is in them.
"""

from __future__ import annotations

import contextlib
import mmap
from types import TracebackType

import numpy as np

from megalith.base.errors import TierError
from megalith.base.units import MIB, format_bytes

HUGE_PAGE_BYTES = 2 * MIB


def address_of(view: memoryview) -> int:
    """Where the first byte of a contiguous view is, writable or not."""
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]) if view.nbytes else 0


class HugeBuffer:
    """`num_bytes` of zeroed memory that begin at a multiple of 2 MiB.

    Pages become resident when they are touched, 2 MiB at a time: a whole number of those wastes nothing.

    Raises TierError where the machine does not give so much.
    """

    def __init__(self, num_bytes: int) -> None:
        self._memory: mmap.mmap | None = None
        self._view: memoryview | None = None
        if num_bytes <= 0:
            raise TierError(f"A buffer of {num_bytes} bytes cannot be.", "Ask for at least one byte.")
        self.num_bytes = num_bytes
        # A whole number of huge pages, so that the last one is huge too, and one more to align the first; what is
        # never touched is never resident.
        whole = -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        try:
            # Private: shared memory gets huge pages only where the machine's owner allowed it, which is rare.
            self._memory = mmap.mmap(-1, whole + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise TierError(
                f"This machine does not give {format_bytes(num_bytes)} of memory in one piece ({error}).",
                "Lower the memory limit.",
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        everything = memoryview(self._memory)
        begin = -address_of(everything) % HUGE_PAGE_BYTES
        self._view = everything[begin : begin + num_bytes]
        everything.release()
        self.address = address_of(self._view)
        """Of the first byte."""

    @property
    def view(self) -> memoryview:
        """All of it, writable. Raises TierError when closed."""
        if self._view is None:
            raise TierError(f"A buffer of {format_bytes(self.num_bytes)} was used after it was closed.")
        return self._view

    def close(self) -> None:
        """Give the memory back; again is no error. While slices of the view are held, it goes with the last of them."""
        view, memory = self._view, self._memory
        self._view = self._memory = None
        with contextlib.suppress(BufferError):
            if view is not None:
                view.release()
            if memory is not None:
                memory.close()

    def __enter__(self) -> HugeBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
