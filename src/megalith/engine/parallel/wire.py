"""What ranks of one instance say to each other. Frames are those of engine.frames.

    rank 0 (the engine)                      another rank
    HELLO (RankSetup as JSON)         ->
                                      <-     READY (RankReport as JSON)
    STEP (where rows belong, hidden states)  ->   once a step: never tokens, never text
    SUM (partial sums)                <->    SUM  twice a layer, along the star or the ring
    STATS                             ->     STATS  RankReport as JSON
                                      <-     ERROR (text), after which the rank ends

Knows bytes and kinds; knows no process and no torch.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from megalith.base.config import Config
from megalith.cost.collective import Collective, Link
from megalith.engine.batch import F32, StepBatch
from megalith.engine.frames import WireError

STEP, SUM, STATS = 3, 4, 5
DATA = (STEP, SUM)
_STEP = struct.Struct("<III")


class RankSetup(Config):
    """What a rank is told first."""

    model: str
    """Path of the model on this rank's disk."""
    rank: int
    ranks: int
    float_compute: bool
    """Weights and activations are float32; False: bfloat16."""
    float_kv: bool
    block_tokens: int
    num_blocks: int
    threads: int
    collective: Collective = "star"
    link: Link | None = None
    window_blocks: int = 0
    folder: str = ""
    disk_bytes_per_s: int | None = None
    deadline_s: float = 60.0


class RankReport(Config):
    """What a rank has."""

    tensors: tuple[str, ...]
    """Canonical names of all that it read of the model."""
    weight_bytes: int
    """In memory, the window counted at its full size."""
    kv_bytes: int
    read_bytes: int = 0
    """By the window so far."""


class Rows(NamedTuple):
    """Of one step, as a rank sees them."""

    batch: StepBatch
    """Without tokens."""
    hidden_MD: F32


def encode_step(batch: StepBatch, hidden_MD: F32) -> tuple[bytes, F32]:
    """The payload of STEP: positions, whose rows are whose, block tables; hidden states."""
    tables = np.ascontiguousarray(batch.block_tables_SW, dtype="<i4")
    head = _STEP.pack(batch.positions_M.size, *tables.shape)
    parts = (batch.positions_M, batch.row_starts_S1)
    return b"".join([head, *(part.astype("<i4").tobytes() for part in parts), tables.tobytes()]), hidden_MD


def decode_step(payload: memoryview, hidden: int) -> Rows:
    """The rows again. Raises WireError for what no engine sends."""
    if len(payload) < _STEP.size:
        raise WireError("a step shorter than it says")
    rows, sequences, width = _STEP.unpack_from(payload)
    sizes = (rows, sequences + 1, sequences * width)
    if len(payload) != _STEP.size + 4 * (sum(sizes) + rows * hidden):
        raise WireError(f"a step of {len(payload)} bytes, which {rows} rows of {hidden} values do not take")
    ints = np.frombuffer(payload, dtype="<i4", count=sum(sizes), offset=_STEP.size).astype(np.int32)
    positions, starts, tables = np.split(ints, np.cumsum(sizes)[:-1])
    values = np.frombuffer(payload, dtype="<f4", offset=_STEP.size + 4 * sum(sizes)).astype(np.float32)
    none = np.zeros(0, np.int32)
    batch = StepBatch(none, positions, starts, tables.reshape(sequences, width), none)
    return Rows(batch, values.reshape(rows, hidden))
