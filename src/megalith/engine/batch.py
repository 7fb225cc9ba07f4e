"""What a runner is given for one step and what it gives back: plain NumPy arrays, so that one C call can take them.

Letters: M rows of the forward pass, S sequences, N output rows, W block-table width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megalith.engine.params import MAX_LOGPROBS

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]


@dataclass(slots=True)
class StepBatch:
    """Ragged rows of one step; the rows of a sequence are contiguous and in position order."""

    tokens_M: I32
    positions_M: I32
    row_starts_S1: I32
    """Rows of sequence s are [row_starts[s], row_starts[s + 1])."""
    block_tables_SW: I32
    """C-contiguous; entries past a sequence's last block are never read. Token p lives in block p // block_tokens."""
    output_rows_N: I32
    """Rows whose logits are wanted, ascending."""

    @staticmethod
    def of_one(tokens_M: ArrayLike, start: int, output_rows_N: ArrayLike, block_tokens: int) -> StepBatch:
        """These tokens of one sequence from position `start` on, whose blocks are 0, 1, 2 and so on."""
        tokens = np.ascontiguousarray(tokens_M, np.int32)
        end = start + tokens.size
        return StepBatch(
            tokens_M=tokens,
            positions_M=np.arange(start, end, dtype=np.int32),
            row_starts_S1=np.array([0, tokens.size], np.int32),
            block_tables_SW=np.arange(-(-end // block_tokens), dtype=np.int32)[None],
            output_rows_N=np.ascontiguousarray(output_rows_N, np.int32),
        )


@dataclass(slots=True)
class SamplingBatch:
    """How the N output rows are to be sampled; struct of arrays. CSR pairs hold the ragged parts.

    Sparse token statistics of row n are entries [starts[n], starts[n + 1]) of the id and value arrays.
    """

    temperature_N: F32
    top_k_N: I32
    top_p_N: F32
    min_p_N: F32
    repetition_N: F32
    presence_N: F32
    frequency_N: F32
    seed_N: U64
    draw_N: U64
    """Index of the draw within the request (number of tokens generated so far): the counter of splitmix64."""
    seen_starts_N1: I32
    seen_ids: I32
    """Tokens of prompt and output, each once; empty for rows without penalties."""
    seen_counts: I32
    """How often each was generated (0 for a token that only the prompt has)."""
    bias_starts_N1: I32
    bias_ids: I32
    bias_values: F32
    mask_rows_N: I32
    """Row of `masks` that constrains output row n, or -1."""
    masks: U32
    """[rows, ceil(V / 32)] bit masks of allowed tokens, bit v % 32 of word v // 32."""
    targets_N: I32
    """-1: sample. Else: no draw; return this token with its log probability (prompt scoring)."""
    num_logprobs_N: I32
    """-1: none. 0..MAX_LOGPROBS: the chosen token's and that many of the most likely."""


@dataclass(slots=True)
class StepResult:
    """What N output rows gave. Log-probability arrays are None when no row asked."""

    tokens_N: I32
    logprobs_N: F32 | None = None
    top_ids_NK: I32 | None = None
    """K = MAX_LOGPROBS columns; only the first num_logprobs of a row are meaningful."""
    top_logprobs_NK: F32 | None = None


class Runner(Protocol):
    """Weights plus KV storage of one instance, able to run one step. Not thread-safe; releases the GIL while it works.

    KV storage holds `num_blocks` device blocks and `num_host_blocks` host blocks of `block_tokens` tokens each.
    """

    name: str
    vocab: int
    block_tokens: int
    num_blocks: int
    num_host_blocks: int
    block_bytes: int

    def step(self, batch: StepBatch, sampling: SamplingBatch) -> StepResult:
        """Run the rows, write their K and V, sample the output rows.

        Raises StepFailed; the KV of other requests survives.
        """
        ...

    def logits(self, batch: StepBatch) -> F32:
        """Run the rows and return the float32 logits [N, V] of the output rows. For evaluation and tests."""
        ...

    def swap_out(self, device_blocks: I32, host_blocks: I32) -> None:
        """Copy device blocks to host blocks, pair by pair."""
        ...

    def swap_in(self, host_blocks: I32, device_blocks: I32) -> None:
        """Copy host blocks to device blocks, pair by pair."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, itemised: at least `weights`, `kv`, `activations`."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...


__all__ = ["MAX_LOGPROBS", "Runner", "SamplingBatch", "StepBatch", "StepResult"]
