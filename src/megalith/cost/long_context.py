"""The first-order arithmetic of serving long contexts: arXiv:2405.08944 ("Challenges in Deploying Long-Context
Transformers"), its four costs at peak rates, as one row of its table.

The paper counts attention as layers * hidden * S**2 FLOPs, half of what `parameters.chunk_pairs` gives for a causal
prompt, and no efficiency below peak. Kept as published, to be compared with its table; plans use `compute`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalith.cost.memory import kv_bytes_per_token
from megalith.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class PeakDevice:
    """Peak rates and sizes of the paper's device; the defaults are its A100."""

    flops_per_s: float = 312e12
    memory_bytes_per_s: float = 2e12
    memory_bytes: float = 80e9
    host_bytes_per_s: float = 20e9


@dataclass(frozen=True, slots=True)
class LongContextRow:
    """The four costs of a context, and how many such contexts fit beside the weights (a fraction below one: none)."""

    tokens: int
    kv_bytes: int
    prefill_s: float
    decode_s: float
    """Of `new_tokens` tokens, one sequence."""
    switch_s: float
    """Its KV out to the host and back in."""
    concurrency: float


def long_context_row(
    spec: ModelSpec, weight_bytes: float, tokens: int, new_tokens: int = 250, device: PeakDevice | None = None
) -> LongContextRow:
    """The row for `tokens` of context of a model whose 16-bit weights take `weight_bytes`."""
    device = device or PeakDevice()
    kv_bytes = kv_bytes_per_token(spec) * tokens
    flops = weight_bytes * tokens + spec.num_layers * spec.hidden * tokens**2
    return LongContextRow(
        tokens=tokens,
        kv_bytes=kv_bytes,
        prefill_s=flops / device.flops_per_s,
        decode_s=new_tokens * (weight_bytes + kv_bytes) / device.memory_bytes_per_s,
        switch_s=2 * kv_bytes / device.host_bytes_per_s,
        concurrency=(device.memory_bytes - weight_bytes) / kv_bytes,
    )
