"""What a scheduler remembers of one request, and the queue of those that are off the device."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias

from megalith.policy.facts import Request
from megalith.policy.kv import BlockTable

if TYPE_CHECKING:
    from megalith.policy.cohort import Cohort

Rank: TypeAlias = tuple[int, int, int]
"""(-priority, arrival, id): the smaller goes first, and nobody ties."""


class Phase(Enum):
    """Where a request stands. WAITING and SWAPPED ones are in the queue, RUNNING ones hold device blocks, INCOMING ones
    hold blocks for KV that is still on its way here."""

    WAITING = auto()
    SWAPPED = auto()
    RUNNING = auto()
    INCOMING = auto()
    GONE = auto()


class Sequence:
    """The tokens of one request by count: `known` exist, the first `computed` of them are in the KV cache.

    Known tokens are the prompt and what was sampled so far; they stay known when the request is preempted. A running
    request that has sampled since it came onto the device is a member of the cohort of decodes; its counts then follow
    the cohort's clock, and `base` is its computed tokens less that clock.
    """

    __slots__ = ("base", "cached", "cohort", "edge", "end", "hashes", "known_", "phase", "rank", "request", "table")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.rank: Rank = (-request.priority, request.arrival_ns, request.id)
        self.known_ = request.prompt_tokens
        """Known tokens while outside the cohort."""
        self.end = request.prompt_tokens + request.max_new_tokens
        self.base = 0
        """Computed tokens, less the clock of the cohort while inside it."""
        self.cohort: Cohort | None = None
        self.edge = 0
        """In the cohort: the clock at which the next step needs a block more than the table has (see Cohort)."""
        self.cached: int | None = None
        """Tokens that the prefix cache had at the first admission; None before it."""
        self.phase = Phase.WAITING
        self.table = BlockTable([], 0, 0)
        self.hashes: list[int] | tuple[int, ...] = request.prefix_hashes

    @property
    def computed(self) -> int:
        """Tokens whose K and V are in the cache."""
        return self.base if self.cohort is None else self.base + self.cohort.clock

    @property
    def known(self) -> int:
        """Prompt tokens and sampled ones."""
        return self.known_ if self.cohort is None else self.base + self.cohort.clock + 1

    def add_hash(self, block_hash: int) -> None:
        """Remember the hash of the next block, for the prefix cache after a preemption."""
        if isinstance(self.hashes, tuple):
            self.hashes = list(self.hashes)
        self.hashes.append(block_hash)


class RankQueue:
    """Sequences in rank order. All calls are O(log n), amortised: who leaves from the middle is dropped later."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Sequence]] = []
        self._live: set[Rank] = set()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no particular order."""
        return (sequence for rank, sequence in self._heap if rank in self._live)

    def push(self, sequence: Sequence) -> None:
        """Put a sequence in; it must not be there."""
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = [entry for entry in self._heap if entry[0] in self._live]
            heapq.heapify(self._heap)
        self._live.add(sequence.rank)
        heapq.heappush(self._heap, (sequence.rank, sequence))

    def head(self) -> Sequence | None:
        """The one that goes first."""
        heap, live = self._heap, self._live
        while heap and heap[0][0] not in live:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out, from wherever it stands."""
        self._live.discard(sequence.rank)
        if self._heap and self._heap[0][1] is sequence:
            heapq.heappop(self._heap)
