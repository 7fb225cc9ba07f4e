"""One step while it is being put together: the shape that a batch policy asked for, filled in rank order.

Knows the roster, one step shape and the limits; does not know how long the step will stay right (cohort.py).
"""

from __future__ import annotations

from typing import Final

from megalith.policy.batching import Admission, StepShape
from megalith.policy.facts import Chunk, Preempt, PreemptMode, Resume, quick_chunk
from megalith.policy.kv import Short
from megalith.policy.roster import Roster
from megalith.policy.sequence import RUNNING, WAITING, Rank, Sequence

_NONE: Final = Admission.NONE


class Draft:
    """Call fill() once, then read the lists."""

    __slots__ = (
        "_expected",
        "_left",
        "_max_sequences",
        "_mode",
        "_roster",
        "_shape",
        "chunks",
        "decodes",
        "preempts",
        "resumes",
        "rows",
    )

    def __init__(self, roster: Roster, shape: StepShape, max_sequences: int, mode: PreemptMode) -> None:
        self.decodes = 0
        """Members of the cohort, when all of them are in; 0 when they are listed or not in."""
        self.rows: list[Sequence] = []
        self.chunks: list[Chunk] = []
        """Parallel to rows: all that is listed one by one."""
        self.preempts: tuple[Preempt, ...] = ()
        self.resumes: tuple[Resume, ...] = ()
        self._roster = roster
        self._shape = shape
        self._mode: PreemptMode = mode
        self._max_sequences = max_sequences
        self._left = shape.token_budget
        """Tokens of the budget not given away; below zero when one prompt alone exceeds it."""
        self._expected: dict[int, Rank] | None = None
        """Hash of the block that a running prompt completes next -> rank of that prompt, the best for each hash."""

    def fill(self) -> bool:
        """Form the step. True when the next one would be the same but for one more token of context in each row.

        So it is when all running requests are in it, each decodes, and nothing is preempted or resumed. Blocks that
        enter the prefix cache, where they might let a waiting request in, come from prompts only.
        """
        shape, roster = self._shape, self._roster
        items, prompts = roster.queue.items, roster.prompts
        if items and shape.admission is not _NONE:
            self._make_room()
        if shape.mixed:
            self._add_decodes()
            if shape.split and not prompts and not self.preempts:
                self._add_plain_prompts()
        if self._left > 0 and (items or len(prompts) > len(self.rows)):
            self._add_prompts()
        if not shape.mixed and not self.rows:
            self._add_decodes()
        return self.decodes > 0 and not (self.rows or prompts or self.preempts or self.resumes)

    def _take(self, sequence: Sequence, new_tokens: int) -> None:
        samples = new_tokens == sequence.known_ - sequence.base
        self.rows.append(sequence)
        self.chunks.append(quick_chunk((sequence.request.id, new_tokens, sequence.base, samples)))
        self._left -= new_tokens

    def _preempt(self, sequence: Sequence) -> None:
        self.preempts += (self._roster.preempt(sequence, self._mode),)

    def _make_room(self) -> None:
        """A head of higher priority takes the place of running requests, last in rank first, if that lets it in.

        Happens before anything else of the step: a preempt's copy must not overwrite host blocks that a resume of the
        same step still has to read.
        """
        roster, kv = self._roster, self._roster.kv
        head, members, prompts = roster.queue.items[0], roster.cohort.members, roster.prompts
        # The last in rank has the lowest priority, which is the largest first part of a rank.
        first = head.rank[0]
        if not ((members and members[-1].rank[0] > first) or (prompts and prompts[-1].rank[0] > first)):
            return
        running = roster.running
        roster.cohort.settle_all()
        lower = [sequence for sequence in running if sequence.request.priority < head.request.priority]
        reserve = kv.watermark_blocks if len(lower) < len(running) else 0
        reachable = kv.free_blocks + sum(sequence.table.held - sequence.table.away for sequence in lower)
        if kv.needed_blocks(head.known_, head.hashes) + reserve > reachable:
            return
        while lower and (
            roster.num_running >= self._max_sequences
            or kv.needed_blocks(head.known_, head.hashes) + reserve > kv.free_blocks
        ):
            self._preempt(lower.pop())

    def _add_decodes(self) -> None:
        """All decodes, with room for their next tokens; the last in rank step aside when blocks run out."""
        cohort = self._roster.cohort
        members = cohort.members
        if len(members) > self._left and self._shape.mixed:
            self._list_decodes()
            return
        while members and not cohort.begin():
            self._preempt(self._roster.last())
        self.decodes = decodes = len(members)
        self._left -= decodes

    def _list_decodes(self) -> None:
        """As many decodes as the budget has tokens for, first in rank first."""
        roster = self._roster
        for member in roster.cohort.members[: self._left]:
            if member.cohort is None:
                return  # it stepped aside for one before it
            roster.single_out(member)
            if not self._grown(member):
                return
            self._take(member, 1)

    def _grown(self, sequence: Sequence) -> bool:
        """Whether the table has room for all known tokens, if need be at the cost of the last in rank; False when that
        is the sequence itself."""
        roster, kv = self._roster, self._roster.kv
        while sequence.known_ > sequence.table.held * kv.block_tokens and not kv.grow(sequence.table):
            self._preempt(roster.last())
            if sequence.phase is not RUNNING:
                return False
        return True

    def _add_plain_prompts(self) -> None:
        """The first of the queue while they are new and share nothing: what _add_prompts would do, in fewer words."""
        roster, left = self._roster, self._left
        kv, items, prompts = roster.kv, roster.queue.items, roster.prompts
        seats = self._max_sequences - self.decodes
        while left > 0 and items and len(prompts) < seats:
            head = items[0]
            if head.hashes or head.phase is not WAITING:
                break
            known = head.known_
            # The watermark protects those who run; alone, a request may use everything.
            reserve = kv.watermark_blocks if self.decodes or prompts else 0
            table = kv.open_plain(head.request.id, known, reserve)
            if table is None:
                self._left = 0  # nobody overtakes it
                return
            items.popleft()
            prompts.append(head)
            roster.admitted(head, table)
            new = known if known < left else left
            left -= new
            self.rows.append(head)
            self.chunks.append(quick_chunk((head.request.id, new, 0, new == known)))
        self._left = left

    def _add_prompts(self) -> None:
        """Prompts (and whatever else is to be computed again) in rank order, running and queued ones merged."""
        queue, split = self._roster.queue, self._shape.split
        pending = [prompt for prompt in self._roster.prompts if prompt not in self.rows]
        for prompt in pending:
            if prompt.hashes:
                self._expect(prompt)
        admission = self._shape.admission
        while admission is Admission.ALL and (first := queue.head()) is not None and self._admit(first):
            pending.append(first)
        admitting = admission is Admission.BUDGET
        index = 0
        while self._left > 0:
            sequence = pending[index] if index < len(pending) else None
            head = queue.head() if admitting else None
            if head is not None and (sequence is None or head.rank < sequence.rank):
                # Nobody overtakes a head that cannot come in: it would starve.
                admitting = self._admit(head)
                if not admitting:
                    continue
                sequence = head
            elif sequence is not None:
                index += 1
            else:
                return
            if sequence.phase is not RUNNING:
                continue  # it stepped aside for one before it
            remaining = sequence.known_ - sequence.base
            if not split and self.rows and self._exceeds(remaining):
                return  # it goes first in the next step
            if not self._grown(sequence):
                return
            self._take(sequence, min(remaining, self._left) if split else remaining)

    def _exceeds(self, remaining: int) -> bool:
        """Whether one more whole prompt is more than the budget allows."""
        if self._shape.padded:
            longest = max(remaining, *[chunk.new_tokens for chunk in self.chunks])
            return (len(self.chunks) + 1) * longest > self._shape.token_budget
        return remaining > self._left

    def _admit(self, head: Sequence) -> bool:
        """Bring the head of the queue onto the device if there is room and nothing is gained by waiting a step."""
        if self._roster.num_running >= self._max_sequences or self._is_coming(head):
            return False
        if self.preempts and any(preempt.request_id == head.request.id for preempt in self.preempts):
            return False
        result = self._roster.admit(head)
        if isinstance(result, Short):
            return False
        if result.resume is not None:
            self.resumes += (result.resume,)
        if head.hashes:
            self._expect(head)
        return True

    def _expect(self, sequence: Sequence) -> None:
        if sequence.table.sealed < len(sequence.hashes):
            block_hash = sequence.hashes[sequence.table.sealed]
            if self._expected is None:
                self._expected = {}
            self._expected[block_hash] = min(sequence.rank, self._expected.get(block_hash, sequence.rank))

    def _is_coming(self, head: Sequence) -> bool:
        """Whether the next block that the prefix cache lacks for this request is being computed for one before it.

        Then it waits: many requests with one long new prefix (n answers to one prompt) compute it once. It loses
        nothing, for that one gets its tokens first anyway. A static batch does not wait: it would start without them.
        """
        if not self._expected or head.phase is not WAITING or self._shape.admission is not Admission.BUDGET:
            return False
        kv = self._roster.kv
        hits = kv.match_blocks(head.known_, head.hashes)
        if not kv.prefix_cache or hits >= min(len(head.hashes), (head.known_ - 1) // kv.block_tokens):
            return False
        computing = self._expected.get(head.hashes[hits])
        return computing is not None and computing < head.rank
