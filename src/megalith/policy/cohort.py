"""The requests that decode, as one: every step of decodes has all of them, so one clock counts for all.

A step moves the clock by one, and with it the tokens of every member; a thousand steps move it by a thousand. What must
be known on the way has closed forms:

    computed tokens of a member      base + clock
    sum of the contexts              grows by the number of members with every step
    blocks taken by k steps          each member takes one at the clocks edge, edge + b, edge + 2b, ... (b tokens a
                                     block), so in any b steps in a row every member takes one; `_edges[r]` counts the
                                     members whose edge is r modulo b
    steps until somebody must end    a heap of the clocks at which members have all their tokens

Blocks are only counted here. Which ones they are is settled when somebody reads a table (KvAccount.materialise).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from heapq import heapify, heappop, heappush
from itertools import accumulate
from operator import attrgetter
from typing import Final

from megalith.policy.facts import Chunk
from megalith.policy.kv import IntegrityError, KvAccount
from megalith.policy.sequence import Sequence

_rank: Final = attrgetter("rank")


class Cohort:
    """Members join when they have sampled and leave when they end or step aside. All calls O(log members) or better,
    but for the copying of a list of members."""

    __slots__ = ("_base_max", "_edges", "_joins", "_kv", "_size", "clock", "context_sum", "ends", "grown", "members")

    def __init__(self, kv: KvAccount) -> None:
        self.members: list[Sequence] = []
        """In rank order."""
        self.clock = 0
        """Steps of decodes so far."""
        self.grown = -1
        """Tables cover the steps that begin at clocks up to this one: clock - 1, or clock while a step is under way."""
        self.context_sum = 0
        """Computed tokens of all members."""
        self._kv = kv
        self._size = kv.block_tokens
        self._edges = [0] * kv.block_tokens
        self.ends: list[tuple[int, int, Sequence]] = []
        """A heap of (clock at which it has all its tokens, number, member); those that left are dropped when met."""
        self._joins = 0
        self._base_max: int | None = None

    # Members

    def join(self, member: Sequence) -> None:
        """Take in a running request with all but one of its known tokens computed. Not while a step is under way."""
        clock = self.clock
        computed = member.base
        member.base = base = computed - clock
        member.cohort = self
        self.context_sum += computed
        member.edge = edge = member.table.held * self._size - base
        self._edges[edge % self._size] += 1
        members = self.members
        if not members or members[-1].rank < member.rank:
            members.append(member)
        else:
            insort(members, member, key=_rank)
        ends = self.ends
        if len(ends) > 4 * len(members) + 64:
            ends[:] = [entry for entry in ends if self._is_live(entry)]
            heapify(ends)
        self._joins = number = self._joins + 1
        heappush(ends, (member.end - 1 - base, number, member))
        if self._base_max is not None and base > self._base_max:
            self._base_max = base

    def leave(self, member: Sequence) -> None:
        """Let a member go, with its counts and its table settled."""
        size = self._size
        behind = self.grown - member.edge
        if behind >= 0:  # settle()
            member.table.held += behind // size + 1
        self._edges[member.edge % size] -= 1
        self.members.remove(member)
        if member.base == self._base_max:
            self._base_max = None
        member.base = computed = member.base + self.clock
        member.known_ = computed + 1
        member.cohort = None
        self.context_sum -= computed

    def settle(self, member: Sequence) -> None:
        """Write into the member's table how many blocks it holds by now."""
        behind = self.grown - member.edge
        if behind >= 0:
            blocks = behind // self._size + 1
            member.table.held += blocks
            member.edge += blocks * self._size

    def settle_all(self) -> None:
        """Write into the table of every member how many blocks it holds by now."""
        for member in self.members:
            self.settle(member)

    # Steps

    def begin(self) -> bool:
        """Take the blocks that the next step needs; False, with nothing changed, when they are not there."""
        if self.grown < self.clock:
            needed = self._edges[self.clock % self._size]
            if needed and not self._kv.promise(needed):
                return False
            self.grown = self.clock
        return True

    def undo(self) -> None:
        """The step that was begun will not run: give its blocks back."""
        if self.grown == self.clock:
            for member in self.members:
                self.settle(member)
                if member.edge == self.clock + self._size:
                    self._kv.shrink(member.table)
                    member.edge = self.clock
            self.grown = self.clock - 1

    def advance(self, steps: int) -> bool:
        """`steps` steps ran. False when blocks were lacking."""
        clock = self.clock
        if self.grown < clock and not self.begin():
            return False
        members = len(self.members)
        if steps > 1:
            needed = self._taken(clock, steps - 1)
            if needed and not self._kv.promise(needed):
                return False
        self.clock = clock + steps
        self.grown = clock + steps - 1
        self.context_sum += steps * members
        return True

    # Reading

    def context_max(self) -> int:
        """Computed tokens of the longest member; 0 when there are none."""
        if self._base_max is None:
            if not self.members:
                return 0
            self._base_max = max([member.base for member in self.members])
        return self._base_max + self.clock

    def over(self) -> Sequence | None:
        """A member that has all its tokens and is still here; None as it should be."""
        ends, clock = self.ends, self.clock
        while ends and ends[0][0] <= clock:
            if self._is_live(ends[0]):
                return ends[0][2]
            heappop(ends)
        return None

    def further_runs(self, most: int) -> int:
        """begin(), and how often that step may be repeated, at most `most` times, until a member has all its tokens or
        blocks run out; -1, with nothing changed, when there are none for the step itself. There must be members.
        """
        ends, clock = self.ends, self.clock
        if self.grown < clock:
            needed = self._edges[clock % self._size]
            if needed and not self._kv.promise(needed):
                return -1
            self.grown = clock
        runs = ends[0][0] - clock - 1
        if runs < most:  # else it does not matter whether the first entry is one of those that left
            while not self._is_live(ends[0]):
                heappop(ends)
            runs = min(ends[0][0] - clock - 1, most)
        else:
            runs = most
        # In any `size` runs every member takes one block.
        size, free, members = self._size, self._kv.free_blocks, len(self.members)
        if (runs // size + 1) * members <= free:
            return runs
        cycles, left = divmod(free, members)
        lasting = cycles * size
        if runs <= lasting:
            return runs
        # Within one more cycle every member takes one block: find the run whose block is not there.
        first = (clock + 1) % size
        taken = accumulate(self._edges[first:] + self._edges[:first])
        return min(runs, lasting + bisect_right(list(taken), left))

    def free_after(self, steps: int) -> int:
        """Free blocks after `steps` further steps, the step under way not counted."""
        return self._kv.free_blocks - (self._taken(self.grown, steps) if steps else 0)

    def chunks(self) -> list[Chunk]:
        """One chunk for each member, in rank order."""
        clock = self.clock
        return [Chunk(member.request.id, 1, member.base + clock, True) for member in self.members]

    def check_integrity(self) -> None:
        """Count afresh what is kept along the way. O(members). Raises IntegrityError with both sides."""
        contexts, edges = 0, [0] * self._size
        for member in self.members:
            contexts += member.computed
            edges[member.edge % self._size] += 1
            if member.hashes and member.table.sealed < len(member.hashes):
                raise IntegrityError(f"request {member.request.id} decodes with known blocks that are not sealed")
        if (contexts, edges) != (self.context_sum, self._edges):
            raise IntegrityError(f"contexts {contexts}, edges {edges}; counted {self.context_sum}, {self._edges}")

    def _taken(self, clock: int, steps: int) -> int:
        """Blocks that the steps at the clocks clock + 1 to clock + steps take."""
        size, members = self._size, self.members
        span, taken = steps % size, steps // size * len(members)
        first = (clock + 1) % size
        if len(members) < span:
            for member in members:
                if (member.edge - first) % size < span:
                    taken += 1
        elif span:
            edges, last = self._edges, first + span
            taken += sum(edges[first:last]) if last <= size else sum(edges[first:]) + sum(edges[: last - size])
        return taken

    def _is_live(self, entry: tuple[int, int, Sequence]) -> bool:
        member = entry[2]
        return member.cohort is self and member.end - 1 - member.base == entry[0]
