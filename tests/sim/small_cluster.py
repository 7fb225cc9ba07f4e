"""A cluster for tests of what moves and breaks: real schedulers, one event for each step, every token counted.

It checks while it runs that a request gets each token once, and only where it is said to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megalith.policy.batching import SplitFuse
from megalith.policy.cluster import Event, InstanceId, Migrate
from megalith.policy.facts import Request, RequestId, StepPlan
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.kernel import STEP_END, Kernel
from megalith.sim.migration import Migrations
from megalith.sim.network import Network
from megalith.sim.parties import KvShape, MoveKind
from megalith.sim.transfer import Handoffs
from megalith.specs.fleet import HandoffSpec, LinkSpec, MigrationSpec

BLOCK_TOKENS = 4
STEP_NS = 1_000
KV = KvShape(bytes_per_token=10, layers=4)


def run_until(kernel: Kernel, time_ns: int) -> None:
    """Run all events up to this time, which is then now."""
    while kernel._heap and kernel._heap[0][0] <= time_ns:
        kernel.run(1)
    kernel.now_ns = time_ns


@dataclass
class Job:
    """One request as the cluster sees it."""

    request: Request
    wanted: int
    instance: InstanceId = -1
    generated: int = 0
    ended: str = ""
    token_ns: list[int] = field(default_factory=list)
    moves: list[tuple[str, InstanceId, InstanceId]] = field(default_factory=list)


class SmallFacts:
    """What movement reads of the facts of an instance."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.accepting = True

    def waiting_blocks(self) -> int:
        kv = self._scheduler.kv
        return sum(kv.blocks_for(sequence.known) for sequence in self._scheduler._roster.queue)


class SmallInstance:
    def __init__(self, cluster: SmallCluster, number: InstanceId, blocks: int, step_ns: int = STEP_NS) -> None:
        self.id = number
        self.cluster = cluster
        self.step_ns = step_ns
        self.scheduler = Scheduler(
            SplitFuse(16), KvAccount(blocks, BLOCK_TOKENS, 0, prefix_cache=False), Limits(max_sequences=8)
        )
        self.facts: Any = SmallFacts(self.scheduler)
        self.plan: StepPlan | None = None
        self.calls: list[Callable[[], None]] = []
        self.up = True
        self.slowdown = 1.0
        self.ending = False
        """Between the completion of a step and the plan of the next."""

    def submit(self, job: Job) -> None:
        """A request with its known tokens, which are computed again."""
        request = job.request
        known = Request(
            request.id,
            request.arrival_ns,
            request.prompt_tokens + job.generated,
            request.max_new_tokens - job.generated,
            request.priority,
        )
        self.scheduler.add(known)
        self.wake(self.cluster.kernel.now_ns)

    def interrupt(self, now_ns: int) -> None:
        assert now_ns == self.cluster.kernel.now_ns
        assert self.up, "a dead instance is touched"

    def at_boundary(self, call: Callable[[], None]) -> None:
        if self.plan is None:
            call()
        else:
            self.calls.append(call)

    def wake(self, now_ns: int) -> None:
        if self.plan is not None or not self.up or self.ending:
            return
        self.cluster.handoffs.room(self.id)
        plan = self.scheduler.plan()
        assert plan.chunks is not None
        for preempt in plan.preempts:
            self.cluster.preempted(preempt.request_id)
        if not plan.chunks:
            return
        self.plan = plan
        end_ns = now_ns + round(self.step_ns * self.slowdown)
        for chunk in plan.listed:
            self.cluster.handoffs.prompt_step(chunk.request_id, chunk.new_tokens, now_ns, end_ns)
        self.cluster.kernel.at(end_ns, self.end, plan, STEP_END)

    def end(self, plan: StepPlan) -> None:
        if not self.up:
            return
        jobs, scheduler = self.cluster.jobs, self.scheduler
        here = scheduler._roster.sequences
        sampled = [chunk.request_id for chunk in plan.chunks if chunk.samples and chunk.request_id in here]
        before = {request_id: scheduler.progress(request_id).known for request_id in sampled}
        finished = [request_id for request_id in sampled if jobs[request_id].generated + 1 == jobs[request_id].wanted]
        scheduler.complete(plan, finished)
        self.plan, self.ending = None, True
        for request_id in sampled:
            job = jobs[request_id]
            done = request_id in finished
            assert done or scheduler.progress(request_id).known == before[request_id] + 1
            assert job.instance == self.id, f"request {request_id} is on {job.instance} and got a token on {self.id}"
            job.generated += 1
            job.token_ns.append(self.cluster.kernel.now_ns)
            if done:
                self.cluster.finish(job)
            elif job.generated == 1 or request_id in self.cluster.handoffs:
                self.cluster.handoffs.prompt_done(request_id)
        calls, self.calls = self.calls, []
        for call in calls:
            call()
        self.cluster.check()
        self.ending = False
        self.wake(self.cluster.kernel.now_ns)


