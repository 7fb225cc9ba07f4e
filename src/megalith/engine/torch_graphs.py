"""Decode steps of fixed shapes over static buffers, so that a CUDA graph can replay them with one launch.

Knows the tensors of a decode step; knows no sampling. Without capture the very same code runs eagerly on any device,
which is how a machine without a GPU tests it.

A step is padded to a bucket of sequences and block-table columns (powers of two). Padded rows write into one scratch
block past the last real one and see its first key only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalith.engine.batch import StepBatch
from megalith.engine.torch_attention import PagedKv, decode_attention, seen_keys
from megalith.model.transformer import Transformer

_MAX_SEQUENCES = 256
"""Larger decode steps run without a graph: launches no longer matter there."""
_WARM_UP_RUNS = 2


class _Bucket:
    """Buffers, and the captured graph, of one padded shape."""

    def __init__(self, sequences: int, width: int, device: torch.device) -> None:
        self.tokens_S = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.positions_S = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.slots_S = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.blocks_SW = torch.zeros((sequences, width), dtype=torch.int64, device=device)
        self.logits_SV: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None


class StaticDecodes:
    """Runs steps that are all decodes and all sampled. `capture` needs a CUDA device."""

    def __init__(self, model: Transformer, kv: PagedKv, windows: Sequence[int | None], *, capture: bool) -> None:
        self._model = model
        self._kv = kv
        self._windows = windows
        self._scale = model.spec.attention_scale
        self._capture = capture
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    def takes(self, batch: StepBatch) -> bool:
        """Whether `batch` is one row of each sequence, every one an output."""
        sequences = batch.row_starts_S1.size - 1
        return sequences <= _MAX_SEQUENCES and sequences == batch.tokens_M.size == batch.output_rows_N.size

    def run(self, batch: StepBatch) -> Tensor:
        """Logits [S, V]; valid until the next run."""
        sequences, size = batch.tokens_M.size, self._kv.block_tokens
        positions = batch.positions_M.astype(np.int64)
        needed = int(positions.max()) // size + 1
        key = (_power_of_two(sequences), _power_of_two(needed))
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(*key, self._kv.device_blocks.device)
        columns = min(needed, batch.block_tables_SW.shape[1])
        last = batch.block_tables_SW[np.arange(sequences), positions // size].astype(np.int64)
        # Entries of a table past a sequence's last block may hold anything; block 0 is a safe thing to gather.
        inside = np.arange(columns) <= (positions // size)[:, None]
        scratch = self._kv.scratch_block
        _fill(bucket.tokens_S, batch.tokens_M.astype(np.int64), 0)
        _fill(bucket.positions_S, positions, 0)
        _fill(bucket.slots_S, last * size + positions % size, scratch * size)
        blocks = np.full(tuple(bucket.blocks_SW.shape), scratch, np.int64)
        blocks[:sequences, :columns] = np.where(inside, batch.block_tables_SW[:, :columns], 0)
        bucket.blocks_SW.copy_(torch.from_numpy(blocks))
        self._replay(bucket)
        assert bucket.logits_SV is not None
        return bucket.logits_SV[:sequences]

    def _replay(self, bucket: _Bucket) -> None:
        if not self._capture:
            bucket.logits_SV = self._forward(bucket)
            return
        if bucket.graph is None:
            # Warm up on a side stream: capture must not see lazy initialisation (CUDA programming guide, graphs).
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    self._forward(bucket)
            torch.cuda.current_stream().wait_stream(stream)
            bucket.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(bucket.graph):
                bucket.logits_SV = self._forward(bucket)
        bucket.graph.replay()

    def _forward(self, bucket: _Bucket) -> Tensor:
        keys = torch.arange(bucket.blocks_SW.shape[1] * self._kv.block_tokens, device=bucket.blocks_SW.device)
        seen = {w: seen_keys(bucket.positions_S[:, None], keys[None], w) for w in set(self._windows)}

        def attend(layer: int, q_SHE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
            self._kv.write(layer, bucket.slots_S, k_SKE, v_SKE)
            k_SLKE, v_SLKE = self._kv.gather(layer, bucket.blocks_SW)
            return decode_attention(q_SHE, k_SLKE, v_SLKE, seen[self._windows[layer]], self._scale)

        return self._model.head(self._model(bucket.tokens_S, bucket.positions_S, attend))


def _fill(buffer: Tensor, values: NDArray[np.int64], padding: int) -> None:
    whole = np.full(buffer.shape[0], padding, np.int64)
    whole[: values.size] = values
    buffer.copy_(torch.from_numpy(whole))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
