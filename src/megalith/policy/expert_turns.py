"""A scheduler for many models on one device: steps of one model at a time, in turns.

Requests of the model whose turn it is are scheduled as ever, by any batch policy; all others are parked. A turn ends
when nothing of it is left, and the next belongs to the model of the first in rank of those that wait. It takes all
that wait for that model (grouped: prompts grouped by expert and run expert by expert, SN40L, arXiv:2405.07518), or
only those directly behind the first (arrival order: the control), and at most max_sequences of them. Whoever comes
later joins only while nobody waits for another model. So every turn is finite, each begins with the first in rank, and
nobody waits for ever as long as no endless stream of higher priorities comes.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter
from typing import Final

from megalith.base.errors import QueueFull
from megalith.policy.batching import BatchPolicy
from megalith.policy.experts import ModelId
from megalith.policy.facts import Request, RequestId, StepPlan
from megalith.policy.kv import KvAccount
from megalith.policy.limits import MANY, Limits
from megalith.policy.scheduler import Scheduler
from megalith.policy.sequence import Sequence

_rank: Final = attrgetter("rank")
NO_MODEL: Final = -1


class ExpertScheduler(Scheduler):
    """See the module and Scheduler. `model` is the one whose turn it is, or NO_MODEL before the first."""

    def __init__(self, policy: BatchPolicy, kv: KvAccount, limits: Limits, grouped: bool = True) -> None:
        super().__init__(policy, kv, limits)
        self.model: ModelId = NO_MODEL
        self.turns = 0
        """Turns begun."""
        self.taken = 0
        """Requests that were given a turn or joined one."""
        self._grouped = grouped
        self._parked: list[Sequence] = []
        """Those that wait for a turn, in rank order. They have no KV."""
        self._fresh: list[Request] = []
        """Taken and not told of yet."""

    # Requests

    def add(self, request: Request, sampled: int = 0) -> None:
        """See Scheduler.add."""
        if len(self._parked) + len(self._roster.queue) >= self.limits.max_waiting:
            raise QueueFull(
                f"{len(self._parked) + len(self._roster.queue)} requests wait already, and the limit is "
                f"{self.limits.max_waiting}.",
                "Try again shortly, or raise the limit.",
            )
        super().add(request, sampled)
        if request.model == self.model and self._on() and not self._parked:
            self.taken += 1
            self._fresh.append(request)
            return
        sequence = self._roster.sequences[request.id]
        self._roster.queue.discard(sequence)
        insort(self._parked, sequence, key=_rank)

    def abort(self, request_id: RequestId) -> bool:
        """See Scheduler.abort."""
        self._unpark(request_id)
        return super().abort(request_id)

    def depart(self, request_id: RequestId) -> int:
        """See Scheduler.depart."""
        self._unpark(request_id)
        return super().depart(request_id)

    def reserve(self, request: Request, known_tokens: int) -> bool:
        """See Scheduler.reserve. Also False unless it is the turn of the request's model and nobody waits for another:
        KV that comes from elsewhere is of no use while another model runs."""
        if request.model != self.model or not self._on() or self._parked:
            return False
        return super().reserve(request, known_tokens)

    # Turns

    def turn(self) -> ModelId:
        """The model that the next step needs, beginning the next turn when the last one is over; NO_MODEL when there is
        nothing to do. To be asked before plan()."""
        if self._on():
            return self.model
        if not self._parked:
            return NO_MODEL
        self.model, taken = self._parked[0].request.model, []
        for sequence in self._parked:
            if sequence.request.model == self.model:
                taken.append(sequence)
                if len(taken) == self.limits.max_sequences:
                    break
            elif not self._grouped:
                break
        if self._grouped:
            chosen = set(taken)
            self._parked = [sequence for sequence in self._parked if sequence not in chosen]
        else:
            del self._parked[: len(taken)]
        for sequence in taken:
            self._roster.queue.push(sequence)
            self._fresh.append(sequence.request)
        self.turns += 1
        self.taken += len(taken)
        self._changed = True
        return self.model

    def next_model(self) -> ModelId:
        """The model whose turn comes after this one, as far as it is known; NO_MODEL when nobody waits. What a prefetch
        needs to know."""
        return self._parked[0].request.model if self._parked else NO_MODEL

    def fresh(self) -> list[Request]:
        """Requests that were given a turn since this was last asked."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def plan(self, most_repeats: int = MANY) -> StepPlan:
        """See Scheduler.plan."""
        self.turn()
        return super().plan(most_repeats)

    # Reading

    @property
    def num_waiting(self) -> int:
        """See Scheduler.num_waiting: those that wait for a turn as well."""
        return len(self._roster.queue) - self._roster.num_swapped + len(self._parked)

    def waiting(self) -> list[Sequence]:
        """See Scheduler.waiting."""
        return sorted([*self._roster.queue, *self._parked], key=_rank)

    def head(self) -> Sequence | None:
        """See Scheduler.head: of those whose turn it is, if any."""
        return self._roster.queue.head() or (self._parked[0] if self._parked else None)

    def check_integrity(self) -> None:
        """See Scheduler.check_integrity; and that only requests of one model are on the device."""
        for sequence in self._parked:
            self._roster.queue.push(sequence)
        try:
            super().check_integrity()
        finally:
            for sequence in self._parked:
                self._roster.queue.discard(sequence)
        strangers = [one.request.id for one in self._roster.running if one.request.model != self.model]
        if strangers:
            raise ValueError(f"requests {strangers} run, and it is the turn of model {self.model}")

    # Inside

    def _on(self) -> bool:
        """Something of the turn is left."""
        return len(self._roster.sequences) > len(self._parked)

    def _unpark(self, request_id: RequestId) -> None:
        """Put a parked request back where Scheduler looks for it."""
        sequence = self._roster.sequences.get(request_id)
        if sequence is not None and sequence in self._parked:
            self._parked.remove(sequence)
            self._roster.queue.push(sequence)
