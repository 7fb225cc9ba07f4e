"""What a scheduler remembers of one request, and the queue of those that are off the device."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from enum import Enum, auto
from operator import attrgetter
from typing import TYPE_CHECKING, Final, TypeAlias

from megalith.policy.facts import Request
from megalith.policy.kv import BlockTable

if TYPE_CHECKING:
    from megalith.policy.cohort import Cohort

Rank: TypeAlias = tuple[int, int, int]
"""(-priority, arrival, id): the smaller goes first, and nobody ties."""

_rank: Final = attrgetter("rank")
NO_BLOCKS: Final = BlockTable([], 0, 0)
"""Of all that hold none. Never changed: a sequence gets a table of its own when it comes onto the device."""


class Phase(Enum):
    """Where a request stands. WAITING and SWAPPED ones are in the queue, RUNNING ones hold device blocks, INCOMING ones
    hold blocks for KV that is still on its way here."""

    WAITING = auto()
    SWAPPED = auto()
    RUNNING = auto()
    INCOMING = auto()
    GONE = auto()


WAITING: Final = Phase.WAITING
SWAPPED: Final = Phase.SWAPPED
RUNNING: Final = Phase.RUNNING
INCOMING: Final = Phase.INCOMING
GONE: Final = Phase.GONE
"""A global is read in a third of the time of a member of an Enum, and these are read several times a step."""


class Sequence:
    """The tokens of one request by count: `known` exist, the first `computed` of them are in the KV cache.

    Known tokens are the prompt and what was sampled so far; they stay known when the request is preempted. A running
    request that has sampled since it came onto the device is a member of the cohort of decodes; its counts then follow
    the cohort's clock, and `base` is its computed tokens less that clock.
    """

    __slots__ = ("base", "cached", "cohort", "edge", "end", "hashes", "known_", "phase", "rank", "request", "table")

    def __init__(self, request: Request, sampled: int = 0) -> None:
        """A request that waits, with `sampled` tokens that exist already."""
        self.request = request
        self.rank: Rank = (-request.priority, request.arrival_ns, request.id)
        self.known_ = request.prompt_tokens + sampled
        """Known tokens while outside the cohort."""
        self.end = request.prompt_tokens + request.max_new_tokens
        """Known tokens when it has all of them."""
        self.table = NO_BLOCKS
        self.hashes: list[int] | tuple[int, ...] = request.prefix_hashes
        self.base = 0
        """Computed tokens, less the clock of the cohort while inside it."""
        self.cohort: Cohort | None = None
        self.edge = 0
        """In the cohort: the clock at which the next step needs a block more than the table has (see Cohort)."""
        self.cached: int | None = None
        """Tokens that the prefix cache had at the first admission; None before it."""
        self.phase = WAITING

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
    """Sequences in rank order. O(1) at both ends, which is where nearly all of them come and go, else O(n)."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: deque[Sequence] = deque()
        """In rank order. Read it; change it by the calls below, or at its ends."""

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in rank order."""
        return iter(self.items)

    def push(self, sequence: Sequence) -> None:
        """Put a sequence in; it must not be there."""
        items = self.items
        if not items or items[-1].rank < sequence.rank:
            items.append(sequence)
        elif sequence.rank < items[0].rank:
            items.appendleft(sequence)
        else:
            insort(items, sequence, key=_rank)

    def head(self) -> Sequence | None:
        """The one that goes first."""
        return self.items[0] if self.items else None

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out, from wherever it stands."""
        if self.items[0] is sequence:
            self.items.popleft()
        else:
            self.items.remove(sequence)
