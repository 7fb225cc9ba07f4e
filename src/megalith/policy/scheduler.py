"""The scheduler of one instance: which rows go into the next step, who holds KV, who waits, who steps aside.

Knows requests by count (tokens known, tokens computed), the KV account and a batch policy. Knows no clock, no tokens,
no tensors, and not the true output length. The engine and the simulator drive the very same object:

    plan = scheduler.plan()
    ... execute plan.preempts, plan.resumes, then the forward pass over plan.chunks ...
    scheduler.complete(plan, finished=[...])
    ... while scheduler.again(plan): the same forward pass again, one token further, and complete() again ...

The order of everything is the rank of a request: higher priority, then earlier arrival, then lower id. The first in
rank is never preempted and every request fits the KV cache alone, so the head always gets on and everyone finishes as
long as no endless stream of higher priorities comes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from operator import attrgetter
from typing import Final, NoReturn

from mypy_extensions import mypyc_attr

from megalith.base.errors import ConfigError, PromptTooLong, QueueFull
from megalith.policy.batching import BatchFacts, BatchPolicy, StepShape
from megalith.policy.cohort import Cohort
from megalith.policy.draft import Draft
from megalith.policy.draft_prompts import PromptsFirstDraft
from megalith.policy.facts import BlockId, Request, RequestId, StepPlan
from megalith.policy.kv import IntegrityError, KvAccount, Short
from megalith.policy.limits import MANY, Progress
from megalith.policy.limits import Limits as Limits
from megalith.policy.roster import Counters, Roster
from megalith.policy.sequence import INCOMING, RUNNING, Sequence

_rank: Final = attrgetter("rank")
_NO_ROWS: Final[list[Sequence]] = []


@mypyc_attr(allow_interpreted_subclasses=True)
class Scheduler:
    """One instance's scheduler. Not thread-safe. The same calls give the same answers.

    add(), abort() and the calls for KV on the move may come at any time, also between plan() and complete(); they end
    the validity of the plan for further runs, not for a run in progress. plan() may be called again without complete():
    the earlier plan then counts as not run, but its preempts and resumes as done.
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
        self._cohort = self._roster.cohort
        self._shape: StepShape | None = getattr(policy, "constant", None)
        self._most_tokens = kv.num_blocks * kv.block_tokens + 1
        """Of one request, prompt and answer: the last sampled token is never computed."""
        self._plan: StepPlan | None = None
        self._rows: list[Sequence] = []
        """Parallel to the chunks of the plan."""
        self._runs_left = 0
        """How often the plan may still be completed."""
        self._in_flight = False
        self._changed = False
        """Something arrived, finished or was aborted since the plan was made."""
        self._committed: list[Sequence] = []
        """Their KV arrived while a step was under way; they join when it ends."""

    # Requests

    def add(self, request: Request, sampled: int = 0) -> None:
        """Queue a request, of which `sampled` tokens exist already where it comes from an instance that lost its KV.

        Raises PromptTooLong when it could never fit and QueueFull when too many wait.
        """
        roster = self._roster
        prompt = request.prompt_tokens
        if request.id in roster.sequences:
            raise ValueError(f"request {request.id} is here already")
        if prompt < 1 or request.max_new_tokens < 1:
            raise ValueError(f"request {request.id} needs a prompt and at least one new token: {request}")
        if request.prefix_hashes and len(request.prefix_hashes) > prompt // self.kv.block_tokens:
            raise ValueError(f"request {request.id} has more prefix hashes than full blocks of prompt")
        if prompt + request.max_new_tokens > self._most_tokens:
            self._refuse(request)
        if len(roster.queue.items) >= self.limits.max_waiting:
            raise QueueFull(
                f"{len(roster.queue)} requests wait already, and the limit is {self.limits.max_waiting}.",
                "Try again shortly, or raise the limit.",
            )
        roster.add(Sequence(request, sampled))
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
        if sequence.cohort is not None:
            sequence.cohort.settle(sequence)
        sequence.add_hash(block_hash)
        self._roster.seal_known(sequence)

    # KV on the move: reserve first, then commit

    def reserve(self, request: Request, known_tokens: int) -> bool:
        """Hold blocks for a request whose KV will come from another instance; False when there is no room for it now.

        `known_tokens` are its prompt and what was sampled so far; all but the newest are on their way.
        """
        roster = self._roster
        if request.id in roster.sequences:
            raise ValueError(f"request {request.id} is here already")
        if request.prompt_tokens + request.max_new_tokens > self._most_tokens:
            self._refuse(request)
        if roster.num_running + roster.num_incoming >= self.limits.max_sequences:
            return False
        reserve = self.kv.watermark_blocks if roster.num_running else 0
        opened = self.kv.open(request.id, max(1, known_tokens - 1), (), reserve)
        if isinstance(opened, Short):
            return False
        sequence = Sequence(request, known_tokens - request.prompt_tokens)
        sequence.table, sequence.phase = opened.table, INCOMING
        sequence.cached, sequence.hashes = 0, ()
        roster.sequences[request.id] = sequence
        roster.num_incoming += 1
        self._changed = True
        return True

    def extend(self, request_id: RequestId, known_tokens: int) -> bool:
        """Hold blocks for more tokens of a reserved request, which decodes elsewhere; False when there is no room."""
        sequence = self._incoming(request_id)
        lacking = self.kv.blocks_for(known_tokens - 1) - sequence.table.held
        if lacking > 0:
            if not self.kv.promise(lacking):
                return False
            sequence.table.held += lacking
            self._changed = True
        sequence.known_ = max(sequence.known_, known_tokens)
        return True

    def commit(self, request_id: RequestId) -> None:
        """The KV of a reserved (or held) request is here: it decodes from the next step on."""
        sequence = self._incoming(request_id)
        self._roster.num_incoming -= 1
        sequence.phase = RUNNING
        sequence.base = sequence.known_ - 1
        self._roster.counters.arrived += 1
        self._changed = True
        if self._in_flight:
            self._committed.append(sequence)
            insort(self._roster.prompts, sequence, key=_rank)
        else:
            self._roster.cohort.join(sequence)

    def hold(self, request_id: RequestId) -> None:
        """Take a decoding request out of the batch; it keeps its blocks until it departs or is committed again.

        A step under way gives it no token.
        """
        sequence = self._roster.sequences.get(request_id)
        if sequence is None or sequence.phase is not RUNNING or sequence.known - sequence.computed != 1:
            raise ValueError(f"request {request_id} does not decode here")
        self._roster.hold(sequence)
        if sequence in self._committed:
            self._committed.remove(sequence)
        self._changed = True

    def depart(self, request_id: RequestId) -> int:
        """Let a running or held request go elsewhere and free its blocks. Returns its known tokens."""
        sequence = self._roster.sequences[request_id]
        known = sequence.known
        self._roster.remove(sequence)
        self._roster.counters.departed += 1
        self._changed = True
        return known

    def _incoming(self, request_id: RequestId) -> Sequence:
        sequence = self._roster.sequences.get(request_id)
        if sequence is None or sequence.phase is not INCOMING:
            raise ValueError(f"no blocks are reserved for request {request_id}")
        return sequence

    # Steps

    def plan(self, most_repeats: int = MANY) -> StepPlan:
        """The next step. An empty one means that there is nothing to do until the next add() or commit().

        Repeats beyond `most_repeats` are of no use to the caller, and need not be looked for.
        """
        roster, cohort = self._roster, self._cohort
        if self._in_flight:
            cohort.undo()
            self._settle_committed()
        elif self._runs_left and not self._changed and cohort.begin():
            return self._decode_plan(self._runs_left - 1)
        queue = roster.queue.items
        shape = self._shape or self.policy.shape(BatchFacts(roster.num_running, len(queue)))
        if not roster.prompts and not queue and not roster.left_out:
            decodes = len(cohort.members)
            if not decodes:
                return self._issue(StepPlan(), _NO_ROWS)
            if decodes <= shape.token_budget or not shape.mixed:
                repeats = cohort.further_runs(most_repeats)
                if repeats >= 0:
                    return self._decode_plan(repeats)
        make = PromptsFirstDraft if shape.prompts_first else Draft
        draft = make(roster, shape, self.limits.max_sequences, self.limits.preempt)
        if draft.fill():
            # Whoever waits now waits until one of these is done: free blocks only get fewer.
            return self._decode_plan(cohort.further_runs(most_repeats))
        decodes = draft.decodes
        context_sum, decoding = (cohort.context_sum, cohort.chunks) if decodes else (0, None)
        plan = StepPlan(tuple(draft.chunks), decodes, context_sum, decoding, 0, draft.preempts, draft.resumes)
        return self._issue(plan, draft.rows)

    def valid(self, plan: StepPlan) -> bool:
        """Whether `plan` may run (again) as it stands, one token further, without asking for a new one."""
        return plan is self._plan and self._runs_left > 0 and not self._changed

    def again(self, plan: StepPlan) -> bool:
        """Begin a further run of a valid plan: the tables then cover it. False when a new plan is needed."""
        if not self.valid(plan) or not self._roster.cohort.begin():
            return False
        self._in_flight = True
        return True

    def complete(
        self, plan: StepPlan, finished: Iterable[RequestId] = (), steps: int = 1, under_way: bool = False
    ) -> None:
        """The plan ran `steps` times: sampled requests know one more token for each; `finished` ones are released.

        A request that has all its max_new_tokens must be among `finished`; ids that are gone already are passed over.
        `steps` at once leave the same state as one at a time, also when something was added meanwhile; runs that were
        done before an abort() are to be completed before it. `under_way`: the run after these has begun, before what
        changed since.
        """
        if plan is not self._plan or not 1 <= steps <= self._runs_left:
            raise ValueError(f"not the last plan, or {steps} runs of it where {self._runs_left} are left")
        cohort = self._cohort
        plan.decoding = None
        if plan.decodes and not cohort.advance(steps):
            raise IntegrityError(f"{steps} runs of a plan with {plan.repeats} repeats took more blocks than there are")
        if plan.listed:
            self._advance_listed(plan)
        self._runs_left -= steps
        if self._committed and not under_way:
            self._settle_committed()
        if finished:
            self._finish(finished)
        ends = cohort.ends
        if ends and ends[0][0] <= cohort.clock and (over := cohort.over()) is not None:
            raise ValueError(f"request {over.request.id} has all its tokens but is not among the finished ones")
        self._in_flight = under_way and cohort.begin()

    # Reading

    @property
    def counters(self) -> Counters:
        """What happened since the start; a live view. Evictions are in `kv.evictions`."""
        return self._roster.counters

    @property
    def cohort(self) -> Cohort:
        """The requests that decode, for whoever times their steps. Read it only."""
        return self._roster.cohort

    @property
    def num_running(self) -> int:
        """Requests that hold device blocks."""
        return self._roster.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that hold no KV: new ones and those preempted for recompute."""
        return len(self._roster.queue) - self._roster.num_swapped

    @property
    def num_held(self) -> int:
        """Requests that hold blocks for KV that comes or goes, and are in no step."""
        return self._roster.num_incoming

    def waiting(self) -> list[Sequence]:
        """Those off the device, in rank order. O(n)."""
        return list(self._roster.queue)

    def running(self) -> list[Sequence]:
        """Those in steps, in rank order, with their tables settled. O(batch)."""
        self._roster.cohort.settle_all()
        return self._roster.running

    def head(self) -> Sequence | None:
        """The first of those off the device."""
        return self._roster.queue.head()

    @property
    def num_swapped(self) -> int:
        """Requests whose KV is in host blocks."""
        return self._roster.num_swapped

    def block_table(self, request_id: RequestId) -> list[BlockId]:
        """Device blocks in position order; empty while the request does not run. A live view: do not change it.

        They cover the step under way.
        """
        sequence = self._roster.sequences[request_id]
        if sequence.cohort is not None:
            sequence.cohort.settle(sequence)
        return self.kv.materialise(sequence.table)

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
        if sequence.phase is not RUNNING or not self.kv.prefix_cache:
            return range(0)
        return range(len(sequence.hashes), sequence.computed // self.kv.block_tokens)

    def check_integrity(self) -> None:
        """Count everything afresh. O(everything). Raises IntegrityError with both sides of what differs."""
        self._roster.check_integrity()

    # Inside

    def _decode_plan(self, repeats: int) -> StepPlan:
        """A step of all decodes and nothing else, whose blocks the cohort has taken."""
        cohort = self._cohort
        self._plan = plan = StepPlan((), len(cohort.members), cohort.context_sum, cohort.chunks, repeats)
        self._rows = _NO_ROWS
        self._runs_left = repeats + 1
        self._in_flight = True
        self._changed = False
        return plan

    def _issue(self, plan: StepPlan, rows: list[Sequence]) -> StepPlan:
        self._plan = plan
        self._rows = rows
        self._runs_left = 1
        self._in_flight = True
        self._changed = False
        return plan

    def _advance_listed(self, plan: StepPlan) -> None:
        """Count what the listed rows computed and sampled, and seal the blocks that they completed."""
        roster = self._roster
        rows = self._rows
        for index, chunk in enumerate(plan.listed):
            row = rows[index]
            if row.phase is not RUNNING:
                continue  # aborted while the step ran
            row.base += chunk.new_tokens
            if row.hashes and row.table.sealed < len(row.hashes):
                roster.seal_known(row)
            if chunk.samples:
                row.known_ += 1
                roster.sampled(row)

    def _finish(self, finished: Iterable[RequestId]) -> None:
        roster = self._roster
        for request_id in sorted(finished):
            sequence = roster.sequences.get(request_id)
            if sequence is not None:
                roster.remove(sequence)
                roster.counters.finished += 1
        self._changed = True
        self._runs_left = 0

    def _settle_committed(self) -> None:
        for sequence in self._committed:
            if sequence.phase is RUNNING:
                self._roster.sampled(sequence)
        self._committed.clear()

    def _refuse(self, request: Request) -> NoReturn:
        needed = self.kv.blocks_for(request.prompt_tokens + request.max_new_tokens - 1)
        raise PromptTooLong(
            f"{request.prompt_tokens} prompt tokens and {request.max_new_tokens} new ones need {needed} KV blocks "
            f"of {self.kv.block_tokens} tokens; this instance has {self.kv.num_blocks}.",
            f"Prompt and new tokens together may be at most {self._most_tokens}.",
        )
