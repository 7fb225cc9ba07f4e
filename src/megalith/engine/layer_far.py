"""Where the layers of a module are while they are not near: in host memory, or in a file past the page cache.

Both hand out and take back the bytes of one layer at a time, on the mover's threads. Know bytes; know no torch module.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np

from megalith.base.errors import TierError
from megalith.base.home import home_dir
from megalith.tier.block import Block, checksum
from megalith.tier.disk import ALIGN, DirectFile
from megalith.tier.memory import HugeBuffer
from megalith.tier.pool import Lease, Pool

_NUMBERS = count()


class Far(Protocol):
    """The tier that layers come from. Parts are numbered from 0."""

    tier: str
    """`host` or `disk`."""

    def write(self, part: int, view: memoryview) -> None:
        """Keep a copy of the bytes of a part, in place of an older one of the same length. Raises TierError."""
        ...

    def read_into(self, part: int, view: memoryview) -> None:
        """Fill the front of `view` with a part. Raises TierError, naming the part."""
        ...

    def close(self) -> None:
        """Give everything back; again is no error."""
        ...


class FarMemory:
    """Layers in host memory, charged to `pool`: what a device's window draws on, or a second host pool."""

    tier = "host"

    def __init__(self, pool: Pool | None = None) -> None:
        self.pool = Pool("host", 1 << 62) if pool is None else pool
        self._held: dict[int, tuple[HugeBuffer, Lease]] = {}

    def write(self, part: int, view: memoryview) -> None:
        """As Far says. Raises PoolFull where the pool does not allow it."""
        if part not in self._held:
            lease = self.pool.take(f"layer {part}", view.nbytes)
            try:
                self._held[part] = HugeBuffer(max(1, view.nbytes)), lease
            except BaseException:
                lease.release()
                raise
        np.copyto(_bytes(self._held[part][0].view[: view.nbytes]), _bytes(view))

    def read_into(self, part: int, view: memoryview) -> None:
        """As Far says."""
        if part not in self._held:
            raise TierError(f"Layer {part} was never put into far memory, or that is closed.")
        buffer, lease = self._held[part]
        np.copyto(_bytes(view[: lease.num_bytes]), _bytes(buffer.view[: lease.num_bytes]))

    def close(self) -> None:
        """As Far says."""
        for buffer, lease in self._held.values():
            buffer.close()
            lease.release()
        self._held.clear()


class FarFile:
    """Layers in one file, each at a multiple of 4 KiB, read and written past the page cache.

    The file loses its name as soon as it is open, so nothing stays behind whatever ends the process. A layer is checked
    against its checksum when it is first read after it was written. Raises TierError where the folder is full or fails.
    """

    tier = "disk"

    def __init__(self, folder: Path | None = None) -> None:
        folder = home_dir() / "windows" if folder is None else folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TierError(f"{folder} cannot hold layers: {error.strerror}.", "Name another folder.") from error
        self.path = folder / f"{os.getpid()}-{next(_NUMBERS)}.layers"
        self._file = DirectFile(self.path, "rw")
        self.path.unlink()
        self._blocks: dict[int, tuple[int, Block]] = {}
        self._verified: set[int] = set()
        self._end = 0

    def write(self, part: int, view: memoryview) -> None:
        """As Far says."""
        block = Block(
            owner="window", name=f"layer.{part}", format="raw", num_bytes=view.nbytes, checksum=checksum(view)
        )
        known = self._blocks.get(part)
        offset = self._end if known is None else known[0]
        self._verified.discard(part)
        self._file.write_from(offset, view)
        self._blocks[part] = offset, block
        if known is None:
            self._end += -(-view.nbytes // ALIGN) * ALIGN

    def read_into(self, part: int, view: memoryview) -> None:
        """As Far says; a corrupted layer is a TierError that names it."""
        if part not in self._blocks:
            raise TierError(f"Layer {part} was never written to {self.path}.")
        offset, block = self._blocks[part]
        self._file.read_into(offset, view[: block.num_bytes])
        if part not in self._verified:
            block.verify(view[: block.num_bytes], str(self.path))
            self._verified.add(part)

    def close(self) -> None:
        """As Far says."""
        self._file.close()


def _bytes(view: memoryview) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(view, dtype=np.uint8)
