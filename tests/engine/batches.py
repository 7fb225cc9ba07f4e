"""SamplingBatch rows for tests, written out by hand (the engine's own assembly is tested against these)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megalith.engine.batch import SamplingBatch


@dataclass
class Row:
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    draw: int = 0
    seen: dict[int, int] = field(default_factory=dict)
    bias: dict[int, float] = field(default_factory=dict)
    allowed: frozenset[int] | None = None
    target: int = -1
    logprobs: int = -1


def sampling_batch(rows: list[Row], vocab: int) -> SamplingBatch:
    def column(name: str, kind: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], kind)

    def starts(name: str) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(getattr(row, name)) for row in rows])]).astype(np.int32)

    masks, mask_rows = [], []
    for row in rows:
        mask_rows.append(-1 if row.allowed is None else len(masks))
        if row.allowed is not None:
            bits = np.zeros((vocab + 31) // 32 * 32, np.uint8)
            bits[list(row.allowed)] = 1
            masks.append(np.packbits(bits, bitorder="little").view(np.uint32))
    return SamplingBatch(
        temperature_N=column("temperature", np.float32),
        top_k_N=column("top_k", np.int32),
        top_p_N=column("top_p", np.float32),
        min_p_N=column("min_p", np.float32),
        repetition_N=column("repetition", np.float32),
        presence_N=column("presence", np.float32),
        frequency_N=column("frequency", np.float32),
        seed_N=column("seed", np.uint64),
        draw_N=column("draw", np.uint64),
        seen_starts_N1=starts("seen"),
        seen_ids=np.array([i for row in rows for i in row.seen], np.int32),
        seen_counts=np.array([c for row in rows for c in row.seen.values()], np.int32),
        bias_starts_N1=starts("bias"),
        bias_ids=np.array([i for row in rows for i in row.bias], np.int32),
        bias_values=np.array([v for row in rows for v in row.bias.values()], np.float32),
        mask_rows_N=np.array(mask_rows, np.int32),
        masks=np.array(masks, np.uint32).reshape(len(masks), (vocab + 31) // 32),
        targets_N=column("target", np.int32),
        num_logprobs_N=column("logprobs", np.int32),
    )
