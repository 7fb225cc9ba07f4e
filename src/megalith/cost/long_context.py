"""The first-order arithmetic of serving long contexts: arXiv:2405.08944 ("Challenges in Deploying Long-Context
Transformers"), its four costs at peak rates, as one row of its table; ways to make KV smaller; what a session takes.

The paper counts attention as layers * hidden * S**2 FLOPs, half of what `parameters.chunk_pairs` gives for a causal
prompt, and no efficiency below peak. Kept as published, to be compared with its table; plans use `compute`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megalith.cost.memory import kv_bytes_per_token
from megalith.specs.model import ModelSpec

FULL_BITS = 16.0


@dataclass(frozen=True, slots=True)
class PeakDevice:
    """Peak rates and sizes of the paper's device; the defaults are its A100."""

    flops_per_s: float = 312e12
    memory_bytes_per_s: float = 2e12
    memory_bytes: float = 80e9
    host_bytes_per_s: float = 20e9


class Levers(NamedTuple):
    """What is kept of the KV cache, by the paper's four dimensions (section 4), and where. Parts of 1 multiply."""

    layers: float = 1.0
    heads: float = 1.0
    tokens: float = 1.0
    bits: float = FULL_BITS
    """Of one value, scales included."""
    host: float = 0.0
    """Part of what is kept that lies in host memory, from where every step reads it."""

    @property
    def kept(self) -> float:
        """Bytes kept over all bytes of a 16-bit cache."""
        return self.layers * self.heads * self.tokens * self.bits / FULL_BITS


PLAIN = Levers()


@dataclass(frozen=True, slots=True)
class LongContextRow:
    """The four costs of a context, and how many such contexts fit beside the weights (a fraction below one: none)."""

    tokens: int
    kv_bytes: float
    """All that is kept, wherever it lies."""
    prefill_s: float
    decode_s: float
    """Of `new_tokens` tokens, one sequence."""
    switch_s: float
    """Its KV out to the host and back in."""
    concurrency: float


def long_context_row(
    spec: ModelSpec,
    weight_bytes: float,
    tokens: int,
    new_tokens: int = 250,
    device: PeakDevice | None = None,
    levers: Levers = PLAIN,
    window: int | None = None,
) -> LongContextRow:
    """The row for `tokens` of context of a model whose 16-bit weights take `weight_bytes`.

    Levers make KV smaller and leave the prompt's FLOPs; with a `window` a token attends to so many keys at most.
    """
    device = device or PeakDevice()
    kv_bytes = kv_bytes_per_token(spec) * tokens * levers.kept
    here, away = kv_bytes * (1.0 - levers.host), kv_bytes * levers.host
    seen = tokens if window is None else min(window, tokens)
    flops = weight_bytes * tokens + spec.num_layers * spec.hidden * seen * (2 * tokens - seen)
    step_s = (weight_bytes + here) / device.memory_bytes_per_s + away / device.host_bytes_per_s
    return LongContextRow(
        tokens=tokens,
        kv_bytes=kv_bytes,
        prefill_s=flops / device.flops_per_s,
        decode_s=new_tokens * step_s,
        switch_s=2 * here / device.host_bytes_per_s,
        concurrency=(device.memory_bytes - weight_bytes) / here if here else float("inf"),
    )


@dataclass(frozen=True, slots=True)
class Session:
    """A user of the paper's concurrent program: reads a document once, then asks `rounds` times and thinks between."""

    rounds: int = 5
    think_s: float = 60.0
    users: int = 20


def sessions_per_hour(row: LongContextRow, session: Session) -> float:
    """Sessions that one device ends in an hour: the least of what it can do and of what its users ask for.

    Users that do not fit are switched: one context out and one in for every round. Decodes are one after the other, as
    in the paper; a device on which not one context fits ends none.
    """
    if row.concurrency < 1.0:
        return 0.0
    switched = session.users > int(min(row.concurrency, 1e9))
    each_round_s = row.decode_s + (row.switch_s if switched else 0.0)
    busy_s = row.prefill_s + session.rounds * each_round_s
    alone_s = busy_s + session.rounds * session.think_s
    return 3600.0 * min(1.0 / busy_s, session.users / alone_s)
