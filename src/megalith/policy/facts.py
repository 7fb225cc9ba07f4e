"""The facts that policies read and the plans that they write: the words between a scheduler and whoever executes it.

The engine (real tokens) and the simulator (a cost model) speak exactly these types. The true output length of a
request is not a fact: nobody knows it before the last token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Literal, NamedTuple, TypeAlias

import msgspec

RequestId: TypeAlias = int
BlockId: TypeAlias = int
PreemptMode: TypeAlias = Literal["recompute", "swap"]


class Request(msgspec.Struct, frozen=True, gc=False):
    """What a policy may know of a request at its arrival. A struct, because a simulation makes a million of them."""

    id: RequestId
    arrival_ns: int
    prompt_tokens: int
    max_new_tokens: int
    priority: int = 0
    """Higher goes first; 0 is normal."""
    prefix_hashes: tuple[int, ...] = ()
    """One chained hash for each full block of the prompt, in order. Equal hash means equal tokens up to there."""
    model: int = 0
    """Which of the models of an instance with several it asks for."""


class Chunk(NamedTuple):
    """The part of one request that goes into one step.

    `new_tokens` rows are computed, after `context_tokens` that are already in the KV cache. A decode is a chunk of one
    new token. `samples` is True when the last row's logits are needed, that is when the chunk reaches the end of what
    is known of the request.
    """

    request_id: RequestId
    new_tokens: int
    context_tokens: int
    samples: bool


quick_chunk: Final[Callable[[tuple[RequestId, int, int, bool]], Chunk]] = partial(tuple.__new__, Chunk)
"""`Chunk(*fields)` without the Python call that a NamedTuple's constructor is."""


class Preempt(NamedTuple):
    """Take a running request off the device before the step.

    `recompute`: its blocks are freed. `swap`: device_blocks[i] is copied to host_blocks[i] first.
    """

    request_id: RequestId
    mode: PreemptMode
    device_blocks: tuple[BlockId, ...] = ()
    host_blocks: tuple[BlockId, ...] = ()


class Resume(NamedTuple):
    """Bring a swapped request back before the step: host_blocks[i] is copied to device_blocks[i]."""

    request_id: RequestId
    host_blocks: tuple[BlockId, ...]
    device_blocks: tuple[BlockId, ...]


class StepPlan:
    """What one instance does in its next step, and for how long that stays the right thing to do.

    Order of execution: every Preempt copy, then every Resume copy, then the forward pass over `chunks`: first the
    `decodes` (all requests that decode, one token each, in rank order), then the `listed` ones. A simulator needs no
    chunk for each decode, only their number and the sum and maximum of their contexts.

    `repeats` is how many further times the very same chunks may run, each time with `context_tokens` one larger, as
    long as nothing arrives, finishes or is aborted. It is above zero only for plans made of decodes, and never so large
    that the KV cache would run out. The engine uses it to skip scheduling, the simulator to leap.
    """

    __slots__ = ("decode_context_sum", "decodes", "decoding", "listed", "made", "preempts", "repeats", "resumes")

    def __init__(
        self,
        listed: tuple[Chunk, ...] = (),
        decodes: int = 0,
        decode_context_sum: int = 0,
        decoding: Callable[[], list[Chunk]] | None = None,
        repeats: int = 0,
        preempts: tuple[Preempt, ...] = (),
        resumes: tuple[Resume, ...] = (),
    ) -> None:
        self.listed = listed
        self.decodes = decodes
        self.decode_context_sum = decode_context_sum
        """Tokens that the decodes have in the KV cache before the step, together."""
        self.decoding = decoding
        """Makes the chunks of the decodes, until the plan is completed: the decodes then move on."""
        self.repeats = repeats
        self.preempts = preempts
        self.resumes = resumes
        self.made: tuple[Chunk, ...] | None = None
        """What `chunks` answered."""

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, in the order of the rows. Made when first read, so read it before the plan is completed."""
        if self.made is None:
            if self.decodes and self.decoding is None:
                raise RuntimeError("the chunks of a plan are to be read before it is completed")
            self.made = (*self.decoding(), *self.listed) if self.decoding is not None else self.listed
        return self.made

    @property
    def empty(self) -> bool:
        """Nothing to do until something arrives."""
        return not self.decodes and not self.listed

    @property
    def copied_blocks(self) -> int:
        """Device blocks that are copied to or from host blocks before the forward pass."""
        moves: tuple[Preempt | Resume, ...] = (*self.preempts, *self.resumes)
        return sum([len(move.device_blocks) for move in moves])

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return self.decodes + sum([chunk.new_tokens for chunk in self.listed])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StepPlan):
            return NotImplemented
        mine = (self.chunks, self.preempts, self.resumes, self.repeats)
        return mine == (other.chunks, other.preempts, other.resumes, other.repeats)
