"""Blocks by key, on disk and in host memory: put, fetch, evict and verify, through the mover and under caps.

Every block is a file of its own: a header of 4 KiB that says which block it is, then its bytes, aligned for direct I/O.
Files are written beside and then renamed, so that a killed process leaves either the old block or the new one; what it
had half written is removed when the folder is opened next. Bytes are verified when they are read for the first time.
What to fetch and what to evict is a policy's business (`policy/residency.py`). Knows blocks, pools and the mover; must
not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import msgspec

from megalith.base.errors import TierError
from megalith.base.whole_file import clear_partials, written_whole
from megalith.tier.block import Block, checksum
from megalith.tier.disk import ALIGN, DirectFile
from megalith.tier.memory import HUGE_PAGE_BYTES, HugeBuffer, address_of
from megalith.tier.mover import WAIT_NS, Move, Mover, Ticket
from megalith.tier.pool import Lease, Pool

_SUFFIX = ".block"


class _Resident:
    """A block in host memory, or on its way there. Under the store's lock."""

    __slots__ = ("block", "broken", "buffer", "lease", "loaded", "pins", "submitted", "ticket")

    def __init__(self, block: Block, buffer: HugeBuffer, lease: Lease) -> None:
        self.block, self.buffer, self.lease = block, buffer, lease
        self.loaded = False
        self.broken: BaseException | None = None
        self.pins = 0
        self.ticket: Ticket | None = None
        self.submitted = threading.Event()

    def free(self) -> None:
        self.buffer.close()
        self.lease.release()