class SmallCluster:
    def __init__(
        self,
        blocks: list[int],
        link: LinkSpec | None = None,
        handoff: HandoffSpec | None = None,
        migration: MigrationSpec | None = None,
    ) -> None:
        self.kernel = Kernel()
        # 40 bytes a block, so that one takes 40 ns.
        self.network = Network(self.kernel, link or LinkSpec(bytes_per_s=1e9))
        self.handoffs = Handoffs(self, self.network, handoff or HandoffSpec(), KV)
        self.migrations = Migrations(self, self.handoffs, migration or MigrationSpec(), self.slow)
        self.instances = {number: SmallInstance(self, number, count) for number, count in enumerate(blocks)}
        self.jobs: dict[RequestId, Job] = {}
        self.events: list[Event] = []
        self.refusals: list[tuple[Migrate, str]] = []
        self.spare: InstanceId | None = None
        """Where hand-offs go whose decode side was lost."""

    # As the host

    def find(self, instance: InstanceId) -> SmallInstance | None:
        found = self.instances.get(instance)
        return found if found is not None and found.up else None

    def request(self, request_id: RequestId) -> Request | None:
        job = self.jobs.get(request_id)
        return job.request if job is not None and not job.ended else None

    def moved(self, request_id: RequestId, source: InstanceId, target: InstanceId, kind: MoveKind) -> None:
        job = self.jobs[request_id]
        assert job.instance == source
        job.instance = target
        job.moves.append((kind, source, target))

    def kept(self, request_id: RequestId, instance: InstanceId) -> None:
        job = self.jobs[request_id]
        assert job.instance == instance
        job.moves.append(("kept", instance, instance))

    def held(self, request_id: RequestId, instance: InstanceId) -> None:
        assert self.jobs[request_id].instance == instance
        assert self.instances[instance].plan is None, "held in the middle of a step"

    def resumed(self, request_id: RequestId, instance: InstanceId) -> None:
        assert self.jobs[request_id].instance == instance

    def slow(self, instance: InstanceId, factor: float) -> None:
        self.instances[instance].slowdown = factor

    def retarget(self, request_id: RequestId, lost: InstanceId) -> InstanceId | None:
        return self.spare

    def resubmit(self, request_id: RequestId, target: InstanceId) -> None:
        instance = self.find(target)
        assert instance is not None
        instance.submit(self.jobs[request_id])

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def migrate(self, command: Migrate) -> None:
        refused = self.migrations.carry_out(command)
        if refused is not None:
            self.refusals.append((command, refused))

    # As the world

    def arrive(self, request: Request, wanted: int, instance: InstanceId) -> Job:
        job = Job(request, wanted, instance)
        self.jobs[request.id] = job
        found = self.find(instance)
        assert found is not None
        found.submit(job)
        return job

    def finish(self, job: Job) -> None:
        job.ended = "finished"
        self.handoffs.gone(job.request.id)
        self.migrations.gone(job.request.id)

    def preempted(self, request_id: RequestId) -> None:
        self.handoffs.preempted(request_id)
        self.migrations.preempted(request_id)

    def abort(self, request_id: RequestId) -> None:
        job = self.jobs[request_id]
        if not job.ended:
            job.ended = "aborted"
            self.handoffs.gone(request_id)
            self.migrations.gone(request_id)
            instance = self.find(job.instance)
            if instance is not None:
                instance.scheduler.abort(request_id)
                instance.wake(self.kernel.now_ns)

    def fail(self, number: InstanceId) -> list[RequestId]:
        """The instance stops; the requests that were there are returned."""
        instance = self.instances[number]
        instance.up = False
        instance.plan = None
        instance.calls.clear()
        return [request_id for request_id, job in self.jobs.items() if job.instance == number and not job.ended]

    def restore(self, number: InstanceId) -> None:
        """It is back, with an empty cache."""
        self.instances[number] = SmallInstance(self, number, self.instances[number].scheduler.kv.num_blocks)

    def kill(self, number: InstanceId) -> None:
        """The instance dies; its requests go to the first that is up, or are lost."""
        if self.find(number) is None:
            return
        lost = self.fail(number)
        self.handoffs.down(number)
        self.migrations.down(number)
        up = [other for other in self.instances.values() if other.up]
        for job in [self.jobs[request_id] for request_id in lost]:
            if up:
                job.instance = up[0].id
                up[0].submit(job)
            else:
                job.ended = "lost"

    def until(self, time_ns: int) -> None:
        """Run all events up to this time."""
        run_until(self.kernel, time_ns)

    def check(self) -> None:
        for instance in self.instances.values():
            if instance.up:
                instance.scheduler.check_integrity()

    def settled(self) -> None:
        """Everybody has ended with the right number of tokens, and no block is held anywhere."""
        self.check()
        for job in self.jobs.values():
            assert job.ended, f"{job} never ended"
            assert job.generated == job.wanted or job.ended != "finished"
            assert job.generated <= job.wanted
        for instance in self.instances.values():
            if instance.up:
                assert instance.scheduler.kv.used_blocks == 0, f"instance {instance.id} leaks blocks"
                assert not instance.scheduler._roster.sequences
        assert len(self.handoffs) == 0
        assert not self.handoffs._waiting
        assert not any(self.handoffs._waiting_on.values())
        assert not any(self.handoffs._blocks_coming.values())
        assert not self.migrations._busy
        assert len(self.migrations) == 0
        assert self.network.moving == 0
