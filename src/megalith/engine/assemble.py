"""From a step plan to the arrays of one step, and from one decode step to the next in place.

Knows plans, sequences and block tables; knows neither scheduling nor what becomes of the results. Cheap on purpose: a
step of 32 decodes is a handful of NumPy calls when nothing changed, and well below a millisecond when everything did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megalith.engine.batch import F32, I32, SamplingBatch, StepBatch
from megalith.engine.sequence import Sequence
from megalith.policy.facts import Chunk

_GREEDY = (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)
"""Sampling scalars of a row that is scored, not sampled."""
V = TypeVar("V", I32, F32)
_I0, _F0 = np.zeros(0, np.int32), np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class Output:
    """Output rows [low, high) belong to `sequence`; the last one is a sampled token if `samples`, others are scores."""

    sequence: Sequence
    low: int
    high: int
    samples: bool


@dataclass(slots=True)
class StepInput:
    """Everything of one step: what the runner takes, and whose rows are whose."""

    chunks: tuple[Chunk, ...]
    sequences: list[Sequence]
    batch: StepBatch
    sampling: SamplingBatch
    outputs: list[Output]
    plain: bool
    """Decodes only, and no penalty, bias or grammar: the next step differs in tokens, positions and draws alone."""


class Assembler:
    """Builds StepInputs. `block_table(id)` gives a request's blocks, which only grow while it stays on the device."""

    def __init__(
        self,
        sequences: Mapping[int, Sequence],
        block_table: Callable[[int], SequenceOf[int]],
        block_tokens: int,
        vocab: int,
    ) -> None:
        self._sequences = sequences
        self._block_table = block_table
        self._block_tokens = block_tokens
        self._mask_words = -(-vocab // 32)

    def build(self, chunks: tuple[Chunk, ...]) -> StepInput:
        """Arrays for these chunks, in order. Raises StepFailed if a grammar gives up."""
        sequences = [self._sequences[chunk.request_id] for chunk in chunks]
        counts = [chunk.new_tokens for chunk in chunks]
        starts = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        contexts = np.array([chunk.context_tokens for chunk in chunks], np.int32)
        positions = np.arange(starts[-1], dtype=np.int32) + np.repeat(contexts - starts[:-1], counts)
        tokens = np.concatenate(
            [
                s.tokens[c.context_tokens : c.context_tokens + c.new_tokens]
                for s, c in zip(sequences, chunks, strict=True)
            ]
        )
        for sequence in sequences:
            self._refresh_table(sequence)
        tables = np.zeros((len(chunks), max(s.table_size for s in sequences)), np.int32)
        for row, sequence in zip(tables, sequences, strict=True):
            row[: sequence.table_size] = sequence.table[: sequence.table_size]
        outputs, rows, targets = _outputs(chunks, sequences, starts)
        batch = StepBatch(tokens, positions, starts, tables, rows)
        sampling, plain = self._sampling(outputs, targets)
        plain = plain and len(outputs) == len(chunks) == int(starts[-1]) and bool((targets < 0).all())
        return StepInput(chunks, sequences, batch, sampling, outputs, plain)

    def advance(self, step: StepInput) -> StepInput:
        """The step that follows when the same decodes run once more, each one token later; changes `step` in place."""
        batch = step.batch
        np.add(batch.positions_M, 1, out=batch.positions_M)
        for i, sequence in enumerate(step.sequences):
            batch.tokens_M[i] = sequence.tokens[sequence.length - 1]
        for row in np.flatnonzero(batch.positions_M % self._block_tokens == 0).tolist():
            self._widen(batch, row, step.sequences[row])
        if step.plain:
            np.add(step.sampling.draw_N, np.uint64(1), out=step.sampling.draw_N)
        else:
            step.sampling, _ = self._sampling(step.outputs, step.sampling.targets_N)
        return step

    def _widen(self, batch: StepBatch, row: int, sequence: Sequence) -> None:
        self._refresh_table(sequence)
        width = batch.block_tables_SW.shape[1]
        if sequence.table_size > width:
            batch.block_tables_SW = np.pad(batch.block_tables_SW, ((0, 0), (0, max(8, width // 4))))
        batch.block_tables_SW[row, : sequence.table_size] = sequence.table[: sequence.table_size]

    def _refresh_table(self, sequence: Sequence) -> None:
        blocks = self._block_table(sequence.id)
        if len(blocks) != sequence.table_size:
            if len(blocks) > sequence.table.size:
                sequence.table = np.concatenate([sequence.table, np.zeros(len(blocks), np.int32)])
            sequence.table[sequence.table_size : len(blocks)] = blocks[sequence.table_size :]
            sequence.table_size = len(blocks)

    def _sampling(self, outputs: list[Output], targets: I32) -> tuple[SamplingBatch, bool]:
        """The sampling arrays; True when no row has sparse parts, so that only draws change from step to step."""
        rows = targets.size
        scalars: list[tuple[float, ...]] = []
        seeds, draws, logprobs = [], [], []
        for out in outputs:
            seq, scored = out.sequence, out.high - out.low - out.samples
            if scored:
                scalars += [_GREEDY] * scored
                seeds += [0] * scored
                draws += [0] * scored
                logprobs += [max(0, seq.logprobs_wanted)] * scored
            if out.samples:
                scalars.append(seq.scalars)
                seeds.append(seq.seed)
                draws.append(seq.generated)
                logprobs.append(seq.logprobs_wanted)
        columns = np.array(scalars, np.float64).reshape(rows, len(_GREEDY))
        floats = columns.astype(np.float32).T.copy()
        seen = self._seen(outputs, rows)
        bias = _sparse(rows, [(o.high - 1, b) for o in outputs if o.samples and (b := o.sequence.current_bias)], _F0)
        mask_rows, masks = self._masks(outputs, rows)
        batch = SamplingBatch(
            temperature_N=floats[0], top_k_N=columns[:, 1].astype(np.int32), top_p_N=floats[2], min_p_N=floats[3],
            repetition_N=floats[4], presence_N=floats[5], frequency_N=floats[6],
            seed_N=np.array(seeds, np.uint64), draw_N=np.array(draws, np.uint64),
            seen_starts_N1=seen[0], seen_ids=seen[1], seen_counts=seen[2],
            bias_starts_N1=bias[0], bias_ids=bias[1], bias_values=bias[2],
            mask_rows_N=mask_rows, masks=masks, targets_N=targets, num_logprobs_N=np.array(logprobs, np.int32),
        )  # fmt: skip
        return batch, seen[1].size == 0 and bias[1].size == 0 and masks.shape[0] == 0

    def _seen(self, outputs: list[Output], rows: int) -> tuple[I32, I32, I32]:
        counted = [(o.high - 1, o.sequence.counts) for o in outputs if o.samples and o.sequence.counts is not None]
        return _sparse(rows, [(row, (counts.ids, counts.counts)) for row, counts in counted], _I0)

    def _masks(self, outputs: list[Output], rows: int) -> tuple[I32, NDArray[np.uint32]]:
        mask_rows = np.full(rows, -1, np.int32)
        constrained = [(o.high - 1, g) for o in outputs if o.samples and (g := o.sequence.grammar) is not None]
        masks = np.zeros((len(constrained), self._mask_words), np.uint32)
        for i, (row, grammar) in enumerate(constrained):
            mask_rows[row] = i
            grammar.fill(masks[i])
        return mask_rows, masks


def _outputs(chunks: SequenceOf[Chunk], sequences: list[Sequence], starts: I32) -> tuple[list[Output], I32, I32]:
    """Who owns which output rows, the rows, and the target of each (-1: sample)."""
    outputs: list[Output] = []
    rows: list[int] = []
    targets: list[int] = []
    for i, (chunk, sequence) in enumerate(zip(chunks, sequences, strict=True)):
        low, first = len(rows), int(starts[i])
        if sequence.prompt_logprobs is not None and chunk.context_tokens < sequence.prompt_size - 1:
            # Row of token p scores token p + 1; a prompt that is computed again after preemption is not scored again.
            begin = max(chunk.context_tokens, len(sequence.prompt_logprobs) - 1)
            end = min(chunk.context_tokens + chunk.new_tokens, sequence.prompt_size - 1)
            rows += range(first + begin - chunk.context_tokens, first + end - chunk.context_tokens)
            targets += sequence.tokens[begin + 1 : end + 1].tolist() if end > begin else []
        if chunk.samples:
            rows.append(first + chunk.new_tokens - 1)
            targets.append(-1)
        if len(rows) > low:
            outputs.append(Output(sequence, low, len(rows), chunk.samples))
    return outputs, np.array(rows, np.int32), np.array(targets, np.int32)


def _sparse(rows: int, parts: list[tuple[int, tuple[I32, V]]], empty: V) -> tuple[I32, I32, V]:
    """CSR arrays from (row, (ids, values)) in row order."""
    starts = np.zeros(rows + 1, np.int32)
    if not parts:
        return starts, _I0, empty
    for row, (ids, _) in parts:
        starts[row + 1] = ids.size
    np.cumsum(starts, out=starts)
    values = [part[1] for _, part in parts]
    return starts, np.concatenate([part[0] for _, part in parts]), np.concatenate(values)
