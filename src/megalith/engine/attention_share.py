"""A share of the KV cache and attention to it, in NumPy: what an attention worker holds, in memory or in a file.

Laid out head-layer-major, as InstInfer places KV in its drives (arXiv:2409.04992, section 4): all tokens of one head of
one layer lie together, in groups of one block. In a file groups are a log: a block that begins anew takes the group
that has been free for longest. Knows shapes and bytes; knows neither sockets nor models, and no torch.

Letters: M rows, H query heads, K KV heads, E head size, L keys, T tokens of a block.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.engine.attention_wire import Run, WorkerSetup, from_bf16
from megalith.engine.partial_attention import Floats, Partial, merge

_SCORE_BYTES = 64 << 20
_FEWEST_KEPT = 16
"""SparF keeps at least so many tokens: below, nothing is worth leaving out."""
Array = NDArray[Any]


class KvShare:
    """K and V of all layers for some heads and blocks, zeroed. Raises OSError when the file cannot be had."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self._dtype = np.dtype(np.float32 if setup.float_kv else np.uint16)
        blocks, tokens, size = setup.num_blocks, setup.block_tokens, setup.head_dim
        shape = (setup.layers, setup.kv_heads, 2, blocks, tokens, size)
        by_channel = (setup.layers, setup.kv_heads, blocks, size, tokens)
        sparse = setup.keep > 1
        sizes = [int(np.prod(shape)), int(np.prod(by_channel)) if sparse else 0]
        self._memory = self._allocate(sum(sizes) * self._dtype.itemsize)
        self._kv = self._memory[: sizes[0]].reshape(shape)
        self._channels = self._memory[sizes[0] :].reshape(by_channel) if sparse else None
        self._value_sums = np.zeros((setup.layers, setup.kv_heads, blocks, size), np.float32) if sparse else None
        self._counted = np.zeros((setup.layers, blocks), np.int64)
        """Tokens of a block that are in its sum."""
        self._group = np.arange(blocks, dtype=np.int64)
        self._log = deque(range(blocks))
        self._in_use = np.zeros(blocks, dtype=bool)
        self.read_bytes = self.written_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Reserved for KV."""
        return int(self._memory.nbytes)

    def begin(self, runs: list[Run]) -> None:
        """Before a step writes: in a file, blocks that begin anew take the oldest free groups."""
        if self.setup.folder is None:
            return
        tokens = self.setup.block_tokens
        for run in runs:
            low, high = -(-run.first // tokens), -(-(run.first + run.rows) // tokens)
            for block in run.blocks[low:high, 0].tolist():
                if self._in_use[block]:
                    self._log.append(int(self._group[block]))
                self._in_use[block] = True
                self._group[block] = self._log.popleft()

    def write(self, layer: int, blocks_M: Array, offsets_M: Array, k_MKE: Array, v_MKE: Array) -> None:
        """Store rows as they came, in the type of the cache."""
        groups = self._group[blocks_M]
        for side, rows in ((0, k_MKE), (1, v_MKE)):
            self._kv[layer, :, side][:, groups, offsets_M] = rows.swapaxes(0, 1)
            self.written_bytes += rows.nbytes
        if self._channels is None or self._value_sums is None:
            return
        self._channels[layer].swapaxes(2, 3)[:, groups, offsets_M] = k_MKE.swapaxes(0, 1)
        self.written_bytes += k_MKE.nbytes
        counted = self._counted[layer]
        self._value_sums[layer][:, groups[offsets_M == 0]] = 0.0
        counted[groups[offsets_M == 0]] = 0
        new = offsets_M >= counted[groups]  # a step that is run again writes the same rows again
        np.add.at(self._value_sums[layer].swapaxes(0, 1), groups[new], self._wide(v_MKE[new]))
        np.maximum.at(counted, groups, offsets_M + 1)

    def read(self, layer: int, blocks: Array) -> tuple[Floats, Floats]:
        """Keys and values (K, blocks * T, E) of whole blocks, in float32."""
        groups = self._group[blocks]
        shape = (self.setup.kv_heads, -1, self.setup.head_dim)
        k, v = (self._kv[layer, :, side][:, groups] for side in (0, 1))
        self.read_bytes += k.nbytes + v.nbytes
        return self._wide(k).reshape(shape), self._wide(v).reshape(shape)

    def block(self, block: int) -> Array:
        """All of one block, [layers, K, 2, T, E]: a view, when nothing translates."""
        return self._kv[:, :, :, self._group[block]]

    def put_block(self, block: int, payload: memoryview) -> None:
        """Take a block in that `block` gave elsewhere."""
        target = self.block(block)
        target[...] = np.frombuffer(payload, dtype=self._dtype).reshape(target.shape)

    def stored(self, layer: int, q_MHE: Floats, run: Run) -> Partial:
        """Attention of a run's rows to those of its listed blocks that lie before its first row."""
        tokens, window = self.setup.block_tokens, self.setup.windows[layer]
        starts = run.blocks[:, 1].astype(np.int64) * tokens
        reach = starts < run.first
        if window is not None:
            reach &= starts + tokens > run.first - window + 1
        blocks, starts = run.blocks[reach, 0], starts[reach]
        if not len(blocks):
            return nothing(q_MHE)
        keys_L = (starts[:, None] + np.arange(tokens)).reshape(-1)
        rows_M = np.arange(run.first, run.first + len(q_MHE))
        seen = seen_keys(np.full_like(rows_M, run.first - 1), keys_L, None)
        if window is not None:
            seen &= keys_L[None] > rows_M[:, None] - window
        k, v = (None, None) if self._is_sparse(len(q_MHE), seen) else self.read(layer, blocks)
        if k is None or v is None:
            return self._sparse(layer, q_MHE[0], blocks, seen[0])
        return attend_rows(q_MHE, k, v, None if seen.all() else seen, self.setup.scale)

    def new(self, layer: int, q_MHE: Floats, k_MKE: Array, v_MKE: Array) -> Partial:
        """Attention of a run's rows to the keys that came with them."""
        rows = np.arange(len(q_MHE))
        seen = seen_keys(rows, rows, self.setup.windows[layer])
        k, v = (np.ascontiguousarray(self._wide(x).swapaxes(0, 1)) for x in (k_MKE, v_MKE))
        return attend_rows(q_MHE, k, v, None if len(rows) == 1 else seen, self.setup.scale)

    def _is_sparse(self, rows: int, seen: Array) -> bool:
        """Decodes only, and only where something is left out: with everything kept it is dense, exactly."""
        keys = int(seen[0].sum())
        return self.setup.keep > 1 and rows == 1 and keys > max(_FEWEST_KEPT, -(-keys // self.setup.keep))

    def _sparse(self, layer: int, q_HE: Floats, blocks: Array, seen_L: Array) -> Partial:
        """SparF: approximate scores from the largest components of q, full attention to the likeliest tokens.

        SparQ (arXiv:2312.04985) as InstInfer has it (section 4.2): the weight that the approximation gives to tokens
        that were not read goes to the mean value. As a partial result this is a larger `total`.
        """
        setup, groups = self.setup, self._group[blocks]
        assert self._channels is not None
        assert self._value_sums is not None
        size, kv_heads = setup.head_dim, setup.kv_heads
        keys, each = int(seen_L.sum()), setup.heads // kv_heads
        components, kept = -(-size // setup.keep), max(_FEWEST_KEPT, -(-keys // setup.keep))
        parts = []
        for head in range(kv_heads):
            q = q_HE[head * each : (head + 1) * each]
            strength = np.abs(q)
            top = np.argsort(-strength.sum(axis=0), kind="stable")[:components]
            columns = self._wide(self._channels[layer, head][groups[:, None], top[None]])  # (blocks, r, T)
            self.read_bytes += columns.size * self._dtype.itemsize
            heat = np.sqrt(size * strength[:, top].sum(axis=1) / np.maximum(strength.sum(axis=1), 1e-30))
            rough = (q[:, top] @ columns.transpose(1, 0, 2).reshape(len(top), -1)) * (
                setup.scale * size**0.5 / np.maximum(heat, 1e-30)
            )[:, None]
            rough = np.where(seen_L[None], rough, -np.inf)
            weights = np.exp(rough - rough.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            chosen = np.sort(np.argpartition(-weights.sum(axis=0), kept - 1)[:kept])
            group, offset = groups[chosen // setup.block_tokens], chosen % setup.block_tokens
            k, v = (self._wide(self._kv[layer, head, side][group, offset])[None] for side in (0, 1))
            self.read_bytes += 2 * k.size * self._dtype.itemsize
            part = attend_rows(q[None], k, v, None, setup.scale)
            share = np.maximum(weights[:, chosen].sum(axis=1), 1e-6).astype(np.float32)
            # Sums of whole blocks: without a window they are exactly the tokens seen, but for the last, unfinished one.
            mean = self._value_sums[layer, head][groups].sum(axis=0) / np.float32(keys)
            values = share[:, None] * part.values + (np.float32(1.0) - share)[:, None] * mean
            parts.append(Partial(part.maximum, part.total / share, values))
        return Partial(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))

    def _wide(self, values: Array) -> Floats:
        return np.asarray(values, np.float32) if self._dtype == np.float32 else from_bf16(values)

    def _allocate(self, num_bytes: int) -> Array:
        """Zeros: pages that the kernel gives when they are first written, or a file without a name.

        Nobody else can open the file and it goes with this process, however that ends. Its space is taken at once:
        a full disk is an error now and not a broken mapping later.
        """
        if self.setup.folder is None:
            return np.zeros(num_bytes // self._dtype.itemsize, self._dtype)
        with tempfile.TemporaryFile(dir=self.setup.folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=self._dtype)


def attend_rows(q_MHE: Floats, k_KLE: Floats, v_KLE: Floats, seen_ML: Array | None, scale: float) -> Partial:
    """Attention of many rows to a part of their context; rows and heads of the result are one axis, M * H."""
    rows, heads, size = q_MHE.shape
    kv_heads, keys, _ = k_KLE.shape
    piece = max(1, _SCORE_BYTES // (4 * heads * max(keys, 1)))
    if rows > piece:
        parts = [
            attend_rows(q_MHE[i : i + piece], k_KLE, v_KLE, None if seen_ML is None else seen_ML[i : i + piece], scale)
            for i in range(0, rows, piece)
        ]
        return Partial(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))
    group = heads // kv_heads
    q = q_MHE.reshape(rows, kv_heads, group, size).swapaxes(0, 1).reshape(kv_heads, rows * group, size)
    scores = (q @ k_KLE.swapaxes(1, 2)) * np.float32(scale)
    if seen_ML is not None:
        by_row = scores.reshape(kv_heads, rows, group, keys)
        scores = np.where(seen_ML[None, :, None], by_row, np.float32(-np.inf)).reshape(scores.shape)
    maximum = scores.max(axis=2)
    weights = np.exp(scores - np.where(np.isfinite(maximum), maximum, np.float32(0.0))[:, :, None])
    total = weights.sum(axis=2)
    mixed = (weights @ v_KLE) / np.where(total > 0.0, total, np.float32(1.0))[:, :, None]

    def flat(x: Floats) -> Floats:
        split = x.reshape(kv_heads, rows, group, *x.shape[2:]).swapaxes(0, 1)
        return np.ascontiguousarray(split).reshape(rows * heads, *x.shape[2:])

    return Partial(flat(maximum), flat(total), flat(mixed))


def nothing(q_MHE: Floats) -> Partial:
    """Attention to no key at all."""
    count = q_MHE.shape[0] * q_MHE.shape[1]
    zeros = np.zeros((count, q_MHE.shape[2]), np.float32)
    return Partial(np.full(count, -np.inf, np.float32), np.zeros(count, np.float32), zeros)


def seen_keys(queries_M: Array, keys_L: Array, window: int | None) -> Array:
    """Whether a query at a position sees a key at another."""
    seen: Array = keys_L[None] <= queries_M[:, None]
    return seen if window is None else seen & (keys_L[None] > queries_M[:, None] - window)


__all__ = ["KvShare", "Partial", "attend_rows", "merge", "nothing", "seen_keys"]
