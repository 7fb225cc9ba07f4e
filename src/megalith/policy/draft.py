"""One step while it is being put together: the shape that a batch policy asked for, filled in rank order.

Knows the roster, one step shape and the limits; does not know how long the step will stay right (horizon.py).
"""

from __future__ import annotations

from megalith.policy.batching import Admission, StepShape
from megalith.policy.facts import Chunk, Preempt, PreemptMode, Resume
from megalith.policy.kv import Short
from megalith.policy.roster import Roster
from megalith.policy.sequence import Phase, Rank, Sequence


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
        "preempts",
        "resumes",
        "rows",
    )

    def __init__(self, roster: Roster, shape: StepShape, max_sequences: int, mode: PreemptMode) -> None:
        self.rows: list[Sequence] = []
        self.chunks: list[Chunk] = []
        """Parallel to rows."""
        self.preempts: list[Preempt] = []
        self.resumes: list[Resume] = []
        self._roster = roster
        self._shape = shape
        self._mode: PreemptMode = mode
        self._max_sequences = max_sequences
        self._left = shape.token_budget
        """Tokens of the budget not given away; below zero when one prompt alone exceeds it."""
        self._expected: dict[int, Rank] = {}
        """Hash of the block that a running prompt completes next -> rank of that prompt, the best for each hash."""

    def fill(self) -> bool:
        """Form the step. True when the next one would be the same but for one more token of context in each row.

        So it is when all running requests are in it, each decodes, nothing is preempted or resumed, and no block is
        about to enter the prefix cache, where it might let a waiting request in.
        """
        if self._shape.admission is not Admission.NONE:
            self._make_room()
        if self._shape.mixed:
            self._add_decodes()
        decodes = len(self.rows)
        self._add_prompts()
        if not self._shape.mixed and not self.rows:
            self._add_decodes()
            decodes = len(self.rows)
        if self.preempts or self.resumes or not decodes == len(self.rows) == len(self._roster.running):
            return False
        return all(row.table.sealed == len(row.hashes) for row in self.rows)

    def _take(self, sequence: Sequence, new_tokens: int) -> None:
        samples = new_tokens == sequence.known - sequence.computed
        self.rows.append(sequence)
        self.chunks.append(Chunk(sequence.request.id, new_tokens, sequence.computed, samples))
        self._left -= new_tokens

    def _preempt(self, sequence: Sequence) -> None:
        self.preempts.append(self._roster.preempt(sequence, self._mode))

    def _make_room(self) -> None:
        """A head of higher priority takes the place of running requests, last in rank first, if that lets it in.

        Happens before anything else of the step: a preempt's copy must not overwrite host blocks that a resume of the
        same step still has to read.
        """
        roster, kv = self._roster, self._roster.kv
        head, running = roster.queue.head(), roster.running
        if head is None or not running or running[-1].request.priority >= head.request.priority:
            return
        lower = [sequence for sequence in running if sequence.request.priority < head.request.priority]
        reserve = kv.watermark_blocks if len(lower) < len(running) else 0
        reachable = kv.free_blocks + sum(len(sequence.table.blocks) for sequence in lower)
        if kv.needed_blocks(head.known, head.hashes) + reserve > reachable:
            return
        while lower and (
            len(running) >= self._max_sequences or kv.needed_blocks(head.known, head.hashes) + reserve > kv.free_blocks
        ):
            self._preempt(lower.pop())

    def _add_decodes(self) -> None:
        """Decodes in rank order, with room for their next token; the last in rank step aside when blocks run out."""
        running, kv, bounded = self._roster.running, self._roster.kv, self._shape.mixed
        index = 0
        while index < len(running) and not (bounded and self._left <= 0):
            sequence = running[index]
            index += 1
            if sequence.known - sequence.computed != 1:
                continue
            while sequence.known > len(sequence.table.blocks) * kv.block_tokens and not kv.grow(sequence.table):
                self._preempt(running[-1])
                if sequence.phase is not Phase.RUNNING:
                    return
            self._take(sequence, 1)

    def _add_prompts(self) -> None:
        """Prompts (and whatever else is to be computed again) in rank order, running and queued ones merged."""
        queue, split = self._roster.queue, self._shape.split
        pending = [sequence for sequence in self._roster.running if sequence.known - sequence.computed > 1]
        for prompt in pending:
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
            remaining = sequence.known - sequence.computed
            if remaining > self._left and not split and self.rows:
                return  # it goes first in the next step
            self._take(sequence, min(remaining, self._left) if split else remaining)

    def _admit(self, head: Sequence) -> bool:
        """Bring the head of the queue onto the device if there is room and nothing is gained by waiting a step."""
        if len(self._roster.running) >= self._max_sequences or self._is_coming(head):
            return False
        if any(preempt.request_id == head.request.id for preempt in self.preempts):
            return False
        result = self._roster.admit(head)
        if isinstance(result, Short):
            return False
        if result.resume is not None:
            self.resumes.append(result.resume)
        self._expect(head)
        return True

    def _expect(self, sequence: Sequence) -> None:
        if sequence.table.sealed < len(sequence.hashes):
            block_hash = sequence.hashes[sequence.table.sealed]
            self._expected[block_hash] = min(sequence.rank, self._expected.get(block_hash, sequence.rank))

    def _is_coming(self, head: Sequence) -> bool:
        """Whether the next block that the prefix cache lacks for this request is being computed for one before it.

        Then it waits: many requests with one long new prefix (n answers to one prompt) compute it once. It loses
        nothing, for that one gets its tokens first anyway. A static batch does not wait: it would start without them.
        """
        if not self._expected or head.phase is not Phase.WAITING or self._shape.admission is not Admission.BUDGET:
            return False
        kv = self._roster.kv
        hits = kv.match_blocks(head.known, head.hashes)
        if not kv.prefix_cache or hits >= min(len(head.hashes), (head.known - 1) // kv.block_tokens):
            return False
        computing = self._expected.get(head.hashes[hits])
        return computing is not None and computing < head.rank
