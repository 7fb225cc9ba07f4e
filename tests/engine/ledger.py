"""A runner whose model is exact: the logits of a row are a hash of every token that its block table leads to.

No arithmetic noise, so any mistake in block tables, chunking, prefix sharing, swapping or in-place updates changes the
tokens at once. It implements the whole Runner protocol over real (integer) paged storage, with the real sampler.
"""

from __future__ import annotations

import zlib

import numpy as np

from megalith.base.errors import StepFailed
from megalith.engine.batch import F32, I32, SamplingBatch, StepBatch, StepResult
from megalith.engine.sampling import sample

EOS = 2


class LedgerRunner:
    name = "ledger"

    def __init__(self, vocab: int = 97, block_tokens: int = 4, num_blocks: int = 64, num_host_blocks: int = 0) -> None:
        self.vocab = vocab
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_bytes = 16 * block_tokens
        self.device = np.full((num_blocks, block_tokens, 2), -1, np.int64)  # token, position
        self.host = np.full((num_host_blocks, block_tokens, 2), -1, np.int64)
        self.poison: int | None = None
        """A token that breaks the step it is computed in."""
        self.steps = 0
        self.swaps = 0
        self.eos_every = 40
        """About one row in so many prefers end-of-text."""

    def step(self, batch: StepBatch, sampling: SamplingBatch) -> StepResult:
        self.steps += 1
        return sample(self.logits(batch), sampling)

    def logits(self, batch: StepBatch) -> F32:
        if self.poison is not None and (batch.tokens_M == self.poison).any():
            raise StepFailed(f"Token {self.poison} cannot be computed.")
        tokens, positions, starts = batch.tokens_M, batch.positions_M, batch.row_starts_S1
        row_of = np.repeat(np.arange(starts.size - 1), np.diff(starts))
        blocks = batch.block_tables_SW[row_of, positions // self.block_tokens]
        slots = np.stack([tokens, positions], axis=1)
        self.device[blocks, positions % self.block_tokens] = slots
        rows = np.zeros((batch.output_rows_N.size, self.vocab), np.float32)
        for n, row in enumerate(batch.output_rows_N):
            rows[n] = self._row(batch, int(row_of[row]), int(positions[row]))
        return rows

    def _row(self, batch: StepBatch, sequence: int, position: int) -> F32:
        count = position // self.block_tokens + 1
        seen = self.device[batch.block_tables_SW[sequence, :count]].reshape(-1, 2)[: position + 1]
        if not (seen[:, 1] == np.arange(position + 1)).all():
            raise AssertionError(f"position {position} sees {seen[:, 1].tolist()}: a wrong block or a stale one")
        state = zlib.crc32(seen[:, 0].tobytes())
        row = np.random.default_rng(state).normal(0, 2, self.vocab).astype(np.float32)
        if state % self.eos_every == 0:
            row[EOS] += 30
        return row

    def swap_out(self, device_blocks: I32, host_blocks: I32) -> None:
        self.swaps += 1
        self.host[host_blocks] = self.device[device_blocks]

    def swap_in(self, host_blocks: I32, device_blocks: I32) -> None:
        self.swaps += 1
        self.device[device_blocks] = self.host[host_blocks]
        self.host[host_blocks] = -1

    def memory_bytes(self) -> dict[str, int]:
        return {"weights": 0, "kv": self.device.nbytes + self.host.nbytes, "activations": 0}

    def close(self) -> None:
        self.device = self.device[:0]


class Letters:
    """A token stream: token i is one letter, so that text tells tokens."""

    def push(self, token_id: int, /) -> str:
        return chr(0x100 + token_id)

    def flush(self) -> str:
        return ""


def text_of(tokens: list[int] | tuple[int, ...]) -> str:
    return "".join(chr(0x100 + token) for token in tokens)
