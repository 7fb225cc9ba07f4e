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

from collections.abc import Iterable
from typing import NamedTuple

from megalith.base.config import Config
from megalith.base.errors import ConfigError, PromptTooLong, QueueFull
from megalith.policy.batching import BatchFacts, BatchPolicy
from megalith.policy.draft import Draft
from megalith.policy.facts import BlockId, Chunk, PreemptMode, Request, RequestId, StepPlan
from megalith.policy.horizon import crossings, further_runs
from megalith.policy.kv import IntegrityError, KvAccount
from megalith.policy.roster import Counters, Roster
from megalith.policy.sequence import Phase, Sequence


class Limits(Config, frozen=True):
    """What one instance accepts."""

    max_sequences: int
    """Requests that run at once."""
    max_waiting: int = 1024
    """Requests that may be off the device when a new one comes; preempted ones count, and are never refused."""
    preempt: PreemptMode = "recompute"
    """`swap` falls back to recompute, request by request, when host blocks are short."""


class Progress(NamedTuple):
    """How far one request is, in tokens."""

    computed: int
    """Tokens whose K and V are in the cache."""
    known: int
    """Prompt tokens and sampled ones."""
    cached: int
    """Prompt tokens that the prefix cache served when the request was first admitted."""


class Scheduler:
    """One instance's scheduler. Not thread-safe. The same calls give the same answers.

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
        self._roster = Roster(kv)
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
        if request.id in self._roster.sequences:
            raise ValueError(f"request {request.id} is here already")
        if request.prompt_tokens < 1 or request.max_new_tokens < 1:
            raise ValueError(f"request {request.id} needs a prompt and at least one new token: {request}")
        if len(request.prefix_hashes) > request.prompt_tokens // self.kv.block_tokens:
            raise ValueError(f"request {request.id} has more prefix hashes than full blocks of prompt")
        self._check_fits(request)
        if len(self._roster.queue) >= self.limits.max_waiting:
            raise QueueFull(
                f"{len(self._roster.queue)} requests wait already, and the limit is {self.limits.max_waiting}.",
                "Try again shortly, or raise the limit.",
            )
        self._roster.add(Sequence(request))
        self._changed = True

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request, wherever it stands, and free its blocks. False when it is not here (any more)."""
        sequence = self._roster.sequences.get(request_id)
        if sequence is None:
            return False
        self._roster.remove(sequence)
        self._roster.counters.aborted += 1
        self._changed = True
        return True

    def seal(self, request_id: RequestId, block_hash: int) -> None:
        """Give the hash of the first block in `unsealed(request_id)`, so that other requests can share that block.

        Does not end the validity of a plan: whoever waits profits from the next fresh one.
        """
        if not self.unsealed(request_id):
            raise ValueError(f"request {request_id} has no complete block without a hash")
        sequence = self._roster.sequences[request_id]
        sequence.add_hash(block_hash)
        self._roster.seal_known(sequence)

    # Steps

    def plan(self) -> StepPlan:
        """The next step. No chunks mean that there is nothing to do until the next add()."""
        if self._runs_left and not self._in_flight and not self._changed:
            chunks = tuple([Chunk(row.request.id, 1, row.computed, True) for row in self._rows])
            return self._issue(StepPlan(chunks, (), (), self._runs_left - 1), self._rows)
        shape = self.policy.shape(BatchFacts(len(self._roster.running), len(self._roster.queue)))
        draft = Draft(self._roster, shape, self.limits.max_sequences, self.limits.preempt)
        repeats = 0
        if draft.fill():
            # Whoever waits now waits until one of these is done: free blocks only get fewer.
            repeats = further_runs(draft.rows, self.kv.block_tokens, self.kv.free_blocks)
        return self._issue(
            StepPlan(tuple(draft.chunks), tuple(draft.preempts), tuple(draft.resumes), repeats), draft.rows
        )

    def valid(self, plan: StepPlan) -> bool:
        """Whether `plan` may run (again) as it stands, one token further, without asking for a new one."""
        return plan is self._plan and self._runs_left > 0 and not self._changed

    def complete(self, plan: StepPlan, finished: Iterable[RequestId] = (), steps: int = 1) -> None:
        """The plan ran `steps` times: sampled requests know one more token for each; `finished` ones are released.

        A request that has all its max_new_tokens must be among `finished`; ids that are gone already are passed over.
        `steps` at once leave the same state as one at a time, also when something was added meanwhile; runs that were
        done before an abort() are to be completed before it. While runs are left, the tables cover the next one.
        """
        if plan is not self._plan or not 1 <= steps <= self._runs_left:
            raise ValueError(f"not the last plan, or {steps} runs of it where {self._runs_left} are left")
        gone = frozenset(finished)
        if steps == self._runs_left:
            self._check_ends(plan, steps, gone)
        self._advance(plan, steps)
        self._runs_left = 0 if gone or self._changed else self._runs_left - steps
        if plan.repeats:
            rows = [row for row in self._rows if row.phase is Phase.RUNNING]
            for row in crossings(rows, self.kv.block_tokens, ran=steps, ahead=min(1, self._runs_left)):
                if not self.kv.grow(row.table):
                    raise IntegrityError(f"no block for request {row.request.id} within the repeats of its plan")
        for request_id in sorted(gone & self._roster.sequences.keys()):
            self._roster.remove(self._roster.sequences[request_id])
            self._roster.counters.finished += 1
        self._in_flight = False

    # Reading

    @property
    def counters(self) -> Counters:
        """What happened since the start; a live view. Evictions are in `kv.evictions`."""
        return self._roster.counters

    @property
    def num_running(self) -> int:
        """Requests that hold device blocks."""
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no KV: new ones and those preempted for recompute."""
        return len(self._roster.queue) - self._roster.num_swapped

    @property
    def num_swapped(self) -> int:
        """Requests whose KV is in host blocks."""
        return self._roster.num_swapped

    def block_table(self, request_id: RequestId) -> list[BlockId]:
        """Device blocks in position order; empty while the request does not run. A live view: do not change it."""
        return self._roster.sequences[request_id].table.blocks

    def progress(self, request_id: RequestId) -> Progress:
        """How far the request is."""
        sequence = self._roster.sequences[request_id]
        return Progress(sequence.computed, sequence.known, sequence.cached or 0)

    def unsealed(self, request_id: RequestId) -> range:
        """Indices of the request's complete blocks that seal() should give hashes for, one call each, in order.

        complete() seals prompt blocks itself, from `prefix_hashes`; what is left are generated ones. Empty while the
        request does not run, and always without a prefix cache.
        """
        sequence = self._roster.sequences[request_id]
        if sequence.phase is not Phase.RUNNING or not self.kv.prefix_cache:
            return range(0)
        return range(len(sequence.hashes), sequence.computed // self.kv.block_tokens)

    def check_integrity(self) -> None:
        """Count everything afresh. O(everything). Raises IntegrityError with both sides of what differs."""
        self._roster.check_integrity()

    # Inside

    def _issue(self, plan: StepPlan, rows: list[Sequence]) -> StepPlan:
        self._plan = plan
        self._rows = rows
        self._runs_left = plan.repeats + 1
        self._in_flight = True
        self._changed = False
        return plan

    def _advance(self, plan: StepPlan, steps: int) -> None:
        """Count what the runs computed and sampled, and seal the blocks that they completed where hashes are known."""
        for row, chunk in zip(self._rows, plan.chunks, strict=True):
            if row.phase is not Phase.RUNNING:
                continue  # aborted while the step ran
            row.computed += chunk.new_tokens * steps
            if chunk.samples:
                row.known += steps
            if row.table.sealed < len(row.hashes):
                self._roster.seal_known(row)

    def _check_ends(self, plan: StepPlan, steps: int, gone: frozenset[RequestId]) -> None:
        for row, chunk in zip(self._rows, plan.chunks, strict=True):
            ends = chunk.samples and row.known + steps >= row.end and row.phase is Phase.RUNNING
            if ends and row.request.id not in gone:
                raise ValueError(f"request {row.request.id} has all its tokens but is not among the finished ones")

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
