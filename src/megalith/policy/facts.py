"""The facts that policies read and the plans that they write: the words between a scheduler and whoever executes it.

The engine (real tokens) and the simulator (a cost model) speak exactly these types. The true output length of a
request is not a fact: nobody knows it before the last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

RequestId: TypeAlias = int
BlockId: TypeAlias = int
PreemptMode: TypeAlias = Literal["recompute", "swap"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a policy may know of a request at its arrival."""

    id: RequestId
    arrival_ns: int
    prompt_tokens: int
    max_new_tokens: int
    priority: int = 0
    """Higher goes first; 0 is normal."""
    prefix_hashes: tuple[int, ...] = ()
    """One chained hash for each full block of the prompt, in order. Equal hash means equal tokens up to there."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The part of one request that goes into one step.

    `new_tokens` rows are computed, after `context_tokens` that are already in the KV cache. A decode is a chunk of one
    new token. `samples` is True when the last row's logits are needed, that is when the chunk reaches the end of what
    is known of the request.
    """

    request_id: RequestId
    new_tokens: int
    context_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Preempt:
    """Take a running request off the device before the step.

    `recompute`: its blocks are freed. `swap`: device_blocks[i] is copied to host_blocks[i] first.
    """

    request_id: RequestId
    mode: PreemptMode
    device_blocks: tuple[BlockId, ...] = ()
    host_blocks: tuple[BlockId, ...] = ()


@dataclass(frozen=True, slots=True)
class Resume:
    """Bring a swapped request back before the step: host_blocks[i] is copied to device_blocks[i]."""

    request_id: RequestId
    host_blocks: tuple[BlockId, ...]
    device_blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one instance does in its next step, and for how long that stays the right thing to do.

    Order of execution: every Preempt copy, then every Resume copy, then the forward pass over `chunks`.
    `repeats` is how many further times the very same chunks may run, each time with `context_tokens` one larger, as
    long as nothing arrives, finishes or is aborted. It is above zero only for plans made of decodes, and never so large
    that the KV cache would run out. The engine uses it to skip scheduling, the simulator to leap.
    """

    chunks: tuple[Chunk, ...]
    preempts: tuple[Preempt, ...] = ()
    resumes: tuple[Resume, ...] = ()
    repeats: int = 0

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return sum(chunk.new_tokens for chunk in self.chunks)
