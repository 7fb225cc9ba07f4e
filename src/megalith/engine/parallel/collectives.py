"""All-reduce over the links of ranks: a star of two hops, or a ring of 2 (n - 1).

Both add in an order that does not depend on who is first, so the same inputs give the same bits on every rank and in
every run; the two orders differ. TPI-LLM (arXiv:2410.00531): where latency decides, the star has fewer hops. What they
take is cost.collective. Knows arrays and channels; knows no model and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from megalith.base.errors import EngineError
from megalith.cost.collective import Collective
from megalith.engine.batch import F32
from megalith.engine.frames import ERROR, FrameChannel, WireError
from megalith.engine.parallel.wire import SUM

_SMALL_BYTES = 32 << 10
"""What any socket takes without somebody reading at the other end."""


class PeerLost(WireError):
    """A rank that others need has gone or given up."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(f"rank {rank}: {why}")
        self.rank = rank


@dataclass
class Ranks:
    """This rank among the others. `channels`: to rank 0, or from rank 0 to all; in a ring to its neighbours, too."""

    rank: int
    size: int
    collective: Collective
    channels: Mapping[int, FrameChannel]
    _count: int = field(default=0, init=False)
    _pool: ThreadPoolExecutor | None = field(default=None, init=False)

    def all_reduce(self, values: F32) -> F32:
        """The sum over all ranks, in the shape of `values`, the same on each. Raises PeerLost."""
        if self.size == 1:
            return values
        self._count = (self._count + 1) % (1 << 31)
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        total = self._star(flat) if self.collective == "star" else self._ring(flat)
        return total.reshape(values.shape)

    def _star(self, own: F32) -> F32:
        """To rank 0, which adds in the order of ranks, and back."""
        if self.rank:
            self._send(0, own)
            return self._receive(0, own.size)
        total = own.copy()
        for rank in range(1, self.size):
            total += self._receive(rank, own.size)
        for rank in range(1, self.size):
            self._send(rank, total)
        return total

    def _ring(self, own: F32) -> F32:
        """Chunk c is added up from rank c on, once round; then it goes round again, complete."""
        total, size, rank = own.copy(), self.size, self.rank
        chunks = np.array_split(total, size)  # views
        right, left = (rank + 1) % size, (rank - 1) % size
        for step in range(size - 1):
            into = chunks[(rank - step - 1) % size]
            np.add(self._exchange(right, chunks[(rank - step) % size], left, into.size), into, out=into)
        for step in range(size - 1):
            into = chunks[(rank - step) % size]
            into[:] = self._exchange(right, chunks[(rank + 1 - step) % size], left, into.size)
        return total

    def _exchange(self, right: int, values: F32, left: int, size: int) -> F32:
        """Send to one side and receive from the other at once: all ranks do so, and a socket holds only so much."""
        if values.nbytes <= _SMALL_BYTES:
            self._send(right, values)
            return self._receive(left, size)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ring")
        sent = self._pool.submit(self._send, right, values)
        found = self._receive(left, size)
        sent.result(self.channels[right].deadline_s)
        return found

    def _send(self, rank: int, values: F32) -> None:
        try:
            self.channels[rank].send(SUM, values, count=self._count)
        except WireError as error:
            raise PeerLost(rank, str(error)) from None

    def _receive(self, rank: int, size: int) -> F32:
        try:
            frame = self.channels[rank].receive()
        except WireError as error:
            raise PeerLost(rank, str(error)) from None
        if frame.kind == ERROR:
            raise PeerLost(rank, f"it gave up: {bytes(frame.payload).decode(errors='replace')}")
        if (frame.kind, frame.number, len(frame.payload)) != (SUM, self._count, 4 * size):
            raise EngineError(
                f"Rank {rank} sent kind {frame.kind}, number {frame.number}, {len(frame.payload)} bytes, where sum "
                f"{self._count} of {4 * size} bytes was due."
            )
        return np.frombuffer(frame.payload, dtype=np.float32)

    def close(self) -> None:
        """End the sending thread; channels are their owners'. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
