"""Paged KV in torch tensors and exact attention over block tables. Knows shapes, positions and windows; knows no model.

Letters: M rows, S sequences, H query heads, K KV heads, G = H / K, E head size, L keys, W block-table width.
The G query heads that share a KV head are folded into the query length, so that one batched product serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalith.engine.batch import I32, StepBatch

I64 = NDArray[np.int64]
_WIDTH_BUCKET = 4
"""Block tables of a decode group are padded to a multiple of this: fewer distinct shapes, fewer kernels compiled."""
_SCORE_BYTES = 256 << 20
"""A prompt chunk's attention is cut into pieces whose scores stay under this."""


class PagedKv:
    """K and V of one instance: blocks of `block_tokens` tokens on the device, and as many host blocks as wanted.

    Everything is allocated at once and zeroed, so that a fresh block holds finite numbers (a masked key is multiplied
    by zero, which would not hide a NaN).
    """

    def __init__(
        self,
        layout_LKE: tuple[int, int, int],
        *,
        blocks: tuple[int, int],
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        sides: int = 2,
    ) -> None:
        """`sides` 1: rows hold K and V together."""
        layers, kv_heads, head_dim = layout_LKE
        num_blocks, num_host_blocks = blocks
        self.scratch_block = num_blocks
        """One block past those of the account, for rows that only pad a step."""
        shape = (layers, sides, num_blocks + 1, block_tokens, kv_heads, head_dim)
        host_shape = (layers, sides, num_host_blocks, block_tokens, kv_heads, head_dim)
        self.block_tokens = block_tokens
        on_gpu = device.type == "cuda"
        self.device_blocks = torch.zeros(shape, dtype=dtype, device=device) if on_gpu else _lazy_zeros(shape, dtype)
        self.host_blocks = (
            torch.zeros(host_shape, dtype=dtype, pin_memory=True) if on_gpu else _lazy_zeros(host_shape, dtype)
        )
        self.block_bytes = layers * sides * block_tokens * kv_heads * head_dim * dtype.itemsize

    def num_bytes(self) -> int:
        """Bytes of device and host blocks."""
        return self.device_blocks.nbytes + self.host_blocks.nbytes

    def write(self, layer: int, slots_M: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> None:
        """Store K and V of M rows; slot = block * block_tokens + offset."""
        for side, rows in ((0, k_MKE), (1, v_MKE)):
            store = self.device_blocks[layer, side]
            store.view(-1, *store.shape[2:]).index_copy_(0, slots_M, rows.to(store.dtype))

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [S, L, K, E] of the blocks [S, W], in table order."""
        k_blocks, v_blocks = self.device_blocks[layer, 0], self.device_blocks[layer, 1]
        sequences, width = blocks.shape
        shape = (sequences, width * self.block_tokens, *k_blocks.shape[2:])
        flat = blocks.reshape(-1)
        return k_blocks.index_select(0, flat).view(shape), v_blocks.index_select(0, flat).view(shape)

    def swap_out(self, device_blocks: I32, host_blocks: I32) -> None:
        """Copy device blocks to host blocks, pair by pair."""
        source = torch.from_numpy(device_blocks.astype(np.int64)).to(self.device_blocks.device)
        target = torch.from_numpy(host_blocks.astype(np.int64))
        self.host_blocks.index_copy_(2, target, self.device_blocks.index_select(2, source).cpu())

    def swap_in(self, host_blocks: I32, device_blocks: I32) -> None:
        """Copy host blocks to device blocks, pair by pair."""
        source = torch.from_numpy(host_blocks.astype(np.int64))
        target = torch.from_numpy(device_blocks.astype(np.int64)).to(self.device_blocks.device)
        rows = self.host_blocks.index_select(2, source).to(self.device_blocks.device)
        self.device_blocks.index_copy_(2, target, rows)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the kernel gives when they are first written: gigabytes of blocks cost no time to set up."""
    return torch.from_numpy(np.zeros(shape, {1: np.uint8, 2: np.int16, 4: np.float32}[dtype.itemsize])).view(dtype)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows of one sequence (several rows), with the keys they may see."""

    rows: slice
    blocks_1W: Tensor
    seen_ML: Tensor


@dataclass(frozen=True, slots=True)
class _Decodes:
    """One row each of many sequences; padded block tables."""

    rows_S: Tensor
    blocks_SW: Tensor
    seen_SL: Tensor


class StepAttention:
    """Attention of one step: where its rows go, and which keys each may see, for every distinct window of the model.

    `windows[i]` is the sliding window of layer i in tokens (itself included), or None.
    """

    def __init__(self, kv: PagedKv, batch: StepBatch, windows: Sequence[int | None], scale: float) -> None:
        self._kv = kv
        self._windows = windows
        self._scale = scale
        self._device = kv.device_blocks.device
        starts = batch.row_starts_S1
        self._counts_S = np.diff(starts)
        self._batch = batch
        rows = int(starts[-1])
        positions_M = batch.positions_M[:rows].astype(np.int64)
        sequence_M = np.repeat(np.arange(self._counts_S.size), self._counts_S)
        block_M = batch.block_tables_SW[sequence_M, positions_M // kv.block_tokens].astype(np.int64)
        self._slots_M = self._tensor(block_M * kv.block_tokens + positions_M % kv.block_tokens)
        self._positions_M = positions_M
        self._groups = {window: self._group(window) for window in set(windows)}

    def __call__(self, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """Write this layer's K and V, then attend. Returns [M, H, E] in q's dtype."""
        self._kv.write(layer, self._slots_M, k_MKE, v_MKE)
        decodes, chunks = self._groups[self._windows[layer]]
        out_MHE = torch.empty_like(q_MHE)
        if decodes is not None:
            out_MHE[decodes.rows_S] = self._decode(layer, q_MHE[decodes.rows_S], decodes)
        for chunk in chunks:
            out_MHE[chunk.rows] = self._chunk(layer, q_MHE[chunk.rows], chunk)
        return out_MHE

    def _decode(self, layer: int, q_SHE: Tensor, group: _Decodes) -> Tensor:
        k_SLKE, v_SLKE = self._kv.gather(layer, group.blocks_SW)
        return decode_attention(q_SHE, k_SLKE, v_SLKE, group.seen_SL, self._scale)

    def _chunk(self, layer: int, q_MHE: Tensor, chunk: _Chunk) -> Tensor:
        k_1LKE, v_1LKE = self._kv.gather(layer, chunk.blocks_1W)
        rows, heads, size = q_MHE.shape
        kv_heads, keys = k_1LKE.shape[2], k_1LKE.shape[1]
        group = heads // kv_heads
        k_1KLE, v_1KLE = k_1LKE.to(q_MHE.dtype).transpose(1, 2), v_1LKE.to(q_MHE.dtype).transpose(1, 2)
        piece = max(1, _SCORE_BYTES // (4 * heads * keys))
        parts = []
        for low in range(0, rows, piece):
            q = q_MHE[low : low + piece]
            count = q.shape[0]
            folded = q.view(count, kv_heads, group, size).permute(1, 2, 0, 3).reshape(1, kv_heads, group * count, size)
            seen = chunk.seen_ML[low : low + piece].repeat(group, 1)
            out = torch.nn.functional.scaled_dot_product_attention(
                folded, k_1KLE, v_1KLE, attn_mask=seen, scale=self._scale
            )
            parts.append(out.view(kv_heads, group, count, size).permute(2, 0, 1, 3).reshape(count, heads, size))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _group(self, window: int | None) -> tuple[_Decodes | None, list[_Chunk]]:
        """Decodes together, every longer run of rows on its own; block tables cut to what the window reaches."""
        size, tables = self._kv.block_tokens, self._batch.block_tables_SW
        starts = self._batch.row_starts_S1
        first_S = self._positions_M[starts[:-1]]
        last_S = first_S + self._counts_S - 1
        low_S = np.zeros_like(first_S) if window is None else np.maximum(first_S - window + 1, 0) // size
        high_S = last_S // size + 1
        chunks = []
        for s in np.flatnonzero(self._counts_S > 1):
            blocks = self._tensor(tables[s : s + 1, low_S[s] : high_S[s]].astype(np.int64))
            keys = torch.arange(int(low_S[s]) * size, int(high_S[s]) * size, device=self._device)
            queries = self._tensor(self._positions_M[starts[s] : starts[s + 1]])
            seen = seen_keys(queries[:, None], keys[None], window)
            chunks.append(_Chunk(slice(int(starts[s]), int(starts[s + 1])), blocks, seen))
        return self._decode_group(np.flatnonzero(self._counts_S == 1), low_S, high_S, window), chunks

    def _decode_group(self, which: I64, low_S: I64, high_S: I64, window: int | None) -> _Decodes | None:
        if which.size == 0:
            return None
        size, tables = self._kv.block_tokens, self._batch.block_tables_SW
        low, high = low_S[which], high_S[which]
        width = -(-int((high - low).max()) // _WIDTH_BUCKET) * _WIDTH_BUCKET
        columns = low[:, None] + np.arange(width)
        inside = columns < high[:, None]
        blocks = np.where(inside, tables[which[:, None], np.where(inside, columns, 0)], 0).astype(np.int64)
        rows = self._batch.row_starts_S1[which].astype(np.int64)
        keys = (low * size)[:, None] + np.arange(width * size)
        seen = seen_keys(self._tensor(self._positions_M[rows])[:, None], self._tensor(keys), window)
        return _Decodes(self._tensor(rows), self._tensor(blocks), seen)

    def _tensor(self, values: I64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


def decode_attention(q_SHE: Tensor, k_SLKE: Tensor, v_SLKE: Tensor, seen_SL: Tensor, scale: float) -> Tensor:
    """Attention of one query row per sequence over its gathered keys; False in `seen_SL` hides a key.

    Static shapes and no host reads: it can be captured in a CUDA graph. On a CPU this is three to five times faster
    than two batched products with a softmax between.
    """
    sequences, heads, size = q_SHE.shape
    kv_heads = k_SLKE.shape[2]
    k_SLKE, v_SLKE = k_SLKE.to(q_SHE.dtype), v_SLKE.to(q_SHE.dtype)
    q_SKGE = q_SHE.view(sequences, kv_heads, heads // kv_heads, size)
    out = torch.nn.functional.scaled_dot_product_attention(
        q_SKGE, k_SLKE.transpose(1, 2), v_SLKE.transpose(1, 2), attn_mask=seen_SL[:, None, None, :], scale=scale
    )
    return out.reshape(sequences, heads, size)


def seen_keys(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query at a position sees a key at another (broadcast)."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
