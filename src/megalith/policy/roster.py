"""Which requests run on the device, which wait, and how one changes sides with its KV.

Knows sequences and the KV account; does not know steps, budgets or batch policies.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from megalith.policy.facts import Preempt, PreemptMode, RequestId, Resume
from megalith.policy.kv import BlockTable, IntegrityError, KvAccount, Short, SwappedIn, SwappedOut
from megalith.policy.sequence import Phase, Rank, RankQueue, Sequence


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
        self.running: list[Sequence] = []
        """In rank order."""
        self.queue = RankQueue()
        self.num_swapped = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new request."""
        self.sequences[sequence.request.id] = sequence
        self.queue.push(sequence)
        self.counters.added += 1

    def remove(self, sequence: Sequence) -> None:
        """Drop a request from wherever it stands and free its blocks; sealed ones stay cached."""
        del self.sequences[sequence.request.id]
        if sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
        else:
            self.queue.discard(sequence)
            self.num_swapped -= sequence.phase is Phase.SWAPPED
        if sequence.phase is not Phase.WAITING:
            self.kv.release(sequence.request.id)
        sequence.phase = Phase.GONE

    def admit(self, head: Sequence) -> Admitted | Short:
        """Bring the head of the queue onto the device, with blocks for all of its known tokens."""
        request_id = head.request.id
        # The watermark protects those who run; alone, a request may use everything.
        reserve = self.kv.watermark_blocks if self.running else 0
        bring = self.kv.swap_in if head.phase is Phase.SWAPPED else self.kv.open
        result = bring(request_id, head.known, head.hashes, reserve)
        if isinstance(result, Short):
            return result
        resume = None
        if isinstance(result, SwappedIn):
            self.num_swapped -= 1
            resume = Resume(request_id, result.host_blocks, result.device_blocks)
        self.queue.discard(head)
        head.phase = Phase.RUNNING
        head.table = result.table
        head.computed = max(head.computed, result.hit_blocks * self.kv.block_tokens)
        if head.cached is None:
            head.cached = head.computed
            self.counters.admitted += 1
            self.counters.prefix_queried_tokens += head.known
            self.counters.prefix_hit_tokens += head.cached
        insort(self.running, head, key=_rank)
        return Admitted(resume)

    def seal_known(self, sequence: Sequence) -> None:
        """Seal the computed blocks of a running request whose hashes are known and that are not sealed yet."""
        table, hashes = sequence.table, sequence.hashes
        for index in range(table.sealed, min(len(hashes), sequence.computed // self.kv.block_tokens)):
            self.kv.seal(table, hashes[index])

    def preempt(self, sequence: Sequence, mode: PreemptMode) -> Preempt:
        """Take a running request off the device; it keeps its known tokens and its place in the order.

        `swap` becomes recompute when there is nothing to save or no host block to save it in.
        """
        request_id = sequence.request.id
        self.running.remove(sequence)
        swapped = self.kv.swap_out(request_id, sequence.computed) if mode == "swap" and sequence.computed else None
        if isinstance(swapped, SwappedOut):
            sequence.phase = Phase.SWAPPED
            self.num_swapped += 1
            self.counters.preempted_swap += 1
            preempt = Preempt(request_id, "swap", swapped.device_blocks, swapped.host_blocks)
        else:
            self.kv.release(request_id)
            sequence.phase = Phase.WAITING
            sequence.computed = 0
            self.counters.preempted_recompute += 1
            preempt = Preempt(request_id, "recompute")
        sequence.table = BlockTable([], 0)
        self.queue.push(sequence)
        return preempt

    def check_integrity(self) -> None:
        """Check the account, and that every request is where its phase says. Raises IntegrityError with both sides."""
        self.kv.check_integrity()
        by_phase: dict[Phase, set[RequestId]] = {phase: set() for phase in Phase}
        for sequence in self.sequences.values():
            by_phase[sequence.phase].add(sequence.request.id)
        places = {
            "running": (by_phase[Phase.RUNNING], {sequence.request.id for sequence in self.running}),
            "queued": (by_phase[Phase.WAITING] | by_phase[Phase.SWAPPED], {s.request.id for s in self.queue}),
            "with a device table": (by_phase[Phase.RUNNING], set(self.kv.requests_on_device)),
            "with host blocks": (by_phase[Phase.SWAPPED], set(self.kv.requests_on_host)),
            "gone but listed": (set[RequestId](), by_phase[Phase.GONE]),
        }
        for name, (expected, found) in places.items():
            if expected != found:
                raise IntegrityError(f"requests {name}: {sorted(found)}, but the phases say {sorted(expected)}")
        if len(by_phase[Phase.SWAPPED]) != self.num_swapped:
            raise IntegrityError(f"{len(by_phase[Phase.SWAPPED])} requests are swapped, counted {self.num_swapped}")
        for sequence in self.running:
            room = len(sequence.table.blocks) * self.kv.block_tokens
            if sequence.computed > room:
                raise IntegrityError(f"request {sequence.request.id}: {sequence.computed} tokens in room for {room}")


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
