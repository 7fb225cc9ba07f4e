"""Starting instances and taking them away, and what they cost in hours.

Knows pools and counts; must not know why somebody wants more or fewer. A new instance is paid for at once and serves
after `start_s` (machine, weights, warm-up). One that is to go accepts nothing more and is switched off when it has
nothing left: first whoever a controller drains already, then one that still starts, then the one with the fewest
requests. `done` is told when the last of a command serves, or is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Command, Event, InstanceFacts, InstanceId, Scale
from megalith.sim.kernel import Kernel
from megalith.specs.fleet import PoolSpec

NS_PER_H = 3600 * NS_PER_S


class ScalingHost(Protocol):
    """The cluster around pools that grow and shrink."""

    @property
    def kernel(self) -> Kernel:
        """Time."""
        ...

    def going_on(self) -> bool:
        """Whether requests are live or to come."""
        ...

    def facts_of(self, pool: str) -> Sequence[InstanceFacts]:
        """All instances of a pool that exist, ascending, exact now."""
        ...

    def switch_on(self, pool: str) -> InstanceId:
        """One more instance of the pool exists, and accepts nothing yet."""
        ...

    def set_accepting(self, instance: InstanceId, accepting: bool) -> None:
        """Requests may, or may not, be routed to it from now on; one that is down accepts when it is back."""
        ...

    def unused(self, instance: InstanceId) -> bool:
        """No request is there, on its way there or about to leave."""
        ...

    def switch_off(self, instance: InstanceId) -> None:
        """It is gone; nothing was left on it."""
        ...

    def emit(self, event: Event) -> None:
        """Tell the controllers that listen."""
        ...


@dataclass(slots=True)
class ScalingCounters:
    """What happened since the start. Only ever rises."""

    started: int = 0
    stopped: int = 0
    called_off: int = 0
    """Starts that were stopped before they served."""
    refused: int = 0


@dataclass(slots=True)
class _Order:
    """A command under way."""

    command: Scale
    left: int


class Scaling:
    """Carries out Scale commands."""

    def __init__(self, host: ScalingHost, pools: Mapping[str, PoolSpec]) -> None:
        self._host = host
        self._pools = pools
        self._since_ns: dict[InstanceId, tuple[str, int]] = {}
        """Pool and switching on of all that exist."""
        self._spent_ns: Counter[str] = Counter()
        """Time of those that are gone, by pool."""
        self._starting: dict[InstanceId, _Order] = {}
        self._stopping: dict[InstanceId, _Order] = {}
        self._watching = False
        self.counters = ScalingCounters()

    # What the cluster tells

    def exists(self, instance: InstanceId, pool: str) -> None:
        """An instance that was there from the start: it is paid for from now on."""
        self._since_ns[instance] = (pool, self._host.kernel.now_ns)

    def carry_out(self, command: Command) -> str | None:
        """Begin a Scale. Returns why it is refused; the end comes as an event of the kind `command`."""
        if not isinstance(command, Scale):
            raise TypeError(f"{command} does not scale")
        if command.pool not in self._pools:
            refused: str | None = f"there is no pool {command.pool!r}: {', '.join(sorted(self._pools))}"
        elif command.delta > 0:
            refused = self._grow(command)
        elif command.delta < 0:
            refused = self._shrink(command)
        else:
            refused = "a change by 0 is none"
        self.counters.refused += refused is not None
        return refused

    def emptied(self, instance: InstanceId) -> None:
        """A request left the instance, or it failed; costs nothing unless it is to go. Not needed to be exact."""
        if instance in self._stopping and self._host.unused(instance):
            self._gone(instance)

    # Reading

    def starting(self, pool: str) -> int:
        """Instances of a pool that exist and do not serve yet."""
        return sum(1 for order in self._starting.values() if order.command.pool == pool)

    def is_starting(self, instance: InstanceId) -> bool:
        """Whether it exists and does not serve yet."""
        return instance in self._starting

    def is_stopping(self, instance: InstanceId) -> bool:
        """Whether it is to go when it has nothing left."""
        return instance in self._stopping

    def instance_hours(self, pool: str | None = None, until_ns: int | None = None) -> float:
        """Hours of instances that were paid for up to now, or to an earlier time after which none was started:
        starting, draining and failed ones too."""
        now_ns = self._host.kernel.now_ns if until_ns is None else until_ns
        spent = sum(ns for name, ns in self._spent_ns.items() if pool in (None, name))
        running = sum(max(0, now_ns - since_ns) for name, since_ns in self._since_ns.values() if pool in (None, name))
        return (spent + running) / NS_PER_H

    def device_hours(self) -> float:
        """The same for devices."""
        return sum(
            self.instance_hours(name) * spec.tensor_parallel * spec.pipeline_parallel
            for name, spec in self._pools.items()
        )

    # Up

    def _grow(self, command: Scale) -> str | None:
        spec = self._pools[command.pool]
        most = spec.count if spec.max_count is None else spec.max_count
        stopping = [instance for instance, order in self._stopping.items() if order.command.pool == command.pool]
        serving = len(self._host.facts_of(command.pool)) - len(stopping)
        more = min(command.delta, most - serving)
        if more <= 0:
            return f"pool {command.pool} has {serving} of at most {most} instances"
        order = _Order(command, more)
        called_back = stopping[::-1][:more]
        for instance in called_back:
            self._one_less(self._stopping.pop(instance), "aborted", "more are needed again")
            self._host.set_accepting(instance, True)
            order.left -= 1
        for _ in range(more - len(called_back)):
            instance = self._host.switch_on(command.pool)
            self.exists(instance, command.pool)
            self._starting[instance] = order
            self._host.kernel.at(self._host.kernel.now_ns + round(spec.start_s * NS_PER_S), self._serve, instance)
        if not order.left:
            self._tell(order, "done")
        return None

    def _serve(self, instance: InstanceId) -> None:
        order = self._starting.pop(instance, None)
        if order is None:
            return  # called off
        self.counters.started += 1
        self._host.set_accepting(instance, True)
        self._host.emit(Event("up", self._host.kernel.now_ns, instance))
        self._one_less(order, "done")

    # Down

    def _shrink(self, command: Scale) -> str | None:
        candidates = [facts for facts in self._host.facts_of(command.pool) if facts.id not in self._stopping]
        fewer = min(-command.delta, len(candidates) - 1)
        if fewer <= 0:
            return f"the last instance of pool {command.pool} stays"
        order = _Order(command, fewer)
        victims = sorted(candidates, key=self._rank)[:fewer]
        for facts in victims:
            self._host.set_accepting(facts.id, False)
            started = self._starting.pop(facts.id, None)
            if started is not None:
                self.counters.called_off += 1
                self._one_less(started, "aborted", "it was stopped before it served")
            self._stopping[facts.id] = order
        for facts in victims:
            self.emptied(facts.id)
        self._watch()
        return None

    def _rank(self, facts: InstanceFacts) -> tuple[int, int, int]:
        if facts.headroom_blocks == inf:
            return (0, facts.outstanding, -facts.id)
        return (1 if facts.id in self._starting else 2, facts.outstanding, -facts.id)

    def _gone(self, instance: InstanceId) -> None:
        order = self._stopping.pop(instance)
        pool, since_ns = self._since_ns.pop(instance)
        self._spent_ns[pool] += self._host.kernel.now_ns - since_ns
        self.counters.stopped += 1
        self._host.switch_off(instance)
        self._host.emit(Event("down", self._host.kernel.now_ns, instance))
        self._one_less(order, "done")

    def _watch(self) -> None:
        """Whoever is to go and was not seen to be empty is found so within a second."""
        if self._stopping and not self._watching:
            self._watching = True
            self._host.kernel.at(self._host.kernel.now_ns + NS_PER_S, self._look)

    def _look(self, _: None) -> None:
        self._watching = False
        for instance in list(self._stopping):
            self.emptied(instance)
        if self._host.going_on():
            self._watch()

    def _one_less(self, order: _Order, outcome: str, reason: str = "") -> None:
        """One instance of a command is settled; the last one says how it ended."""
        order.left -= 1
        if not order.left:
            self._tell(order, outcome, reason)

    def _tell(self, order: _Order, outcome: str, reason: str = "") -> None:
        data = {"command": order.command, "outcome": outcome, "reason": reason}
        self._host.emit(Event("command", self._host.kernel.now_ns, data=data))