class Fetched:
    """A block that stays in host memory until release(). To release it before it is there cancels the move."""

    def __init__(self, store: Store, resident: _Resident) -> None:
        self._store = store
        self._resident: _Resident | None = resident
        self.block = resident.block

    def wait(self, timeout_ns: int = WAIT_NS) -> memoryview:
        """The block's bytes, writable, once they are there. Raises TierError: corrupted, cancelled, late, failed."""
        resident = self._resident
        if resident is None:
            raise TierError(f"Block {self.block.key} was used after it was released.")
        clock = self._store.mover.clock
        begin_ns = clock.now_ns()
        if not resident.loaded:
            resident.submitted.wait(timeout_ns / 1e9)
        if resident.broken is not None:
            raise resident.broken
        if resident.ticket is not None:
            resident.ticket.wait(max(0, timeout_ns - (clock.now_ns() - begin_ns)))
        elif not resident.loaded:
            raise TierError(f"The mover had no room for block {self.block.key} in {timeout_ns} ns.")
        return resident.buffer.view[: self.block.num_bytes]

    @property
    def done(self) -> bool:
        """wait() returns or raises at once."""
        resident = self._resident
        return resident is None or resident.broken is not None or (resident.ticket is not None and resident.ticket.done)

    def release(self) -> None:
        """The block may be evicted; again is no error. Bytes of it must not be used any more."""
        resident, self._resident = self._resident, None
        if resident is not None:
            self._store._unpin(resident)

    def __enter__(self) -> Fetched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Store:
    """The blocks of one folder, which one process at a time may open. The mover's link `link` is the disk.

    The host pool is charged whole huge pages, for that is what is resident. Raises TierError where another process has
    the folder, PoolFull where it holds more than the disk pool's cap.
    """

    def __init__(self, folder: Path, mover: Mover, host: Pool, disk: Pool | None = None, link: str = "disk") -> None:
        self.folder, self.mover, self.host, self.link = folder, mover, host, link
        self.disk = Pool("disk", 1 << 62) if disk is None else disk
        self.damaged: dict[str, str] = {}
        """Files that are not blocks any more, and why: nobody can fetch them."""
        self._blocks: dict[str, Block] = {}
        self._on_disk: dict[str, Lease] = {}
        self._host: dict[str, _Resident] = {}
        self._verified: set[str] = set()
        self._writing: dict[str, Ticket | None] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._guard: int | None = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise TierError(f"{folder} cannot hold blocks: {error.strerror}.", "Name another folder.") from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        assert self._guard is not None
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TierError(f"Another process has the blocks of {self.folder} open.", "End it first.") from None
        self.cleared = clear_partials(self.folder)
        """Half-written files of a killed process that were removed."""
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            try:
                block = _read_header(path)
            except TierError as error:
                self.damaged[path.name] = str(error)
                continue
            self._on_disk[block.key] = self.disk.take(block.owner, _file_bytes(block.num_bytes))
            self._blocks[block.key] = block

    def put(self, owner: str, name: str, format: str, view: memoryview, *, priority: int = 0) -> Ticket:  # noqa: A002
        """Write a block to disk, in place of an older one; `view` must not change until the ticket is done.

        Raises PoolFull, and TierError where the block is being written, or is in host memory at another place.
        """
        view = view.cast("B")
        key = f"{owner}/{name}"
        with self._lock:
            resident = self._host.get(key)
            if key in self._writing or (resident is not None and resident.buffer.address != address_of(view)):
                what = "being written" if key in self._writing else "in host memory at another place"
                raise TierError(f"Block {key} is {what}.", "Wait for its ticket, or evict it first.")
            lease = self.disk.take(owner, _file_bytes(view.nbytes))
            self._writing[key] = None
        block: Block | None = None

        def work() -> None:
            nonlocal block
            block = Block(owner=owner, name=name, format=format, num_bytes=view.nbytes, checksum=checksum(view))
            self._write(block, view)

        def ended(error: BaseException | None) -> None:
            with self._lock:
                old: Lease | None = lease
                if error is None and block is not None:
                    old = self._on_disk.get(key)
                    self._on_disk[key], self._blocks[key] = lease, block
                    self._verified.discard(key)
                    if resident is not None:
                        resident.block = block
                self._writing.pop(key, None)
            if old is not None:
                old.release()

        ticket = self._submit(Move(self.link, view.nbytes, work, priority, None, f"block {key}", ended))
        with self._lock:
            if key in self._writing:
                self._writing[key] = ticket
        return ticket

    def fetch(self, key: str, *, priority: int = 0, deadline_ns: int | None = None) -> Fetched:
        """Bring a block to host memory, where it is kept until it is released and evicted. One that is there, or on its
        way, is shared. Raises PoolFull without room, and TierError for an unknown key or a queue full at the deadline.
        """
        with self._lock:
            resident = self._host.get(key)
            if resident is not None:
                resident.pins += 1
                return Fetched(self, resident)
            block = self._known(key)
            lease = self.host.take(block.owner, -(-max(1, block.num_bytes) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
            try:
                resident = _Resident(block, HugeBuffer(max(1, block.num_bytes)), lease)
            except BaseException:
                lease.release()
                raise
            resident.pins = 1
            self._host[key] = resident
        fetched = Fetched(self, resident)
        move = Move(
            self.link, block.num_bytes, lambda: self._read(resident), priority, deadline_ns, f"block {key}",
            lambda error: self._arrived(resident, error),
        )  # fmt: skip
        try:
            resident.ticket = self._submit(move)
        except BaseException:
            fetched.release()
            raise
        finally:
            resident.submitted.set()
        return fetched

    def evict(self, key: str) -> bool:
        """Drop a block from host memory; it stays on disk. False where it is not there.

        Raises TierError while somebody has not released it.
        """
        with self._lock:
            resident = self._host.get(key)
            if resident is None:
                return False
            if resident.pins:
                raise TierError(f"Block {key} is in use by {resident.pins}.", "Release it first.")
            del self._host[key]
            resident.free()
            return True

    def verify(self, key: str) -> None:
        """Read a block from disk again and check it. Needs room in the host pool. Raises TierError naming it."""
        with self._lock:
            block = self._known(key)
        with self.host.take(block.owner, max(1, block.num_bytes)), HugeBuffer(max(1, block.num_bytes)) as buffer:
            self._load(block, buffer)
            block.verify(buffer.view[: block.num_bytes], str(self._path(key)))

    def delete(self, key: str) -> None:
        """Forget a block and remove its file. Raises TierError while it is in use or being written, or unknown."""
        self.evict(key)
        with self._lock:
            self._known(key)
            if key in self._writing:
                raise TierError(f"Block {key} is being written.", "Wait for its ticket first.")
            self._path(key).unlink(missing_ok=True)
            del self._blocks[key]
            self._verified.discard(key)
            self._on_disk.pop(key).release()

    def keys(self) -> list[str]:
        """Of all blocks on disk, sorted."""
        with self._lock:
            return sorted(self._blocks)

    def block(self, key: str) -> Block:
        """What is known of a block. Raises TierError for an unknown key."""
        with self._lock:
            return self._known(key)

    def resident(self) -> list[str]:
        """Keys in host memory or on their way there."""
        with self._lock:
            return sorted(self._host)

    def close(self, timeout_ns: int = WAIT_NS) -> None:
        """Wait for writes, cancel reads, give host memory back and let others open the folder. Again is no error."""
        with self._lock:
            writes = [ticket for ticket in self._writing.values() if ticket is not None]
            residents, self._host = list(self._host.values()), {}
        for ticket in writes:
            with contextlib.suppress(Exception):  # Who wanted the write has the ticket, and its error.
                ticket.wait(timeout_ns)
        for resident in residents:
            if resident.ticket is not None and not resident.ticket.cancel():
                with contextlib.suppress(Exception):
                    resident.ticket.wait(timeout_ns)
            resident.free()
        for lease in self._on_disk.values():
            lease.release()
        self._on_disk.clear()
        guard, self._guard = self._guard, None
        if guard is not None:
            os.close(guard)

    def _submit(self, move: Move) -> Ticket:
        try:
            return self.mover.submit(move)
        except BaseException as error:
            if move.ended is not None:
                move.ended(error)
            raise

    def _known(self, key: str) -> Block:
        if self._guard is None:
            raise TierError(f"The blocks of {self.folder} were used after they were closed.")
        block = self._blocks.get(key)
        if block is None:
            name = quote(key, safe="") + _SUFFIX
            why = self.damaged.get(name)
            raise TierError(
                f"Block {key} is corrupted: {why}" if why else f"There is no block {key} in {self.folder}.",
                "Write it again from its source." if why else "",
            )
        return block

    def _path(self, key: str) -> Path:
        return self.folder / (quote(key, safe="") + _SUFFIX)

    def _write(self, block: Block, view: memoryview) -> None:
        """The bytes, then the header, then the name: in that order on the disk too."""
        header = msgspec.json.encode(block)
        if len(header) > ALIGN:
            raise TierError(f"The name {block.key[:80]}... has {len(block.key)} characters.", "Shorten it.")
        path = self._path(block.key)
        try:
            with written_whole(path) as partial, DirectFile(partial, "w") as file:
                file.write_from(ALIGN, view)
                file.write_from(0, memoryview(header.ljust(ALIGN)))
                file.sync()
        except OSError as error:
            raise TierError(f"Block {block.key} could not be put at {path}: {error.strerror}.") from error
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _load(self, block: Block, buffer: HugeBuffer) -> None:
        with DirectFile(self._path(block.key)) as file:
            file.read_into(ALIGN, buffer.view[: block.num_bytes])

    def _read(self, resident: _Resident) -> None:
        """On the mover's thread."""
        block = resident.block
        self._load(block, resident.buffer)
        if block.key not in self._verified:
            block.verify(resident.buffer.view[: block.num_bytes], str(self._path(block.key)))
            self._verified.add(block.key)

    def _arrived(self, resident: _Resident, error: BaseException | None) -> None:
        """A read ended. Where it broke, or nobody wants it any more, its memory goes; the next fetch tries again."""
        with self._lock:
            resident.broken, resident.loaded = error, error is None
            if error is not None or not resident.pins:
                if self._host.get(resident.block.key) is resident:
                    del self._host[resident.block.key]
                if not resident.pins:
                    resident.free()

    def _unpin(self, resident: _Resident) -> None:
        with self._lock:
            resident.pins -= 1
            if resident.pins:
                return
            if resident.broken is not None:
                resident.free()
            if resident.loaded or resident.broken is not None:
                return
            # On its way and unwanted: who fetches it from now on begins anew.
            if self._host.get(resident.block.key) is resident:
                del self._host[resident.block.key]
        if resident.ticket is not None:
            resident.ticket.cancel()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _file_bytes(num_bytes: int) -> int:
    """Of the file of a block."""
    return ALIGN + num_bytes


def _read_header(path: Path) -> Block:
    """Which block a file is. Raises TierError where it does not say."""
    try:
        with path.open("rb") as file:
            header = file.read(ALIGN)
        block = msgspec.json.decode(header, type=Block)
    except (OSError, msgspec.DecodeError) as error:
        raise TierError(f"the header of {path} cannot be read ({error}).") from error
    if quote(block.key, safe="") + _SUFFIX != path.name:
        raise TierError(f"the header of {path} says it is block {block.key}.")
    if path.stat().st_size != _file_bytes(block.num_bytes):
        raise TierError(f"{path} has {path.stat().st_size} bytes, not {_file_bytes(block.num_bytes)}.")
    return block
