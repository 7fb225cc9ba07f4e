"""The scheduler of a pipeline: several steps under way at once, one for each stage, over disjoint requests.

Same requests, ranks, blocks and batch policies as Scheduler; knows no clock and no stage times either. A step under way
holds its rows: they keep their blocks, count as running, and are neither planned nor made to step aside until it ends.
Then they are idle like all others, so groups of decodes that are idle at the same time become one. As in Vidur
(replica_scheduler/base_replica_scheduler.py) and in vLLM's batch queue:

    while (plan := scheduler.plan()) is not empty: send it into the first stage
    ... whenever one comes out of the last stage: scheduler.complete(plan, finished=[...]), and plan again
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from megalith.base.errors import ConfigError
from megalith.policy.batching import BatchFacts, BatchPolicy, StepShape
from megalith.policy.cohort import Cohort
from megalith.policy.draft import Draft
from megalith.policy.facts import PreemptMode, RequestId, StepPlan
from megalith.policy.kv import IntegrityError, KvAccount
from megalith.policy.roster import Roster
from megalith.policy.scheduler import Limits, Scheduler
from megalith.policy.sequence import Sequence

_rank: Final = attrgetter("rank")


class Flight:
    """One step under way, and its rows."""

    __slots__ = ("cohort", "plan", "prompts", "rows")

    def __init__(self, rows: list[Sequence], cohort: Cohort) -> None:
        self.plan = StepPlan()
        self.rows = rows
        """Parallel to what the plan lists."""
        self.prompts = list(rows)
        """Those of them that are still here."""
        self.cohort = cohort
        """The decodes that are in it as one; empty when none are."""


class PipelinedRoster(Roster):
    """A roster some of whose running requests are away in steps under way."""

    def __init__(self, kv: KvAccount) -> None:
        super().__init__(kv)
        self.flights: list[Flight] = []

    @property
    def num_running(self) -> int:
        """Requests that are on the device."""
        away = sum([len(flight.cohort.members) + len(flight.prompts) for flight in self.flights])
        return len(self.cohort.members) + len(self.prompts) + away

    @property
    def running(self) -> list[Sequence]:
        """All running requests in rank order. O(batch)."""
        away = [row for flight in self.flights for row in (*flight.cohort.members, *flight.prompts)]
        return sorted([*self.cohort.members, *self.prompts, *away], key=_rank)

    def launch(self, rows: list[Sequence], decodes: bool) -> Flight:
        """These rows, and all idle decodes or none of them, are in a step under way from now on."""
        flight = Flight(rows, self.cohort if decodes else Cohort(self.kv))
        if decodes:
            self.cohort = Cohort(self.kv)
        listed = set(rows)
        self.prompts = [prompt for prompt in self.prompts if prompt not in listed]
        self.flights.append(flight)
        return flight

    def land(self, flight: Flight) -> None:
        """The step is over: its rows are idle."""
        self.flights.remove(flight)
        for prompt in flight.prompts:
            insort(self.prompts, prompt, key=_rank)
        idle, back = sorted((self.cohort, flight.cohort), key=lambda cohort: len(cohort.members))
        self.cohort = back
        for member in list(idle.members):
            idle.leave(member)
            back.join(member)

    def check_integrity(self) -> None:
        """See Roster."""
        for flight in self.flights:
            flight.cohort.settle_all()
            flight.cohort.check_integrity()
        super().check_integrity()

    def _step_aside(self, sequence: Sequence) -> None:
        if sequence.cohort is not None:
            sequence.cohort.leave(sequence)
            return
        places = [self.prompts, *[flight.prompts for flight in self.flights]]
        next(place for place in places if sequence in place).remove(sequence)


class PipelinedDraft(Draft):
    """A step of at most `max_rows` rows, of idle requests only."""

    __slots__ = ("_max_rows",)

    def __init__(self, roster: Roster, shape: StepShape, max_sequences: int, mode: PreemptMode, max_rows: int) -> None:
        super().__init__(roster, shape, max_sequences, mode)
        self._max_rows = max_rows

    def _take(self, sequence: Sequence, new_tokens: int) -> None:
        super()._take(sequence, new_tokens)
        if len(self.rows) + self.decodes >= self._max_rows:
            self._left = 0

    def _add_decodes(self) -> None:
        cohort = self._roster.cohort
        if len(cohort.members) > self._max_rows:
            for member in cohort.members[: self._max_rows]:
                if member.cohort is None or self._left <= 0:
                    return
                self._roster.single_out(member)
                if not self._grown(member):
                    return
                self._take(member, 1)
            return
        super()._add_decodes()
        if self.decodes >= self._max_rows:
            self._left = 0

    def _add_plain_prompts(self) -> None:
        """Left to _add_prompts, which counts rows."""

    def _make_room(self) -> None:
        """Nobody is displaced while a step is under way: who is away cannot be, and it may be one of them."""
        if not isinstance(self._roster, PipelinedRoster) or not self._roster.flights:
            super()._make_room()


class PipelinedScheduler(Scheduler):
    """See the module. With one stage it decides as Scheduler does, but never repeats a plan."""

    def __init__(
        self,
        policy: BatchPolicy,
        kv: KvAccount,
        limits: Limits,
        stages: int,
        max_rows: int | None = None,
        most_flights: int | None = None,
    ) -> None:
        """`max_rows`: most requests in one step; by default an equal share of max_sequences for each step under way,
        of which there are at most `most_flights`, by default one for each stage."""
        super().__init__(policy, kv, limits)
        if stages < 1 or (max_rows is not None and max_rows < 1):
            raise ConfigError(f"A pipeline of {stages} stages with {max_rows} rows a step cannot run.")
        self.stages = stages
        self.most_flights = stages if most_flights is None else most_flights
        self.max_rows = max(1, limits.max_sequences // self.most_flights) if max_rows is None else max_rows
        self._roster = self._flying = PipelinedRoster(kv)
        self._cohort = self._roster.cohort

    def plan(self, most_repeats: int = 0) -> StepPlan:  # noqa: ARG002
        """One more step; an empty one when the most are under way, or when nobody who is idle can run now."""
        roster = self._flying
        if len(roster.flights) >= self.most_flights:
            return StepPlan()
        shape = self._shape or self.policy.shape(BatchFacts(roster.num_running, len(roster.queue)))
        if shape.prompts_first:
            raise ConfigError(f"Batch policy {self.policy.name!r} does not run in a pipeline.", "Use `splitfuse`.")
        draft = PipelinedDraft(roster, shape, self.limits.max_sequences, self.limits.preempt, self.max_rows)
        draft.fill()
        if not draft.decodes and not draft.rows:
            return StepPlan(preempts=draft.preempts, resumes=draft.resumes)
        flight = roster.launch(draft.rows, draft.decodes > 0)
        context_sum, decoding = (flight.cohort.context_sum, flight.cohort.chunks) if draft.decodes else (0, None)
        flight.plan = StepPlan(
            tuple(draft.chunks), draft.decodes, context_sum, decoding, 0, draft.preempts, draft.resumes
        )
        self._cohort = roster.cohort
        return flight.plan

    def valid(self, plan: StepPlan) -> bool:  # noqa: ARG002
        """No plan runs twice."""
        return False

    def again(self, plan: StepPlan) -> bool:  # noqa: ARG002
        """No plan runs twice."""
        return False

    def decodes_of(self, plan: StepPlan) -> Cohort:
        """The decodes of a plan under way."""
        return self._flight(plan).cohort

    def complete(
        self, plan: StepPlan, finished: Iterable[RequestId] = (), steps: int = 1, under_way: bool = False
    ) -> None:
        """The plan, which may be any of those under way, has run. See Scheduler.complete."""
        flight = self._flight(plan)
        if steps != 1 or under_way:
            raise ValueError("a plan of a pipeline runs once")
        roster = self._flying
        plan.decoding = None
        if plan.decodes and not flight.cohort.advance(1):
            raise IntegrityError("a step took more blocks than there are")
        roster.land(flight)
        self._cohort = roster.cohort
        self._rows = flight.rows
        self._advance_listed(plan)
        self._finish(finished)
        over = roster.cohort.over()
        if over is not None:
            raise ValueError(f"request {over.request.id} has all its tokens but is not among the finished ones")

    def running(self) -> list[Sequence]:
        """See Scheduler."""
        for flight in self._flying.flights:
            flight.cohort.settle_all()
        return super().running()

    def _flight(self, plan: StepPlan) -> Flight:
        for flight in self._flying.flights:
            if flight.plan is plan:
                return flight
        raise ValueError("not a plan that is under way")
