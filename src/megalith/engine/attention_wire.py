"""Frames between the engine process and an attention worker, over a socket pair of this machine.

A frame is a fixed header and a payload of at most MAX_PAYLOAD bytes. Every wait inside a frame has a deadline. Knows
bytes and kinds; knows neither attention nor processes, and no torch.

    engine                                   worker
    HELLO (WorkerSetup as JSON)       ->
                                      <-     READY
    STEP (where the rows belong)      ->              once a step
    QUERY (q)                         ->              once a layer, before k and v exist
    PAIR (k, v)                       ->              once a layer
                                      <-     OUTPUT (o); or PARTIAL (max, sum, values) without a PAIR
    PUT (block) / GET                 ->     BLOCK    blocks that change places
    STATS                             ->     STATS    JSON
                                      <-     ERROR (text), after which the worker ends
"""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalith.base.config import Config

VERSION = 1
MAX_PAYLOAD = 1 << 30
_HEADER = struct.Struct("<HBBHHII")
HEADER_BYTES = _HEADER.size
HELLO, READY, STEP, QUERY, PAIR, OUTPUT, PARTIAL, PUT, GET, BLOCK, STATS, ERROR = range(1, 13)
DATA = (QUERY, PAIR, OUTPUT, PARTIAL, PUT, BLOCK)
"""Kinds whose payload is tensors; that of all others counts as headers."""

Buffer = bytes | bytearray | memoryview | NDArray[np.generic]


class WireError(Exception):
    """The other side is gone, silent for too long, or does not speak this protocol."""


class WorkerSetup(Config):
    """What a worker is told first."""

    layers: int
    heads: int
    """Query heads and KV heads that this worker serves."""
    kv_heads: int
    head_dim: int
    block_tokens: int
    num_blocks: int
    scale: float
    windows: tuple[int | None, ...]
    """Sliding window of every layer in tokens, or None."""
    float_queries: bool
    """q and o are float32; False: bfloat16."""
    float_kv: bool
    partial: bool = False
    """Answer a QUERY with PARTIAL over the listed blocks, and take no PAIR."""
    folder: str | None = None
    """KV in a nameless file here instead of memory."""
    keep: int = 1
    """SparF: read the 1/keep largest components of q of all keys, then the 1/keep likeliest keys. 1: dense."""
    deadline_s: float = 60.0


class Run(NamedTuple):
    """Rows of one sequence in a step."""

    rows: int
    first: int
    """Position of the first row."""
    blocks: NDArray[np.int32]
    """(n, 2): where a block lies, and its place in the sequence."""


class Frame(NamedTuple):
    """One that came in."""

    kind: int
    layer: int
    number: int
    """Runs of a step, or the block that is meant."""
    payload: memoryview


class Channel:
    """One end of a socket pair; counts what goes through it. `payload_bytes[kind]` and `frames[kind]`, both ways."""

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
        return sum(self.payload_bytes[kind] for kind in DATA)

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


class Tables:
    """Block tables by difference, so that a step's header does not grow with the context.

    A run says which run of the step before it goes on from, how many of its blocks stay, and which are added.
    """

    def __init__(self) -> None:
        self._last: list[Run] = []
        self._by_first: dict[int, int] = {}

    def encode(self, runs: Sequence[Run]) -> bytes:
        """The payload of STEP."""
        parts: list[bytes] = []
        for run in runs:
            before = self._by_first.get(int(run.blocks[0, 0]), -1) if len(run.blocks) else -1
            kept = 0
            if before >= 0:
                old = self._last[before].blocks
                size = min(len(old), len(run.blocks))
                differ = np.flatnonzero((old[:size] != run.blocks[:size]).any(axis=1))
                kept = int(differ[0]) if differ.size else size
            new = run.blocks[kept:]
            parts.append(struct.pack("<IIiII", run.rows, run.first, before, kept, len(new)))
            parts.append(np.ascontiguousarray(new, dtype="<i4").tobytes())
        self._keep(runs)
        return b"".join(parts)

    def decode(self, payload: memoryview, count: int) -> list[Run]:
        """The runs again. Raises WireError for what no engine sends."""
        runs, at = [], 0
        for _ in range(count):
            if len(payload) < at + 20:
                raise WireError("a step shorter than it says")
            rows, first, before, kept, new = struct.unpack_from("<IIiII", payload, at)
            at += 20
            if len(payload) < at + 8 * new or before >= len(self._last) or (before < 0 and kept):
                raise WireError("a step shorter than it says")
            added = np.frombuffer(payload[at : at + 8 * new], dtype="<i4").reshape(new, 2)
            at += 8 * new
            old = self._last[before].blocks[:kept] if kept else added[:0]
            runs.append(Run(rows, first, np.concatenate([old, added]).astype(np.int32)))
        if at != len(payload):
            raise WireError("a step longer than it says")
        self._keep(runs)
        return runs

    def _keep(self, runs: Sequence[Run]) -> None:
        self._last = list(runs)
        self._by_first = {int(run.blocks[0, 0]): i for i, run in enumerate(runs) if len(run.blocks)}


def widen(payload: memoryview, is_float: bool) -> NDArray[np.float32]:
    """float32 values of a payload in float32 or bfloat16."""
    if is_float:
        return np.frombuffer(payload, dtype=np.float32)
    return from_bf16(np.frombuffer(payload, dtype=np.uint16))


def from_bf16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact."""
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; finite values."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _flat(part: Buffer) -> memoryview:
    if isinstance(part, np.ndarray):
        part = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
    return memoryview(part)


def _reason(error: OSError, deadline_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"it did not answer within {deadline_s:g} s"
    return f"the connection broke ({error.strerror or error})"
