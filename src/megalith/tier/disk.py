"""Files past the page cache: aligned direct reads and writes, checked to the last byte.

Direct I/O keeps a model's bytes out of the page cache, which a memory limit counts, and is as fast as the disk with
pieces of 2 to 8 MiB into huge pages. Ranges that are not aligned, and file systems that refuse O_DIRECT, go through the
page cache, which is told to forget them at once. The calls release the interpreter's lock: batch them over threads.
Knows files and bytes; must not know what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

from megalith.base.errors import TierError
from megalith.base.units import MIB, format_bytes
from megalith.tier.memory import address_of

ALIGN = 4096
"""Offsets, lengths and addresses of direct I/O are multiples of this."""
PIECE_BYTES = 8 * MIB
"""One call to the system moves at most this."""
Mode: TypeAlias = Literal["r", "w", "rw"]
_FLAGS: dict[str, int] = {"r": os.O_RDONLY, "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "rw": os.O_RDWR | os.O_CREAT}
_DIRECT = getattr(os, "O_DIRECT", 0)


def open_direct(path: Path, flags: int) -> int | None:
    """A descriptor that goes past the page cache, or None where the file system refuses. Raises OSError."""
    if not _DIRECT:
        return None
    try:
        return os.open(path, flags | _DIRECT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


class DirectFile:
    """One file; several threads may use it at once. `direct` says whether aligned ranges go past the page cache.

    `w` empties or makes the file, `rw` keeps what is there. Raises TierError, with the file, the place and the numbers.
    """

    def __init__(self, path: Path, mode: Mode = "r") -> None:
        self.path = path
        self._handles: list[int] = []
        handle = None
        try:
            handle = open_direct(path, _FLAGS[mode])
            self.direct = handle is not None
            # The second one is for the ends of ranges that are not aligned; it must not empty the file again.
            self._plain = os.open(
                path, (_FLAGS[mode] & ~os.O_TRUNC if self.direct else _FLAGS[mode]) | os.O_CLOEXEC, 0o666
            )
        except OSError as error:
            if handle is not None:
                os.close(handle)
            raise _failed(f"Opening {path}", path, error) from error
        self._straight = self._plain if handle is None else handle
        self._handles = list({self._plain, self._straight})
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_RANDOM)  # No reading ahead: the mover knows better.

    @property
    def size(self) -> int:
        """Bytes of the file now."""
        return os.fstat(self._open(self._plain)).st_size

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. Raises TierError when the file ends before, or the disk fails."""
        self._move(offset, view.cast("B"), write=False)

    def write_from(self, offset: int, view: memoryview) -> None:
        """Put all of `view` at `offset`; sync() makes it last. Raises TierError when the disk is full, or fails."""
        self._move(offset, view.cast("B"), write=True)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        try:
            os.fdatasync(self._open(self._plain))
        except OSError as error:
            raise _failed(f"Syncing {self.path}", self.path, error) from error

    def close(self) -> None:
        """Close the file; again is no error."""
        handles, self._handles = self._handles, []
        for handle in handles:
            os.close(handle)

    def _open(self, handle: int) -> int:
        if not self._handles:
            raise TierError(f"{self.path} was used after it was closed.")
        return handle

    def _move(self, offset: int, view: memoryview, *, write: bool) -> None:
        """Move all of `view`: the system may do less than it was asked for in one call, and stop anywhere."""
        done, doing = 0, f"{'Writing' if write else 'Reading'} {view.nbytes} bytes at {offset} of {self.path}"
        self._open(self._plain)
        together = self.direct and offset % ALIGN == address_of(view) % ALIGN
        while done < view.nbytes:
            most, unaligned = min(view.nbytes - done, PIECE_BYTES), (offset + done) % ALIGN
            straight = together and not unaligned and most >= ALIGN
            if straight:
                most -= most % ALIGN
            elif together and unaligned:
                most = min(most, ALIGN - unaligned)
            handle, piece = self._straight if straight else self._plain, view[done : done + most]
            try:
                call = os.pwritev if write else os.preadv
                count = call(handle, [piece], offset + done)
            except OSError as error:
                raise _failed(f"{doing}, {done} done", self.path, error) from error
            if not count:
                raise TierError(f"{doing}: got {done}, and it ends there.", "It was cut short: write it again.")
            if not straight:
                self._forget(offset + done, count, write=write)
            done += count

    def _forget(self, offset: int, num_bytes: int, *, write: bool) -> None:
        """Have the page cache drop a range. Only clean pages can be dropped, so what was written is synced first."""
        if write:
            self.sync()
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(self._plain, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _failed(doing: str, path: Path, error: OSError) -> TierError:
    """What a person can do about it, with numbers."""
    name = errno.errorcode.get(error.errno or 0, "?")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = "an unknown number of bytes"
        with contextlib.suppress(OSError):
            status = os.statvfs(path.parent)
            free = format_bytes(status.f_bavail * status.f_frsize)
        return TierError(f"{doing}: there is no room ({name}, {free} free).", "Free some, or name another folder.")
    if error.errno == errno.EIO:
        return TierError(f"{doing}: the disk failed ({name}).", "Look at the kernel's log, and take another disk.")
    return TierError(f"{doing}: {error.strerror or error} ({name}).")
