"""Frames between processes of this machine, over a socket pair: a header and a payload of at most MAX_PAYLOAD.

Every wait inside a frame has a deadline. What the kinds between READY and ERROR mean is the protocol's own:
engine.attention_wire, engine.parallel.wire. Knows bytes and kinds; knows no process, and no torch.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VERSION = 1
MAX_PAYLOAD = 1 << 30
_HEADER = struct.Struct("<HBBHHII")
HEADER_BYTES = _HEADER.size
HELLO, READY, ERROR = 1, 2, 12
"""The first two frames of every protocol, and the last of a worker that gives up (its text)."""

Buffer = bytes | bytearray | memoryview | NDArray[np.generic]


class WireError(Exception):
    """The other side is gone, silent for too long, or does not speak this protocol."""


class Frame(NamedTuple):
    """One that came in."""

    kind: int
    layer: int
    number: int
    """Runs of a step, or the block that is meant."""
    payload: memoryview


class FrameChannel:
    """One end of a socket pair; counts what goes through it. `payload_bytes[kind]` and `frames[kind]`, both ways."""

    DATA: tuple[int, ...] = ()
    """Kinds whose payload is tensors."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self.sock = sock
        self.deadline_s = deadline_s
        self.payload_bytes: Counter[int] = Counter()
        self.frames: Counter[int] = Counter()

    def send(self, kind: int, *parts: Buffer, layer: int = 0, count: int = 0) -> None:
        """Send a frame whose payload is the parts one after another. Raises WireError."""
        views = [_flat(part) for part in parts]
        total = sum(view.nbytes for view in views)
        if total > MAX_PAYLOAD:
            raise WireError(f"a frame of {total:,} bytes is longer than {MAX_PAYLOAD:,}")
        end_s = time.monotonic() + self.deadline_s
        head = _HEADER.pack(VERSION, kind, 0, layer, 0, count, total)
        if total <= 4096:  # one segment for what is small
            views, head = [], head + b"".join(views)
        try:
            for view in (memoryview(head), *views):
                self._wait(end_s)
                self.sock.sendall(view)
        except OSError as error:
            raise WireError(_reason(error, self.deadline_s)) from None
        self.payload_bytes[kind] += total
        self.frames[kind] += 1

    def receive(self, *, idle: bool = False) -> Frame:
        """The next frame. `idle`: wait for its beginning until the other side closes. Raises WireError."""
        end_s = time.monotonic() + self.deadline_s
        head = self._exactly(_HEADER.size, None if idle else end_s)
        version, kind, _, layer, _, count, total = _HEADER.unpack(head)
        if version != VERSION or not HELLO <= kind <= ERROR or total > MAX_PAYLOAD:
            raise WireError(f"a header that is not of version {VERSION}: {head.hex()}")
        payload = self._exactly(total, time.monotonic() + self.deadline_s)
        self.payload_bytes[kind] += total
        self.frames[kind] += 1
        return Frame(kind, layer, count, memoryview(payload))

    @property
    def data_bytes(self) -> int:
        """Tensors that crossed, both ways."""
        return sum(self.payload_bytes[kind] for kind in self.DATA)

    @property
    def header_bytes(self) -> int:
        """Everything else that crossed."""
        return sum(self.payload_bytes.values()) - self.data_bytes + HEADER_BYTES * sum(self.frames.values())

    def _exactly(self, size: int, end_s: float | None) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        got = 0
        try:
            while got < size:
                if end_s is None:
                    self.sock.settimeout(None)
                else:
                    self._wait(end_s)
                count = self.sock.recv_into(view[got:])
                if not count:
                    raise WireError("it closed the connection")
                got += count
                if end_s is None:
                    end_s = time.monotonic() + self.deadline_s
        except OSError as error:
            raise WireError(_reason(error, self.deadline_s)) from None
        return data

    def _wait(self, end_s: float) -> None:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.sock.settimeout(left_s)


def _flat(part: Buffer) -> memoryview:
    if isinstance(part, np.ndarray):
        part = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
    return memoryview(part)


def _reason(error: OSError, deadline_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"it did not answer within {deadline_s:g} s"
    return f"the connection broke ({error.strerror or error})"
