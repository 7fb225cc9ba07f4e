"""The scheduler of one instance: which rows go into the next step, who holds KV, who waits, who steps aside.

Knows requests by count (tokens known, tokens computed), the KV account and a batch policy. Knows no clock, no tokens,
no tensors, and not the true output length. The engine and the simulator drive the very same object:

    plan = scheduler.plan()
    ... execute plan.preempts, plan.resumes, then the forward pass over plan.chunks ...
    scheduler.complete(plan, finished=[...])
    ... while scheduler.valid(plan): the same forward pass again, one token further, and complete() again ...

The order of everything is the rank of a request: higher priority, then earlier arrival, then lower id. The first in
rank is never preempted and every request fits the KV cache alone, so the head always gets on and everyone finishes as
long as no endless stream of higher priorities comes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from megalith.base.config import Config
from megalith.base.errors import ConfigError, PromptTooLong, QueueFull
from megalith.policy.batching import Admission, BatchFacts, BatchPolicy, StepShape
from megalith.policy.facts import BlockId, Chunk, Preempt, PreemptMode, Request, RequestId, Resume, StepPlan
from megalith.policy.horizon import crossings, further_runs
from megalith.policy.kv import BlockTable, IntegrityError, KvAccount, Short, SwappedIn, SwappedOut
from megalith.policy.sequence import Phase, Rank, RankQueue, Sequence


class Limits(Config, frozen=True):
    """What one instance accepts."""

    max_sequences: int
    """Requests that run at once."""
    max_waiting: int = 1024
    """Requests that may be off the device when a new one comes; preempted ones count, and are never refused."""
    preempt: PreemptMode = "recompute"
    """`swap` falls back to recompute, request by request, when host blocks are short."""


@dataclass(slots=True)
class Counters:
    """What happened since the start. Only ever rises."""

    added: int = 0
    admitted: int = 0
    """First admissions; a preempted request that comes back does not count again."""
    finished: int = 0
    aborted: int = 0
    preempted_recompute: int = 0
    preempted_swap: int = 0
    prefix_queried_tokens: int = 0
    """Prompt tokens of admitted requests."""
    prefix_hit_tokens: int = 0
    """Those of them that the prefix cache had."""

    @property
    def preemptions(self) -> int:
        """Of either kind."""
        return self.preempted_recompute + self.preempted_swap


class Progress(NamedTuple):
    """How far one request is, in tokens."""

    computed: int
    known: int
    cached: int
    """Prompt tokens that the prefix cache served when it was first admitted."""


@dataclass(slots=True)
class _Draft:
    """A step while it is being put together."""

    left: int
    """Tokens of the budget that are not given away; below zero when one prompt alone exceeds it."""
    rows: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    preempts: list[Preempt] = field(default_factory=list)
    resumes: list[Resume] = field(default_factory=list)

    def take(self, sequence: Sequence, new_tokens: int) -> None:
        self.rows.append(sequence)
        samples = new_tokens == sequence.known - sequence.computed
        self.chunks.append(Chunk(sequence.request.id, new_tokens, sequence.computed, samples))
        self.left -= new_tokens


class Scheduler:
    """One instance's scheduler. Not thread-safe. All calls are deterministic.

    add() and abort() may come at any time, also between plan() and complete(); they end the validity of the plan for
    further runs, not for a run in progress. plan() may be called again without complete(): the earlier plan then
    counts as not run, but its preempts and resumes as done.
    """

    def __init__(self, policy: BatchPolicy, kv: KvAccount, limits: Limits) -> None:
        if limits.max_sequences < 1 or limits.max_waiting < 1:
            raise ConfigError(
                f"max_sequences is {limits.max_sequences} and max_waiting {limits.max_waiting}.",
                "Both must be at least 1.",
            )
        self.policy = policy
        self.kv = kv
        self.limits = limits
        self.counters = Counters()
        self._sequences: dict[RequestId, Sequence] = {}
        self._running: list[Sequence] = []
        """In rank order."""
        self._queue = RankQueue()
        self._num_swapped = 0
        self._plan: StepPlan | None = None
        self._rows: list[Sequence] = []
        """Parallel to the chunks of the plan."""
        self._runs_left = 0
        """How often the plan may still be completed."""
        self._in_flight = False
        self._changed = False
        """Something arrived, finished or was aborted since the plan was made."""

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises PromptTooLong when it could never fit and QueueFull when too many wait."""
        if request.id in self._sequences:
            raise ValueError(f"request {request.id} is here already")
        if request.prompt_tokens < 1 or request.max_new_tokens < 1:
            raise ValueError(f"request {request.id} needs a prompt and at least one new token: {request}")
        if len(request.prefix_hashes) > request.prompt_tokens // self.kv.block_tokens:
            raise ValueError(f"request {request.id} has more prefix hashes than full blocks of prompt")
        self._check_fits(request)
        if len(self._queue) >= self.limits.max_waiting:
            raise QueueFull(
                f"{len(self._queue)} requests wait already, and the limit is {self.limits.max_waiting}.",
                "Try again shortly, or raise the limit.",
            )
        sequence = Sequence(request)
        self._sequences[request.id] = sequence
        self._queue.push(sequence)
        self._changed = True
        self.counters.added += 1

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request, wherever it stands, and free its blocks. False when it is not here (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._remove(sequence)
        self.counters.aborted += 1
        return True

    def seal(self, request_id: RequestId, block_hash: int) -> None:
        """Say the hash of the first block in `unsealed(request_id)`, so that others can share it."""
        sequence = self._sequences[request_id]
        if not self.unsealed(request_id):
            raise ValueError(f"request {request_id} has no complete block without a hash")
        sequence.add_hash(block_hash)
        self.kv.seal(sequence.table, block_hash)

    # Steps

    def plan(self) -> StepPlan:
        """The next step. Empty chunks mean that there is nothing to do until the next add()."""
        if self._runs_left and not self._in_flight and not self._changed:
            chunks = tuple([Chunk(row.request.id, 1, row.computed, True) for row in self._rows])
            return self._issue(StepPlan(chunks, (), (), self._runs_left - 1), self._rows)
        shape = self.policy.shape(self._facts())
        draft = _Draft(shape.token_budget)
        repeats = 0
        if shape.admission is not Admission.NONE:
            self._make_room(draft, shape)
        if shape.mixed:
            self._add_decodes(draft, shape.token_budget)
        decodes = len(draft.rows)
        self._add_prompts(draft, shape)
        if not shape.mixed and not draft.rows:
            self._add_decodes(draft, self.limits.max_sequences)
            decodes = len(draft.rows)
        if decodes == len(draft.rows) == len(self._running) and not (draft.preempts or draft.resumes):
            # Nothing but decodes, and all of them: whoever waits now waits until one of them is done.
            repeats = further_runs(draft.rows, self.kv.block_tokens, self.kv.free_blocks)
        plan = StepPlan(tuple(draft.chunks), tuple(draft.preempts), tuple(draft.resumes), repeats)
        return self._issue(plan, draft.rows)

    def valid(self, plan: StepPlan) -> bool:
        """Whether `plan` may run (again) as it stands, one token further, without asking for a new one."""
        return plan is self._plan and self._runs_left > 0 and not self._changed

    def complete(self, plan: StepPlan, finished: Iterable[RequestId] = (), steps: int = 1) -> None:
        """The plan ran `steps` times: sampled requests know one more token for each; `finished` ones are released.

        A request that has all its max_new_tokens must be among `finished`. `steps` at once leave the same state as
        one at a time. While runs are left, the tables cover the next run already.
        """
        if plan is not self._plan or not 1 <= steps <= self._runs_left:
            raise ValueError(f"not the last plan, or {steps} runs of it where {self._runs_left} are left")
        gone = frozenset(finished)
        self._advance(plan, steps, gone)
        self._runs_left -= steps
        if gone or self._changed:
            self._runs_left = 0
        if plan.repeats:
            rows = [row for row in self._rows if row.phase is Phase.RUNNING]
            ahead = 1 if self._runs_left else 0
            for row in crossings(rows, self.kv.block_tokens, ran=steps, ahead=ahead):
                self.kv.grow(row.table)
        for request_id in sorted(gone):
            self._remove(self._sequences[request_id])
            self.counters.finished += 1
        self._in_flight = False

    # Reading

    @property
    def num_running(self) -> int:
        """Requests that hold device blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no KV: new ones and those preempted for recompute."""
        return len(self._queue) - self._num_swapped

    @property
    def num_swapped(self) -> int:
        """Requests whose KV is in host blocks."""
        return self._num_swapped

    def block_table(self, request_id: RequestId) -> list[BlockId]:
        """Device blocks in position order; empty while the request does not run. A live view: do not change it."""
        return self._sequences[request_id].table.blocks

    def progress(self, request_id: RequestId) -> Progress:
        """How far the request is."""
        sequence = self._sequences[request_id]
        return Progress(sequence.computed, sequence.known, sequence.cached)

    def unsealed(self, request_id: RequestId) -> range:
        """Indices of the request's complete blocks whose hash is not known yet, to be sealed in order.

        Prompt blocks are sealed by complete() from `prefix_hashes`; what is left for the caller are generated ones.
        """
        sequence = self._sequences[request_id]
        if sequence.phase is not Phase.RUNNING:
            return range(0)
        return range(sequence.table.sealed, sequence.computed // self.kv.block_tokens)

    def check_integrity(self) -> None:
        """Check the books of the account and that every request is where its phase says. O(everything)."""
        self.kv.check_integrity()
        by_phase: dict[Phase, set[RequestId]] = {phase: set() for phase in Phase}
        for sequence in self._sequences.values():
            by_phase[sequence.phase].add(sequence.request.id)
        queued = {sequence.request.id for sequence in self._queue}
        places = {
            "running": (by_phase[Phase.RUNNING], {sequence.request.id for sequence in self._running}),
            "queued": (by_phase[Phase.WAITING] | by_phase[Phase.SWAPPED], queued),
            "device tables": (by_phase[Phase.RUNNING], set(self.kv.requests_on_device)),
            "host tables": (by_phase[Phase.SWAPPED], set(self.kv.requests_on_host)),
            "gone": (by_phase[Phase.GONE], set()),
        }
        for name, (expected, found) in places.items():
            if expected != found:
                raise IntegrityError(f"{name}: {sorted(found)}, but the phases say {sorted(expected)}")
        if len(by_phase[Phase.SWAPPED]) != self._num_swapped:
            raise IntegrityError(f"{len(by_phase[Phase.SWAPPED])} requests are swapped, counted {self._num_swapped}")
        if any(sequence.computed > len(sequence.table.blocks) * self.kv.block_tokens for sequence in self._running):
            raise IntegrityError("a running request has computed more tokens than its blocks hold")

    # Putting a step together

    def _facts(self) -> BatchFacts:
        decoding = sum([1 for sequence in self._running if sequence.known - sequence.computed == 1])
        return BatchFacts(decoding, len(self._running) - decoding, len(self._queue))

    def _issue(self, plan: StepPlan, rows: list[Sequence]) -> StepPlan:
        self._plan = plan
        self._rows = rows
        self._runs_left = plan.repeats + 1
        self._in_flight = True
        self._changed = False
        return plan

    def _add_decodes(self, draft: _Draft, limit: int) -> None:
        """Decodes in rank order, with room for their next token; the last in rank step aside when blocks run out."""
        running, block_tokens = self._running, self.kv.block_tokens
        index = 0
        while index < len(running) and len(draft.rows) < limit:
            sequence = running[index]
            index += 1
            if sequence.known - sequence.computed != 1:
                continue
            table = sequence.table
            while sequence.known > len(table.blocks) * block_tokens and not self.kv.grow(table):
                self._preempt(running[-1], draft)
                if sequence.phase is not Phase.RUNNING:
                    return
            draft.take(sequence, 1)

    def _add_prompts(self, draft: _Draft, shape: StepShape) -> None:
        """Prompts (and whatever else is to be computed again) in rank order, running and waiting ones merged."""
        pending = [sequence for sequence in self._running if sequence.remaining > 1]
        if shape.admission is Admission.ALL:
            while (head := self._queue.head()) is not None and self._admit(head, draft, shape):
                pending.append(head)
        admitting = shape.admission is Admission.BUDGET
        index = 0
        while draft.left > 0:
            sequence = pending[index] if index < len(pending) else None
            head = self._queue.head() if admitting else None
            if head is not None and (sequence is None or head.rank < sequence.rank):
                if not shape.split and draft.rows and self._to_compute(head) > draft.left:
                    return
                # No one overtakes a head that does not fit: it would starve.
                admitting = self._admit(head, draft, shape)
                if not admitting:
                    continue
                sequence = head
            elif sequence is None:
                return
            else:
                index += 1
            if sequence.remaining <= draft.left or not (shape.split or draft.rows):
                draft.take(sequence, sequence.remaining)
            elif shape.split:
                draft.take(sequence, draft.left)
            else:
                return

    def _admit(self, head: Sequence, draft: _Draft, shape: StepShape) -> bool:
        """Bring the head of the queue onto the device, if there is room."""
        if len(self._running) >= self._max_running(shape):
            return False
        if any(preempt.request_id == head.request.id for preempt in draft.preempts):
            return False
        reserve = self.kv.watermark_blocks if self._running else 0
        bring = self.kv.swap_in if head.phase is Phase.SWAPPED else self.kv.open
        result = bring(head.request.id, head.known, head.hashes, reserve)
        if isinstance(result, Short):
            return False
        if isinstance(result, SwappedIn):
            self._num_swapped -= 1
            draft.resumes.append(Resume(head.request.id, result.host_blocks, result.device_blocks))
        self._queue.discard(head)
        head.phase = Phase.RUNNING
        head.table = result.table
        head.computed = max(head.computed, result.hit_blocks * self.kv.block_tokens)
        if not head.started:
            head.started = True
            head.cached = head.computed
            self.counters.admitted += 1
            self.counters.prefix_queried_tokens += head.known
            self.counters.prefix_hit_tokens += head.cached
        insort(self._running, head, key=_rank)
        return True

    def _make_room(self, draft: _Draft, shape: StepShape) -> None:
        """A head of higher priority takes the place of running requests, last in rank first, if that lets it in.

        Happens before anything else of the step: a preempt's copy must not overwrite host blocks that a resume of the
        same step still has to read.
        """
        head = self._queue.head()
        if head is None or not self._running or self._running[-1].rank[0] <= head.rank[0]:
            return
        lower = [sequence for sequence in self._running if sequence.rank[0] > head.rank[0]]
        needed = self.kv.needed_blocks(head.known, head.hashes)
        if len(lower) < len(self._running):
            needed += self.kv.watermark_blocks
        if needed > self.kv.free_blocks + sum(len(sequence.table.blocks) for sequence in lower):
            return
        while lower and (len(self._running) >= self._max_running(shape) or needed > self.kv.free_blocks):
            self._preempt(lower.pop(), draft)

    def _preempt(self, sequence: Sequence, draft: _Draft) -> None:
        """Take a running request off the device; it keeps its known tokens and its place in the order."""
        request_id = sequence.request.id
        self._running.remove(sequence)
        swapped = None
        if self.limits.preempt == "swap" and sequence.computed:
            swapped = self.kv.swap_out(request_id, sequence.computed)
        if isinstance(swapped, SwappedOut):
            sequence.phase = Phase.SWAPPED
            self._num_swapped += 1
            self.counters.preempted_swap += 1
            draft.preempts.append(Preempt(request_id, "swap", swapped.device_blocks, swapped.host_blocks))
        else:
            self.kv.release(request_id)
            sequence.phase = Phase.WAITING
            sequence.computed = 0
            self.counters.preempted_recompute += 1
            draft.preempts.append(Preempt(request_id, "recompute"))
        sequence.table = BlockTable([], 0)
        self._queue.push(sequence)

    # Inside

    def _advance(self, plan: StepPlan, steps: int, gone: frozenset[RequestId]) -> None:
        """Count what the runs computed and sampled, and seal the prompt blocks that they completed."""
        over = [
            row.request.id
            for row, chunk in zip(self._rows, plan.chunks, strict=True)
            if chunk.samples
            and row.known + steps >= row.end
            and row.request.id not in gone
            and row.phase is Phase.RUNNING
        ]
        if over:
            raise ValueError(f"requests {over} have all their tokens but are not among the finished ones")
        block_tokens = self.kv.block_tokens
        for row, chunk in zip(self._rows, plan.chunks, strict=True):
            if row.phase is not Phase.RUNNING:
                continue
            row.computed += chunk.new_tokens * steps
            if chunk.samples:
                row.known += steps
            table = row.table
            while table.sealed < len(row.hashes) and (table.sealed + 1) * block_tokens <= row.computed:
                self.kv.seal(table, row.hashes[table.sealed])

    def _remove(self, sequence: Sequence) -> None:
        """Drop a request from wherever it stands."""
        del self._sequences[sequence.request.id]
        if sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
            self.kv.release(sequence.request.id)
        else:
            self._queue.discard(sequence)
            if sequence.phase is Phase.SWAPPED:
                self._num_swapped -= 1
                self.kv.release(sequence.request.id)
        sequence.phase = Phase.GONE
        self._changed = True

    def _max_running(self, shape: StepShape) -> int:
        """A mixed step must have a token for every decode."""
        return min(self.limits.max_sequences, shape.token_budget) if shape.mixed else self.limits.max_sequences

    def _to_compute(self, sequence: Sequence) -> int:
        """Tokens that a queued request would have to compute if it were admitted now."""
        hits = self.kv.match_blocks(sequence.known, sequence.hashes) * self.kv.block_tokens
        return sequence.known - max(sequence.computed, hits)

    def _check_fits(self, request: Request) -> None:
        # The last sampled token is never computed.
        tokens = request.prompt_tokens + request.max_new_tokens - 1
        needed, capacity = self.kv.blocks_for(tokens), self.kv.num_blocks
        if needed > capacity:
            room = capacity * self.kv.block_tokens
            raise PromptTooLong(
                f"{request.prompt_tokens} prompt tokens and {request.max_new_tokens} new ones need {needed} KV blocks "
                f"of {self.kv.block_tokens} tokens; this instance has {capacity}.",
                f"Prompt and new tokens together may be at most {room + 1}.",
            )


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
