"""The simulated cluster: instances, a router at every arrival, controllers on events, and the commands carried out.

Knows the words of policy/cluster.py and nothing of any single policy. Everything that happens goes through the kernel,
and every decision into its hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from megalith.base.errors import MegalithError
from megalith.policy.cluster import (
    Commanding,
    Controller,
    Defer,
    Event,
    InstanceId,
    Migrate,
    Reject,
    Route,
    Router,
)
from megalith.policy.facts import Request, RequestId
from megalith.policy.scheduler import Scheduler
from megalith.sim.control import Control
from megalith.sim.gaps import GapMeter, StepSink
from megalith.sim.instance import Instance
from megalith.sim.kernel import ARRIVE, FINISH, FIRST, MOVE, PREEMPT, Kernel
from megalith.sim.live import NEVER, Live, Outcome
from megalith.sim.migration import Migrations
from megalith.sim.parties import MoveKind
from megalith.sim.tracing import RunTrace
from megalith.sim.transfer import Handoffs
from megalith.sim.view import ClusterView, Facts
from megalith.specs.fleet import PoolSpec

RETRY_NS: Final = 1_000_000
"""A request that was sent to an instance that is down asks again after this: the network says so after a while."""
GIVE_UP_NS: Final = 3_600_000_000_000
"""A request that has asked for this long is refused."""


class Sink(StepSink, Protocol):
    """Where a run is recorded (sim/record.py)."""

    def finished(self, live: Live) -> None:
        """A request ended."""
        ...


class Cluster:
    """See the module. Add pools, then `feed()` it requests and run the kernel."""

    def __init__(
        self,
        kernel: Kernel,
        router: Router,
        controllers: Sequence[Controller],
        sink: Sink,
        make: Callable[[InstanceId, PoolSpec, Cluster], Instance],
    ) -> None:
        """`make` builds an instance of a pool, whose outlet is the cluster."""
        self.kernel = kernel
        self.router = router
        self.sink = sink
        self.instances: dict[InstanceId, Instance] = {}
        self.pools: dict[InstanceId, PoolSpec] = {}
        self.facts: dict[InstanceId, Facts] = {}
        self.live: dict[RequestId, Live] = {}
        """All requests that have arrived and not ended."""
        self.view = ClusterView(lambda: kernel.now_ns)
        self.handoffs: Handoffs | None = None
        self.migrations: Migrations | None = None
        self.trace: RunTrace | None = None
        """Where the run is drawn; see draw()."""
        self.ended = 0
        self.last_end_ns = 0
        """When the last request of them ended. The clock may run on: samples, ticks and void events come after it."""
        self.on_end: Callable[[Live], object] | None = None
        """Told of every request that ends, such as a closed loop of clients."""
        self._make = make
        self._next_id = 0
        self._gaps: dict[Scheduler, GapMeter] = {}
        """By scheduler, because an instance that failed comes back with a new one."""
        self._commanding = router if isinstance(router, Commanding) else None
        self.control = Control(self, kernel, router, controllers)
        self._listeners = self.control.listeners
        self._arrivals: Iterator[Live] = iter(())
        self._more = False
        """More arrivals are to come."""

    # Instances

    def add_instance(self, pool: PoolSpec) -> Instance:
        """One more instance of a pool, serving from now on."""
        instance_id, self._next_id = self._next_id, self._next_id + 1
        instance = self._make(instance_id, pool, self)
        facts = Facts(instance, pool)
        instance.facts = facts
        self.instances[instance_id], self.pools[instance_id], self.facts[instance_id] = instance, pool, facts
        self.view.add(facts)
        if self.trace is None:
            instance.steps_to, instance.prompt_steps_to = self.sink.steps, self.sink.prompt_step
        return instance

    def remove_instance(self, instance_id: InstanceId) -> None:
        """Take an instance away that has nothing left."""
        if self.instances[instance_id].lives:
            raise RuntimeError(f"instance {instance_id} still has {len(self.instances[instance_id].lives)} requests")
        self.view.remove(instance_id)
        self._gaps.pop(self.instances[instance_id].scheduler, None)
        del self.instances[instance_id], self.pools[instance_id], self.facts[instance_id]

    def draw(self, trace: RunTrace) -> None:
        """Draw everything that happens from now on."""
        self.trace = trace
        for instance in self.instances.values():
            instance.steps_to = instance.prompt_steps_to = None

    # Requests

    @property
    def busy(self) -> bool:
        """Requests are here or still to come."""
        return bool(self.live) or self._more

    def feed(self, arrivals: Iterator[Live]) -> None:
        """Take requests from `arrivals`, which are in the order of arrival, as their time comes."""
        self._arrivals, self._more = arrivals, True
        self._await_next()

    def arrive(self, live: Live) -> None:
        """A request comes now."""
        self.live[live.request.id] = live
        if live.output_tokens < 1:
            self.end(live, "rejected")  # its prompt leaves no room for a token
            return
        if "arrival" in self._listeners:
            self.emit(Event("arrival", self.kernel.now_ns, live.request.id))
        self.route(live)

    def route(self, live: Live) -> None:
        """Ask the router where a request goes, and send it there."""
        placement = self.router.route(live.request, self.view)
        if self._commanding is not None:
            self.control.carry_out(self._commanding.commands(), self.router.name)
        if isinstance(placement, Route):
            self._place(live, placement)
        elif isinstance(placement, Defer):
            self.kernel.at(max(placement.until_ns, self.kernel.now_ns + 1), self.route, live)
        elif isinstance(placement, Reject):
            self.refuse(live)

    def refuse(self, live: Live) -> None:
        """No instance takes a request: it is rejected, or has failed if it ran before."""
        self.end(live, "rejected" if live.scheduled_ns < 0 else "failed")

    def end(self, live: Live, outcome: Outcome) -> None:
        """A request is over, one way or another."""
        live.outcome = outcome
        del self.live[live.request.id]
        self.ended += 1
        self.last_end_ns = self.kernel.now_ns
        self.sink.finished(live)
        if self.trace is not None:
            self.trace.finished(live)
        self.kernel.log(FINISH, live.request.id, live.generated)
        if "finish" in self._listeners:
            request = live.request
            data = {"instance": live.instance, "prompt_tokens": request.prompt_tokens, "new_tokens": live.generated,
                    "outcome": outcome}  # fmt: skip
            self.emit(Event("finish", self.kernel.now_ns, request.id, data))
        if self.on_end is not None:
            self.on_end(live)

    def _await_next(self) -> None:
        live = next(self._arrivals, None)
        self._more = live is not None
        if live is not None:
            self.kernel.at(live.request.arrival_ns, self._next, live)

    def _next(self, live: Live) -> None:
        self._await_next()
        self.arrive(live)

    def _place(self, live: Live, route: Route) -> None:
        instance = self.instances.get(route.instance)
        request = live.request
        target = route.decode_instance
        if instance is None or instance.down or (target is not None and self.find(target) is None):
            if self.kernel.now_ns - request.arrival_ns > GIVE_UP_NS:
                self.refuse(live)
            else:
                self.kernel.at(self.kernel.now_ns + RETRY_NS, self.route, live)
            return
        live.instance = route.instance
        facts = self.facts[route.instance]
        split = target is not None and target != route.instance and self.handoffs is not None
        try:
            instance.submit(live)
        except MegalithError:
            self.refuse(live)
            return
        self.kernel.log(ARRIVE, request.id, route.instance)
        facts.outstanding += 1
        if live.first_ns < 0:
            facts.pending_tokens += request.prompt_tokens
        if not split:
            facts.promised_tokens += request.prompt_tokens + request.max_new_tokens
            return
        assert target is not None
        assert self.handoffs is not None
        live.decode_instance, live.transfer = target, route.transfer
        facts.promised_tokens += request.prompt_tokens + 1
        self.facts[target].count(request, 1)
        self.handoffs.expect(request, route.instance, target, route.transfer)

    # What instances tell (Outlet)

    def first_token(self, instance: Instance, live: Live) -> None:
        """See Outlet."""
        request = live.request
        self.facts[instance.id].pending_tokens -= request.prompt_tokens
        self.kernel.log(FIRST, request.id, instance.id)
        if "first_token" in self._listeners:
            self.emit(Event("first_token", self.kernel.now_ns, request.id, {"instance": instance.id}))
        if live.decode_instance >= 0:
            self.recomputed(instance, live)

    def recomputed(self, instance: Instance, live: Live) -> None:
        """See Outlet."""
        split = live.decode_instance >= 0 and live.generated < live.output_tokens
        if split and self.handoffs is not None and self.handoffs.prompt_done(live.request.id):
            instance.left(live)

    def finished(self, instance: Instance, live: Live) -> None:
        """See Outlet."""
        self._uncount(instance.id, live)
        if live.moving and self.migrations is not None:
            self.migrations.gone(live.request.id)
        if self.handoffs is not None:
            if live.decode_instance >= 0:
                self._forget_decode(live)
            self.handoffs.room(instance.id)
        self.end(live, "finished")

    def preempted(self, instance: Instance, live: Live) -> None:
        """See Outlet."""
        self.kernel.log(PREEMPT, live.request.id, instance.id)
        if self.handoffs is not None and live.decode_instance >= 0:
            self.handoffs.preempted(live.request.id)
        if live.moving and self.migrations is not None:
            self.migrations.preempted(live.request.id)
        self.control.tell("preempt", live.request.id, {"instance": instance.id})

    def idle(self, instance: Instance) -> None:
        """See Outlet."""
        if "idle" in self._listeners:
            self.emit(Event("idle", self.kernel.now_ns, instance.id))

    def prompt_begins(self, instance: Instance, live: Live, new_tokens: int, end_ns: int) -> None:  # noqa: ARG002
        """See Outlet."""
        if self.handoffs is not None:
            self.handoffs.prompt_step(live.request.id, new_tokens, self.kernel.now_ns, end_ns)

    def stepped(self, instance: Instance, first_ps: int, slope_ps: int, steps: int, decodes: int) -> None:
        """See Outlet."""
        if self.trace is not None:
            self.trace.steps(instance.id, instance.begun_ps, (first_ps, slope_ps, steps), decodes)
        gaps = self._gaps.get(instance.scheduler)
        (self.sink if gaps is None else gaps).steps(first_ps, slope_ps, steps, decodes)

    def prompt_stepped(self, instance: Instance, duration_ps: int, prompt_tokens: int, decodes: int) -> None:
        """See Outlet."""
        if self.trace is not None:
            self.trace.prompt_step(instance.id, instance.begun_ps, duration_ps, prompt_tokens, decodes)
        gaps = self._gaps.get(instance.scheduler)
        if gaps is None:
            if not instance.stalled:
                self.sink.prompt_step(duration_ps, prompt_tokens, decodes)
                return
            gaps = self._gaps[instance.scheduler] = GapMeter(self.sink)
            instance.steps_to = instance.prompt_steps_to = None
        gaps.prompt_step(duration_ps, prompt_tokens, decodes, instance.stalled)

    # What movers tell (Host)

    def find(self, instance: InstanceId) -> Instance | None:
        """An instance that is up."""
        found = self.instances.get(instance)
        return None if found is None or found.down else found

    def request(self, request_id: RequestId) -> Request | None:
        """A request that has not ended."""
        live = self.live.get(request_id)
        return None if live is None else live.request

    def moved(self, request_id: RequestId, source: InstanceId, target: InstanceId, kind: MoveKind) -> None:
        """A request runs on `target` from now on."""
        live = self.live[request_id]
        old, new = self.instances.get(source), self.instances[target]
        if old is not None:
            old.lives.pop(request_id, None)
            old.left(live)
            self._uncount(source, live)
        live.instance = target
        self.kernel.log(MOVE, request_id, target)
        if kind == "handoff":
            live.decode_instance = NEVER
            live.transfer_ns += self.kernel.now_ns - live.first_ns
        else:
            live.migrations += 1
            self.facts[target].count(live.request, 1)
        if kind == "recompute":
            new.changed()
        else:
            new.joined(live)

    def kept(self, request_id: RequestId, instance: InstanceId) -> None:
        """The hand-off is off: it decodes where its prompt ran."""
        live = self.live[request_id]
        facts = self.facts[instance]
        facts.promised_tokens += live.request.max_new_tokens - 1
        self._forget_decode(live)

    def held(self, request_id: RequestId, instance: InstanceId) -> None:
        """A migration took the request out of the batch."""
        self.instances[instance].left(self.live[request_id])

    def resumed(self, request_id: RequestId, instance: InstanceId) -> None:
        """A migration or hand-off was given up: it was held, and decodes on where it was."""
        self.instances[instance].joined(self.live[request_id])

    def resubmit(self, request_id: RequestId, target: InstanceId) -> None:
        """Add the request to another instance, with its known tokens and no KV."""
        live, new = self.live[request_id], self.instances[target]
        known = self.instances[live.instance].scheduler.progress(request_id).known
        new.scheduler.add(live.request, known - live.request.prompt_tokens)
        new.lives[request_id] = live

    def retarget(self, request_id: RequestId, lost: InstanceId) -> InstanceId | None:
        """Another decode instance for a request whose own was lost: the least loaded of the role."""
        others = [facts for facts in self.view.by_role("decode") if self.find(facts.id) is not None]
        if not others:
            return None
        target = min(others, key=lambda facts: (facts.outstanding, facts.id)).id
        live = self.live[request_id]
        self.facts[target].count(live.request, 1)
        if lost in self.facts:
            self.facts[lost].count(live.request, -1)
        live.decode_instance = target
        return target

    def lost(self, live: Live) -> None:
        """The KV of a request went down with its instance: ask the router again; its tokens are kept."""
        self._uncount(live.instance, live)
        if live.decode_instance >= 0:
            self._forget_decode(live)
        live.instance = NEVER
        self.route(live)

    def emit(self, event: Event) -> None:
        """Tell the controllers that listen, and do what they want."""
        if event.kind == "command" and isinstance(event.data["command"], Migrate):
            self.moving(event.data["command"].request_id)
        self.control.emit(event)

    def moving(self, request_id: RequestId) -> None:
        """Whether a migration of the request is under way has changed."""
        live = self.live.get(request_id)
        if live is not None:
            live.moving = self.migrations is not None and request_id in self.migrations

    def _uncount(self, instance: InstanceId, live: Live) -> None:
        """A request is no longer on this instance."""
        facts = self.facts[instance]
        request = live.request
        facts.outstanding -= 1
        if live.first_ns < 0:
            facts.pending_tokens -= request.prompt_tokens
        most = 1 if live.decode_instance >= 0 and live.decode_instance != instance else request.max_new_tokens
        facts.promised_tokens -= request.prompt_tokens + most

    def _forget_decode(self, live: Live) -> None:
        """It will not decode where it was to."""
        target, live.decode_instance = live.decode_instance, NEVER
        if target in self.facts:
            self.facts[target].count(live.request, -1)
        if self.handoffs is not None:
            self.handoffs.gone(live.request.id)
