"""The weights of a model that is bigger than its memory: some pieces stay, the rest go through a ring, read ahead.

Pieces are used in the same order in every step, so the ring is always filled in that order, and past the last piece
with the first of the next step: reads go on while the engine is between steps. Steps find the same bytes as in memory,
so results are the same bits. Knows pieces and memory; knows nothing about requests.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial

import numpy as np

from megalith.base.errors import TierError
from megalith.engine.batch import F32, I32
from megalith.engine.native import binding, single
from megalith.engine.packed_file import PANEL, U8, Matrix, PackedFile
from megalith.policy.weight_window import lay_out
from megalith.specs.model import ModelSpec
from megalith.tier.disk import ALIGN
from megalith.tier.memory import HUGE_PAGE_BYTES, HugeBuffer
from megalith.tier.mover import Move, Mover, Ticket

READERS = 4
"""Reads under way at once."""
_LINK = "disk"


class WeightWindow:
    """A binding.WeightSource over a packed file, in at most `budget_bytes` of memory. Owns the file.

    Raises DoesNotFit when the budget is too small, TierError when the file cannot be read.
    """

    def __init__(
        self, packed: PackedFile, spec: ModelSpec, budget_bytes: int, page_bytes: int = HUGE_PAGE_BYTES
    ) -> None:
        self.error: Exception | None = None
        self.hidden = spec.hidden
        self.wait_ns = 0
        """Time that steps waited for pieces."""
        self._packed, self._scale = packed, spec.embedding_scale
        self._embed = next(matrix for matrix in packed.index.matrices if matrix.tensor == "embed")
        self.sizes = [piece.num_bytes for piece in packed.index.pieces[: packed.index.used]]
        self._pinned: HugeBuffer | None = None
        self._ring: HugeBuffer | None = None
        self._addresses: dict[int, int] = {}
        self._tickets: dict[int, Ticket] = {}
        self._next = 0
        """Which read of the endless sequence the next streamed piece is."""
        self._primed = False
        self.layout = lay_out(self.sizes, packed.index.head, budget_bytes, page_bytes)
        self._mover = Mover(workers=READERS)
        self._mover.add_link(_LINK)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        """Read what stays, and the first pieces of the first step."""
        layout = self.layout
        if layout.pinned:
            self._pinned, at, tickets = HugeBuffer(layout.pinned_bytes), 0, []
            for piece in layout.pinned:
                self._addresses[piece] = self._pinned.address + at
                tickets.append(self._read(piece, self._pinned.view[at : at + self.sizes[piece]], 0))
                at += self.sizes[piece]
            for ticket in tickets:
                ticket.wait()
        if layout.streamed:
            self._ring = HugeBuffer(layout.ring_bytes)
            self._prime(0)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices and where in their pieces they are."""
        return self._packed.index.matrices

    @property
    def num_bytes(self) -> int:
        """Of memory, pinned and ring."""
        return self.layout.num_bytes

    @property
    def step_bytes(self) -> int:
        """What one step reads from the disk, beside embedding rows."""
        return sum(self.sizes[piece] for piece in self.layout.streamed)

    @property
    def read_bytes(self) -> int:
        """Read ahead by the mover so far."""
        return self._mover.stats()[_LINK].num_bytes - sum(self.sizes[piece] for piece in self.layout.pinned)

    def acquire(self, piece: int) -> int:
        """As WeightSource says. Raises TierError; the next step may try again."""
        address = self._addresses.get(piece)
        if address is not None:
            return address
        streamed = self.layout.streamed
        if not self._primed or streamed[self._next % len(streamed)] != piece:
            self._prime(streamed.index(piece))  # the last step ended early
        begin_ns = time.perf_counter_ns()
        try:
            self._tickets[self._next].wait()
        except BaseException:
            self._primed = False
            raise
        finally:
            self.wait_ns += time.perf_counter_ns() - begin_ns
        assert self._ring is not None
        return self._ring.address + self._next % self.layout.slots * self.layout.slot_bytes

    def release(self, piece: int) -> None:
        """As WeightSource says: what comes a ring later is read into its place."""
        if piece in self._addresses:
            return
        del self._tickets[self._next]
        self._submit(self._next + self.layout.slots)
        self._next += 1

    def embed(self, tokens_M: I32, x_MD: F32) -> None:
        """As WeightSource says. A panel of 16 rows is read for each distinct token, unless the table stays."""
        library, matrix = binding.load(), self._embed
        for token in np.unique(tokens_M):
            panel = self._panel(matrix, int(token) // PANEL)
            rows = np.flatnonzero(tokens_M == token)
            single.panel_row(library, matrix.format, panel, int(token) % PANEL, self._scale, x_MD[rows[0]])
            x_MD[rows[1:]] = x_MD[rows[0]]

    def _panel(self, matrix: Matrix, number: int) -> U8:
        piece, offset = matrix.at(number)
        if self._pinned is not None and piece in self._addresses:
            at = self._addresses[piece] - self._pinned.address + offset
            return np.frombuffer(self._pinned.view, np.uint8, matrix.panel_bytes, at)
        begin = self._packed.index.pieces[piece].offset + offset
        first, last = begin // ALIGN * ALIGN, -(-(begin + matrix.panel_bytes) // ALIGN) * ALIGN
        room = np.empty(last - first + ALIGN, np.uint8)
        skip = -room.ctypes.data % ALIGN
        self._packed.file.read_into(first, room.data[skip : skip + last - first])
        return room[skip + begin - first :][: matrix.panel_bytes]

    def _submit(self, count: int) -> None:
        piece, slot = self.layout.streamed[count % len(self.layout.streamed)], count % self.layout.slots
        assert self._ring is not None
        at = slot * self.layout.slot_bytes
        self._tickets[count] = self._read(piece, self._ring.view[at : at + self.layout.slot_bytes], count)

    def _read(self, piece: int, view: memoryview, priority: int) -> Ticket:
        work = partial(self._packed.read_piece, piece, view)
        label = f"piece {piece} of {self._packed.path.name}"
        return self._mover.submit(Move(_LINK, self.sizes[piece], work, priority, label=label))

    def _prime(self, first: int) -> None:
        """Forget what was read ahead and read from streamed piece `first` on."""
        for ticket in self._tickets.values():
            if not ticket.cancel():
                with suppress(TierError):
                    ticket.wait()
        self._tickets.clear()
        self._next = first
        for count in range(first, first + self.layout.slots):
            self._submit(count)
        self._primed = True

    def close(self) -> None:
        """Cancel reads, wait for those under way and give the memory back. Idempotent."""
        try:
            self._mover.close()
        finally:
            self._tickets.clear()
            for buffer in (self._ring, self._pinned):
                if buffer is not None:
                    buffer.close()
            self._ring = self._pinned = None
            self._packed.close()
