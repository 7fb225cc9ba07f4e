"""A rank's layers through a window: attention and FFN blocks come from a file ahead of use, and go when they have run.

The memory scheduler of TPI-LLM (arXiv:2410.00531) over policy.residency.SlidingWindow and the one mover. The file holds
this rank's share in the type that it computes in; it is written when the model is loaded and has no name, so it goes
with the process, however that ends. Modules find the same bytes as in memory, so results are the same bits. Knows
linear layers and files; knows nothing about steps.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalith.base.errors import TierError
from megalith.policy.residency import SlidingWindow
from megalith.tier.disk import ALIGN, DirectFile
from megalith.tier.memory import HugeBuffer
from megalith.tier.mover import Move, Mover, Ticket
from megalith.tier.throttle import TokenBucket

_LINK = "disk"


class _Block(NamedTuple):
    """Attention or FFN of one layer, in the file."""

    name: str
    offset: int
    num_bytes: int
    checksum: int


class BlockWindow:
    """At most `size` blocks in memory. First every layer is added, then seal(), then weights are asked for."""

    def __init__(self, size: int, folder: Path, bytes_per_s: int | None = None) -> None:
        self.size = size
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=folder, prefix="shard-")
        os.close(handle)
        try:
            self._file = DirectFile(Path(path), "rw")
        finally:
            os.unlink(path)
        self._blocks: list[_Block] = []
        self._open: tuple[str, list[Tensor], int] = ("", [], 0)
        self._free: dict[int, list[HugeBuffer]] = {}
        self._held: dict[int, HugeBuffer] = {}
        self._tickets: dict[int, Ticket] = {}
        self._verified: set[int] = set()
        self._policy: SlidingWindow | None = None
        self._mover = Mover(workers=2)
        self._mover.add_link(_LINK, None if bytes_per_s is None else TokenBucket(bytes_per_s))

    def linear(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A LinearFactory for the layers, in the order of the model."""
        _, layer, part, _ = name.split(".")
        block = f"layer {layer} {'attention' if part in 'qkvo' else 'ffn'}"
        if self._open[0] != block:
            self._write()
            self._open = (block, [], 0)
        _, tensors, offset = self._open
        tensors.append(weight.contiguous())
        self._open = (block, tensors, offset + -(-weight.nbytes // 64) * 64)
        return _Streamed(self, len(self._blocks), offset, weight, bias)

    def seal(self) -> None:
        """All blocks are in. Begins to read the first ones."""
        self._write()
        self._file.sync()
        self._policy = SlidingWindow(len(self._blocks), self.size)

    def weight(self, block: int, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix of the block that runs now; valid until another block is asked for. Raises TierError."""
        if self._policy is None:
            raise TierError("A window was used before it was complete, or after it was closed.")
        change = self._policy.need(block)
        for gone in change.drop:
            self._drop(gone)
        for wanted in change.load:
            self._load(wanted)
        ticket = self._tickets.get(block)
        if ticket is not None:
            ticket.wait()
            del self._tickets[block]
        count = shape[0] * shape[1]
        return torch.frombuffer(self._held[block].view, dtype=dtype, count=count, offset=offset).view(shape)

    @property
    def num_bytes(self) -> int:
        """Of memory when the window is full: the largest `size` blocks that follow each other."""
        sizes = [block.num_bytes for block in self._blocks]
        size = min(self.size, len(sizes))
        return max(sum(sizes[first : first + size]) for first in range(len(sizes) - size + 1))

    @property
    def file_bytes(self) -> int:
        """Of all blocks."""
        return sum(block.num_bytes for block in self._blocks)

    @property
    def read_bytes(self) -> int:
        """So far."""
        return self._mover.stats()[_LINK].num_bytes

    def close(self) -> None:
        """Idempotent."""
        self._policy = None
        self._mover.close()
        self._tickets.clear()
        for buffer in (*self._held.values(), *(spare for spares in self._free.values() for spare in spares)):
            buffer.close()
        self._held.clear()
        self._free.clear()
        self._file.close()

    def _write(self) -> None:
        name, tensors, num_bytes = self._open
        if not tensors:
            return
        whole = -(-num_bytes // ALIGN) * ALIGN
        last = self._blocks[-1] if self._blocks else None
        begin = last.offset + last.num_bytes if last else 0
        with HugeBuffer(whole) as buffer:
            at = 0
            for tensor in tensors:
                into = torch.frombuffer(buffer.view, dtype=tensor.dtype, count=tensor.numel(), offset=at)
                into.copy_(tensor.reshape(-1))
                del into
                at += -(-tensor.nbytes // 64) * 64
            self._file.write_from(begin, buffer.view)
            self._blocks.append(_Block(name, begin, whole, zlib.crc32(buffer.view)))
        self._open = ("", [], 0)

    def _load(self, number: int) -> None:
        block = self._blocks[number]
        spares = self._free.get(block.num_bytes)
        buffer = spares.pop() if spares else HugeBuffer(block.num_bytes)
        self._held[number] = buffer
        move = Move(_LINK, block.num_bytes, partial(self._read, number, buffer), label=block.name)
        self._tickets[number] = self._mover.submit(move)

    def _drop(self, number: int) -> None:
        ticket = self._tickets.pop(number, None)
        if ticket is not None and not ticket.cancel():
            with suppress(TierError):
                ticket.wait()
        self._free.setdefault(self._blocks[number].num_bytes, []).append(self._held.pop(number))

    def _read(self, number: int, buffer: HugeBuffer) -> None:
        """On a thread of the mover; the checksum is verified the first time."""
        block = self._blocks[number]
        self._file.read_into(block.offset, buffer.view)
        if number in self._verified:
            return
        found = zlib.crc32(buffer.view)
        if found != block.checksum:
            raise TierError(
                f"Block {block.name} of the window is corrupted: {block.num_bytes} bytes at {block.offset} have "
                f"checksum {found:08x}, {block.checksum:08x} were written.",
                "Start again: the file is written anew.",
            )
        self._verified.add(number)


class _Streamed(nn.Module):
    """y = x W^T + b with W in the window."""

    def __init__(self, window: BlockWindow, block: int, offset: int, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._window, self._block, self._offset = window, block, offset
        self._shape, self._dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[M, in] to [M, out]."""
        weight = self._window.weight(self._block, self._offset, self._shape, self._dtype)
        return functional.linear(x, weight, self.bias)
