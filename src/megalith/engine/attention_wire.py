"""Frames between the engine process and an attention worker, over a socket pair of this machine.

Frames are those of engine.frames. Knows kinds and what is in them; knows neither attention nor processes, and no torch.

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

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalith.base.config import Config
from megalith.engine.frames import ERROR, HEADER_BYTES, HELLO, READY, Frame, FrameChannel, WireError

__all__ = ["ERROR", "HEADER_BYTES", "HELLO", "READY", "Frame", "WireError"]

STEP, QUERY, PAIR, OUTPUT, PARTIAL, PUT, GET, BLOCK, STATS = range(3, 12)
DATA = (QUERY, PAIR, OUTPUT, PARTIAL, PUT, BLOCK)
"""Kinds whose payload is tensors; that of all others counts as headers."""


class Channel(FrameChannel):
    """One that carries the frames of this protocol."""

    DATA = DATA


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
