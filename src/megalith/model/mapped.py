"""Mapped files that are read once: letting go of their pages, for who reads a file that is bigger than memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path


def forget_pages(mapped: mmap.mmap, path: Path, *, cached: bool = True) -> None:
    """Those that were read so far leave this process, and the page cache where nobody else has them mapped.

    With `cached=False` the page cache keeps them for the next process.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
    if cached and hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
