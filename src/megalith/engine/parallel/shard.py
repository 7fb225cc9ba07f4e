"""A rank's share of a model's weights, as a Checkpoint of its own: what is not its share is not read.

Query heads and FFN rows are divided over the ranks, and KV heads where there are enough, else each is on several ranks:
q, k, v, gate and up are cut by rows, o and down by columns, so that each rank's o and down give one addend of the sum
(Megatron-LM, arXiv:1909.08053, section 3). Norms are whole on each rank. Knows names and shapes; knows no process.
"""

from __future__ import annotations

import msgspec
import numpy as np

from megalith.model.checkpoint import Checkpoint, Tensor
from megalith.model.formats import row_bytes
from megalith.specs.model import ModelSpec

_CHUNK_BYTES = 4 << 20
SUMMED = (".o.weight", ".down.weight")
"""Cut by columns: their outputs are addends."""


class Cut:
    """Which heads and FFN rows a rank has."""

    def __init__(self, spec: ModelSpec, rank: int, ranks: int) -> None:
        heads, kv = spec.num_heads, spec.num_kv_heads
        self.heads = range(heads * rank // ranks, heads * (rank + 1) // ranks)
        first = kv * rank // ranks
        self.kv_heads = range(first, max(first + 1, kv * (rank + 1) // ranks))
        self.ffn = range(spec.ffn * rank // ranks, spec.ffn * (rank + 1) // ranks)
        self._head_dim = spec.head_dim
        self.spec = msgspec.structs.replace(
            spec, num_heads=len(self.heads), num_kv_heads=len(self.kv_heads), ffn=len(self.ffn),
            query_scale=spec.attention_scale,
        )  # fmt: skip

    def lines(self, name: str) -> range | None:
        """Rows, or columns where it is one of SUMMED, of the tensor of that canonical name; None: all of it."""
        if not name.startswith("layers."):
            return None
        part = name.split(".")[2]
        if part in ("gate", "up", "down"):
            return self.ffn
        of = {"q": self.heads, "o": self.heads, "k": self.kv_heads, "v": self.kv_heads}.get(part)
        return None if of is None else range(of.start * self._head_dim, of.stop * self._head_dim)


class ShardCheckpoint(Checkpoint):
    """The share of one rank. `tensors_read` are the names that were asked for, in order."""

    def __init__(self, whole: Checkpoint, rank: int, ranks: int) -> None:
        self._cut = Cut(whole.spec, rank, ranks)
        super().__init__(self._cut.spec, whole._files, whole._entries)
        self.tensors_read: list[str] = []

    def tensor(self, name: str) -> Tensor:
        """This rank's share of it. Raises ModelFormatError."""
        self.tensors_read.append(name)
        whole, lines = super().tensor(name), self._cut.lines(name)
        if lines is None:
            return whole
        if name.endswith(SUMMED):
            return _columns(whole, lines)
        if len(whole.shape) == 1:
            values = whole.float32()[lines.start : lines.stop]
            return Tensor(name, values.shape, "F32", np.ascontiguousarray(values).view(np.uint8).reshape(1, -1))
        return Tensor(name, (len(lines), *whole.shape[1:]), whole.format, whole.raw[lines.start : lines.stop])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of this rank's share."""
        whole, lines = super().shape(name), self._cut.lines(name)
        if lines is None:
            return whole
        return (whole[0], len(lines)) if name.endswith(SUMMED) else (len(lines), *whole[1:])


def _columns(whole: Tensor, lines: range) -> Tensor:
    """Decoded a few rows at a time: a block of a format may lie across the cut."""
    rows, inputs = whole.shape
    out = np.empty((rows, len(lines)), np.float32)
    step = max(1, _CHUNK_BYTES // (4 * inputs))
    for first in range(0, rows, step):
        raw = whole.raw[first : first + step]
        part = Tensor(whole.name, (raw.shape[0], inputs), whole.format, raw).float32()
        out[first : first + step] = part[:, lines.start : lines.stop]
    return Tensor(whole.name, out.shape, "F32", out.view(np.uint8).reshape(rows, row_bytes("F32", len(lines))))
