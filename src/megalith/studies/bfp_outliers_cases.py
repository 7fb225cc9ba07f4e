"""What the points of the bfp-outliers study measure: a real model on a real text, KV in block floating point.

SmolLM2 135M as it is packaged, torch runner in float32, so that KV is all that is rounded; the text that comes with
`megalith perplexity`. The order of channels is calibrated on another text (engine/calibration.txt).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from statistics import median

import numpy as np

from megalith.cost.memory import kv_bytes_per_token
from megalith.engine import perplexity
from megalith.engine.api import EngineConfig
from megalith.engine.batch import Runner, StepBatch
from megalith.engine.launch import BuiltEngine, build_engine

Options = Mapping[str, float | str]
Figures = dict[str, float | None]
MODEL, CONTEXT, BLOCK_TOKENS = "smollm2", 512, 16
BLOCKS = CONTEXT // BLOCK_TOKENS + 1
STEPS = 15
"""Decode steps of each arm, in turns."""


def kv_text(bits: int, values: int, block: int, *, reorder: bool) -> str:
    """The KV format as `--kv-format` takes it; bits 0: float."""
    return "" if not bits else f"bfp{bits}:block={block},values={values}{',reorder' if reorder else ''}"


def _built(text: str) -> BuiltEngine:
    return build_engine(EngineConfig(
        model=MODEL, mode="float32", max_context=CONTEXT, max_sequences=1, token_budget=perplexity.ROWS,
        num_blocks=BLOCKS, block_tokens=BLOCK_TOKENS, kv_format=text,
    ))  # fmt: skip


@functools.cache
def _float() -> BuiltEngine:
    return _built("")


def _text_of(options: Options) -> str:
    bits, values, block = (int(options[name]) for name in ("bits", "values", "block"))
    return kv_text(bits, values, block, reorder=options["arm"] == "ordered")


def quality(options: Options) -> Figures:
    """Perplexity, how far it is above float KV's, KL divergence from it, and the bytes of a token's K and V."""
    text, reference = _text_of(options), _float()
    built = _built(text)
    try:
        body = perplexity.TEXT.read_text(encoding="utf-8")
        parts = perplexity.windows(built.model.tokenizer, body, CONTEXT, int(options["tokens"]))
        found = perplexity.measure(built.runner, parts, reference.runner)
        held = built.runner.memory_bytes()["kv"] / ((BLOCKS + 1) * BLOCK_TOKENS)
    finally:
        built.runner.close()
    base = found.reference_perplexity or 0.0
    return {
        "perplexity": found.perplexity, "rise": found.perplexity - base, "float": base, "kl": found.mean_kl_nats,
        "same": found.top1_agreement, "bytes": held, "saving": kv_bytes_per_token(built.model.spec, "bf16") / held,
    }  # fmt: skip


def decode(options: Options) -> Figures:
    """Milliseconds of a decode step after CONTEXT - 1 tokens, and over the same cache with channels as they were."""
    plain = _built(_text_of({**options, "arm": "natural"}))
    built = _built(_text_of(options))
    runners = (built.runner, plain.runner)
    try:
        for runner in runners:
            _fill(runner)
        times: list[list[float]] = [[], []]
        for _ in range(STEPS):
            for runner, row in zip(runners, times, strict=True):
                begin = time.perf_counter_ns()
                runner.logits(StepBatch.of_one([5], CONTEXT - 1, [0], BLOCK_TOKENS))
                row.append(time.perf_counter_ns() - begin)
    finally:
        for runner in runners:
            runner.close()
    return {"ms": median(times[0]) / 1e6, "over": median(times[0]) / median(times[1])}


def _fill(runner: Runner) -> None:
    for start in range(0, CONTEXT - 1, perplexity.ROWS):
        rows = min(perplexity.ROWS, CONTEXT - 1 - start)
        runner.logits(StepBatch.of_one(np.arange(rows) + 100, start, [], BLOCK_TOKENS))
