"""Perplexity of a text, and how far one model's next-token distributions are from another's.

Knows runners and tokens; knows no files beyond the text that comes with the package: prose of this project's own
guides (Apache-2.0), which no model was trained on before the project was published. The text is cut into windows of
`context` tokens that do not overlap; every token of a window but its first is scored, so a figure depends on the
context and compares only with figures of the same text, tokenizer and context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.engine.batch import Runner, StepBatch

I32 = NDArray[np.int32]
F64 = NDArray[np.float64]
TEXT = Path(__file__).with_name("perplexity.txt")
CHUNK_ROWS = 32
"""Rows of one forward pass: their logits are 32 MiB for a vocabulary of 262,144."""


class Perplexity(msgspec.Struct, frozen=True):
    """Means over `tokens` scored tokens. The last two are None without a reference."""

    tokens: int
    context: int
    perplexity: float
    bits_per_token: float
    reference_perplexity: float | None = None
    mean_kl_nats: float | None = None
    """KL divergence of the reference's distribution from the model's."""
    top1_agreement: float | None = None
    """Share of positions at which both think the same token most likely."""


def windows(ids: Sequence[int], context: int, bos: int | None) -> list[I32]:
    """`ids` in windows of at most `context` tokens, each begun by `bos` if there is one; the last may be shorter."""
    head = [] if bos is None else [bos]
    size = context - len(head)
    cut = [np.array([*head, *ids[i : i + size]], np.int32) for i in range(0, len(ids), size)]
    return [window for window in cut if len(window) > 1]


def measure(
    runner: Runner, parts: Sequence[I32], context: int, reference: Runner | None = None,
    advance: Callable[[int], None] | None = None,
) -> Perplexity:  # fmt: skip
    """Score every window with `runner`, and with `reference` in step where there is one."""
    sums: dict[str, float] = {"loss": 0.0, "other": 0.0, "kl": 0.0, "same": 0.0}
    count = 0
    for window in parts:
        for start in range(0, len(window), CHUNK_ROWS):
            rows = window[start : start + CHUNK_ROWS]
            following = window[start + 1 : start + 1 + CHUNK_ROWS, None]
            got = _log_softmax(runner.logits(_batch(runner, rows, start)))[: len(following)]
            sums["loss"] -= float(np.take_along_axis(got, following, 1).sum())
            if reference is not None:
                want = _log_softmax(reference.logits(_batch(reference, rows, start)))[: len(following)]
                sums["other"] -= float(np.take_along_axis(want, following, 1).sum())
                sums["kl"] += float((np.exp(want) * (want - got)).sum())
                sums["same"] += float((want.argmax(1) == got.argmax(1)).sum())
            count += len(following)
            if advance is not None:
                advance(len(rows))
    mean = sums["loss"] / count
    against: dict[str, Any] = {}
    if reference is not None:
        against = {"reference_perplexity": math.exp(sums["other"] / count), "mean_kl_nats": sums["kl"] / count}
        against["top1_agreement"] = sums["same"] / count
    return Perplexity(count, context, math.exp(mean), mean / math.log(2), **against)


def _batch(runner: Runner, rows: I32, start: int) -> StepBatch:
    n = len(rows)
    blocks = -(-(start + n) // runner.block_tokens)
    return StepBatch(
        tokens_M=np.ascontiguousarray(rows),
        positions_M=np.arange(start, start + n, dtype=np.int32),
        row_starts_S1=np.array([0, n], np.int32),
        block_tables_SW=np.arange(blocks, dtype=np.int32)[None, :],
        output_rows_N=np.arange(n, dtype=np.int32),
    )


def _log_softmax(logits: NDArray[np.float32]) -> F64:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(1, keepdims=True))
    return wide
