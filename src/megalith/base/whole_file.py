"""Files that are written whole or not at all: no reader sees half of one, and a full disk leaves the old one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, body: bytes) -> None:
    """Put `body` into `path`. Raises OSError as it comes: the caller knows what to say of it."""
    with written_whole(path) as partial:
        partial.write_bytes(body)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end, or goes where anything was raised."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def clear_partials(folder: Path) -> int:
    """Remove what killed processes left behind in a folder that nobody writes to now. Returns how many files."""
    left = list(folder.glob(".*.partial"))
    for partial in left:
        partial.unlink(missing_ok=True)
    return len(left)
