"""Which requests run on the device, which wait, and how one changes sides with its KV.

Knows sequences and the KV account; does not know steps, budgets or batch policies.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from megalith.policy.cohort import Cohort
from megalith.policy.facts import Preempt, PreemptMode, RequestId, Resume
from megalith.policy.kv import BlockTable, IntegrityError, KvAccount, Short, SwappedIn, SwappedOut
from megalith.policy.sequence import GONE, INCOMING, NO_BLOCKS, RUNNING, SWAPPED, WAITING, Phase, RankQueue, Sequence

_rank: Final = attrgetter("rank")


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
    arrived: int = 0
    """Requests whose KV came from elsewhere, and those that were held and go on."""
    departed: int = 0
    """Requests whose KV went elsewhere."""
    prefix_queried_tokens: int = 0
    """Prompt tokens of admitted requests."""
    prefix_hit_tokens: int = 0
    """Those of them that the prefix cache had."""

    @property
    def preemptions(self) -> int:
        """Of either kind."""
        return self.preempted_recompute + self.preempted_swap


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request runs now; `resume` says which copies bring its KV back, when it was swapped."""

    resume: Resume | None


class Roster:
    """All live requests of one instance, each in one place."""

    def __init__(self, kv: KvAccount) -> None:
        self.kv = kv
        self.counters = Counters()
        self.sequences: dict[RequestId, Sequence] = {}
        self.cohort = Cohort(kv)
        """Running requests that decode."""
        self.prompts: list[Sequence] = []
        """Other running requests, in rank order: they have known tokens to compute before they sample again."""
        self.queue = RankQueue()
        self.left_out: dict[RequestId, int] = {}
        """Who decodes but was not in the last step, in the order in which they were left out -> steps in a row."""
        self.seats: dict[RequestId, int] = {}
        """Who decodes -> its place among them, for those that were there when a step last left somebody out."""
        self.num_swapped = 0
        self.num_incoming = 0

    @property
    def num_running(self) -> int:
        """Requests that are on the device."""
        return len(self.cohort.members) + len(self.prompts)

    @property
    def running(self) -> list[Sequence]:
        """All running requests in rank order. O(batch)."""
        return sorted([*self.cohort.members, *self.prompts], key=_rank)

    def last(self) -> Sequence:
        """The running request that is last in rank; there must be one."""
        members, prompts = self.cohort.members, self.prompts
        if not members:
            return prompts[-1]
        return prompts[-1] if prompts and prompts[-1].rank > members[-1].rank else members[-1]

    def add(self, sequence: Sequence) -> None:
        """Queue a new request."""
        self.sequences[sequence.request.id] = sequence
        items = self.queue.items
        if not items or items[-1].rank < sequence.rank:
            items.append(sequence)
        else:
            self.queue.push(sequence)
        self.counters.added += 1

    def remove(self, sequence: Sequence) -> None:
        """Drop a request from wherever it stands and free its blocks; sealed ones stay cached."""
        request_id = sequence.request.id
        del self.sequences[request_id]
        phase = sequence.phase
        if phase is RUNNING:
            cohort = sequence.cohort
            if cohort is not None:
                cohort.leave(sequence)
            else:
                self._step_aside(sequence)
            self.kv.release(request_id)
        elif phase is INCOMING:
            self.num_incoming -= 1
            self.kv.release(request_id)
        else:
            self.queue.discard(sequence)
            if phase is SWAPPED:
                self.num_swapped -= 1
                self.kv.release(request_id)
        sequence.phase = GONE

    def sampled(self, prompt: Sequence) -> None:
        """A prompt has all its known tokens but the newest computed: it decodes from now on."""
        prompts = self.prompts
        if prompts[0] is prompt:
            del prompts[0]
        else:
            prompts.remove(prompt)
        self.cohort.join(prompt)

    def single_out(self, member: Sequence) -> None:
        """Take a member out of the cohort for a step that not all decodes are in."""
        self.cohort.leave(member)
        insort(self.prompts, member, key=_rank)

    def hold(self, sequence: Sequence) -> None:
        """A running request leaves the batch and keeps its blocks, as one whose KV is on its way does."""
        self._step_aside(sequence)
        sequence.phase = INCOMING
        self.num_incoming += 1

    def admit(self, head: Sequence) -> Admitted | Short:
        """Bring the head of the queue onto the device, with blocks for all of its known tokens."""
        request_id = head.request.id
        # The watermark protects those who run; alone, a request may use everything.
        reserve = self.kv.watermark_blocks if self.cohort.members or self.prompts else 0
        bring = self.kv.swap_in if head.phase is SWAPPED else self.kv.open
        result = bring(request_id, head.known_, head.hashes, reserve)
        if isinstance(result, Short):
            return result
        resume = None
        if isinstance(result, SwappedIn):
            self.num_swapped -= 1
            resume = Resume(request_id, result.host_blocks, result.device_blocks)
        self.queue.discard(head)
        head.base = max(head.base, result.hit_blocks * self.kv.block_tokens)
        self.admitted(head, result.table)
        prompts = self.prompts
        if not prompts or prompts[-1].rank < head.rank:
            prompts.append(head)
        else:
            insort(prompts, head, key=_rank)
        return Admitted(resume)

    def admitted(self, head: Sequence, table: BlockTable) -> None:
        """The head runs, with this table; `base` is what it need not compute."""
        head.phase = RUNNING
        head.table = table
        if head.cached is None:
            head.cached = head.base
            counters = self.counters
            counters.admitted += 1
            counters.prefix_queried_tokens += head.known_
            counters.prefix_hit_tokens += head.base

    def seal_known(self, sequence: Sequence) -> None:
        """Seal the computed blocks of a running request whose hashes are known and that are not sealed yet."""
        self.kv.seal_all(sequence.table, sequence.hashes, sequence.computed // self.kv.block_tokens)

    def preempt(self, sequence: Sequence, mode: PreemptMode) -> Preempt:
        """Take a running request off the device; it keeps its known tokens and its place in the order.

        `swap` becomes recompute when there is nothing to save or no host block to save it in.
        """
        request_id = sequence.request.id
        self._step_aside(sequence)
        swapped = self.kv.swap_out(request_id, sequence.base) if mode == "swap" and sequence.base else None
        if isinstance(swapped, SwappedOut):
            sequence.phase = SWAPPED
            self.num_swapped += 1
            self.counters.preempted_swap += 1
            preempt = Preempt(request_id, "swap", swapped.device_blocks, swapped.host_blocks)
        else:
            self.kv.release(request_id)
            sequence.phase = WAITING
            sequence.base = 0
            self.counters.preempted_recompute += 1
            preempt = Preempt(request_id, "recompute")
        sequence.table = NO_BLOCKS
        self.queue.push(sequence)
        return preempt

    def check_integrity(self) -> None:
        """Check the account, and that every request is where its phase says. Raises IntegrityError with both sides."""
        self.cohort.settle_all()
        self.kv.check_integrity()
        by_phase: dict[Phase, set[RequestId]] = {phase: set() for phase in Phase}
        for sequence in self.sequences.values():
            by_phase[sequence.phase].add(sequence.request.id)
        on_device = by_phase[RUNNING] | by_phase[INCOMING]
        places = {
            "running": (by_phase[RUNNING], {sequence.request.id for sequence in self.running}),
            "queued": (by_phase[WAITING] | by_phase[SWAPPED], {s.request.id for s in self.queue}),
            "with a device table": (on_device, set(self.kv.requests_on_device)),
            "with host blocks": (by_phase[SWAPPED], set(self.kv.requests_on_host)),
            "gone but listed": (set[RequestId](), by_phase[GONE]),
        }
        for name, (expected, found) in places.items():
            if expected != found:
                raise IntegrityError(f"requests {name}: {sorted(found)}, but the phases say {sorted(expected)}")
        counted = (self.num_swapped, self.num_incoming)
        if (len(by_phase[SWAPPED]), len(by_phase[INCOMING])) != counted:
            raise IntegrityError(f"swapped and incoming: {counted} counted, the phases say {by_phase}")
        for sequence in self.running:
            room = sequence.table.held * self.kv.block_tokens
            if sequence.computed > room:
                raise IntegrityError(f"request {sequence.request.id}: {sequence.computed} tokens in room for {room}")
        self.cohort.check_integrity()

    def _step_aside(self, sequence: Sequence) -> None:
        if sequence.cohort is not None:
            self.cohort.leave(sequence)
        else:
            self.prompts.remove(sequence)
