"""Perplexity of a text, and how far one runner's next-token distributions are from another's.

Knows runners and tokens. The text that comes with the package (`perplexity.txt`) is chapters I to VI of William Morris,
"News from Nowhere" (1890; the author died in 1896: public domain), lines of a paragraph joined, marks of italics taken
out. Models may have seen it in training: its perplexity compares formats of one model, not models.

Method, the one of llama.cpp's `perplexity` tool, so that figures compare: the text is cut into windows of `context`
tokens that do not overlap, what is left at the end is dropped, the first token of a window gives way to the
beginning-of-text token in models that want one, and the second half of each window is scored, so that every scored
token has at least half a window before it. A figure compares only with others of the same text, tokenizer and context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError, EngineError
from megalith.engine.batch import F32, I32, Runner, StepBatch
from megalith.model.tokenizer import Tokenizer

F64 = NDArray[np.float64]
TEXT = Path(__file__).with_name("perplexity.txt")
LEAST_CONTEXT = 16
ROWS = 64
"""Rows of one forward pass: their logits are 64 MiB for a vocabulary of 262,144."""


class Perplexity(msgspec.Struct, frozen=True):
    """Over `tokens` scored tokens of `windows` windows. Standard errors take tokens as independent draws.

    The last four are None without a reference.
    """

    tokens: int
    windows: int
    context: int
    perplexity: float
    standard_error: float
    reference_perplexity: float | None = None
    mean_kl_nats: float | None = None
    """KL divergence of the runner's distribution from the reference's: sum of p_ref (ln p_ref - ln p)."""
    kl_standard_error: float | None = None
    top1_agreement: float | None = None
    """Share of positions at which both think the same token most likely."""


def windows(tokenizer: Tokenizer, text: str, context: int, tokens: int | None = None) -> list[I32]:
    """The text (its first `tokens` tokens) in whole windows. Raises ConfigError where it does not fill one."""
    if context < LEAST_CONTEXT:
        raise ConfigError(f"The context is {context} tokens.", f"Give at least {LEAST_CONTEXT}.")
    ids = tokenizer.encode(text, parse_special=False)[:tokens]
    cut = [np.array(ids[i : i + context], np.int32) for i in range(0, len(ids) - context + 1, context)]
    if not cut:
        least = f"a context of at most {len(ids)}" if len(ids) >= LEAST_CONTEXT else "a longer text"
        raise ConfigError(f"The text has {len(ids)} tokens, and one window takes {context}.", f"Give {least}.")
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        for window in cut:
            window[0] = tokenizer.bos_id
    return cut


def measure(
    runner: Runner, parts: Sequence[I32], reference: Runner | None = None, advance: Callable[[int], None] | None = None
) -> Perplexity:
    """Score all windows, of one length, with `runner`, and with `reference` in step where there is one.

    `advance` is told how many tokens more were run. Raises EngineError for logits that are not finite numbers.
    """
    context = len(parts[0])
    found: list[tuple[F64, F64, F64, F64]] = []
    for window in parts:
        for start, rows, scored in _chunks(context):
            got = runner.logits(_batch(runner, window, start, rows, scored))
            want = None if reference is None else reference.logits(_batch(reference, window, start, rows, scored))
            if scored:
                found.append(_scores(got, want, window[start + 1 : start + rows + 1]))
            if advance is not None:
                advance(rows)
    loss, other, divergence, same = (np.concatenate(column) for column in zip(*found, strict=True))
    if not np.isfinite(loss).all() or not np.isfinite(other).all():
        raise EngineError("The logits are not finite numbers: weights or kernels are broken.")
    perplexity = math.exp(loss.mean())
    plain = Perplexity(loss.size, len(parts), context, perplexity, perplexity * _standard_error(loss))
    if reference is None:
        return plain
    return msgspec.structs.replace(
        plain, reference_perplexity=math.exp(other.mean()), mean_kl_nats=float(divergence.mean()),
        kl_standard_error=_standard_error(divergence), top1_agreement=float(same.mean()),
    )  # fmt: skip


def tokens_run(parts: Sequence[I32]) -> int:
    """Tokens that `measure` runs: all of each window but the last, which has nothing after it."""
    return sum(len(part) - 1 for part in parts)


def _chunks(context: int) -> list[tuple[int, int, bool]]:
    """(first row, rows, scored) of the passes over one window."""
    half, end = context // 2, context - 1
    cuts = [(start, min(ROWS, half - start), False) for start in range(0, half, ROWS)]
    return cuts + [(start, min(ROWS, end - start), True) for start in range(half, end, ROWS)]


def _batch(runner: Runner, window: I32, start: int, rows: int, scored: bool) -> StepBatch:
    outputs = np.arange(rows if scored else 0)
    return StepBatch.of_one(window[start : start + rows], start, outputs, runner.block_tokens)


def _scores(got: F32, want: F32 | None, following: I32) -> tuple[F64, F64, F64, F64]:
    """Of each row: loss in nats, the reference's loss, the divergence, whether both choose the same token."""
    column = following[:, None].astype(np.int64)
    ours, ours_sum = _shifted(got)
    loss = np.log(ours_sum) - np.take_along_axis(ours, column, 1)[:, 0].astype(np.float64)
    if want is None:
        zero = np.zeros_like(loss)
        return loss, zero, zero, zero
    theirs, theirs_sum = _shifted(want)
    other = np.log(theirs_sum) - np.take_along_axis(theirs, column, 1)[:, 0].astype(np.float64)
    weighted = np.sum(np.exp(theirs) * (theirs - ours), axis=1, dtype=np.float64) / theirs_sum
    divergence = weighted + np.log(ours_sum) - np.log(theirs_sum)
    return loss, other, divergence, (ours.argmax(1) == theirs.argmax(1)).astype(np.float64)


def _shifted(logits: F32) -> tuple[F32, F64]:
    """Logits less the largest of their row, and the sum of their exponentials (float32 terms, summed in float64)."""
    shifted: F32 = logits - logits.max(1, keepdims=True)
    return shifted, np.sum(np.exp(shifted), axis=1, dtype=np.float64)


def _standard_error(values: F64) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.inf
