"""Failures, repairs and stragglers, drawn from the seed or given by time.

Knows instances by number and time; must not know what runs on them. An instance that fails loses its KV: moves that
touch it are given up, its requests keep the tokens that they have and ask the router again.

What is due later is kept here and looked at once a second at most, so that a failure after the end of the load does
not keep the clock running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64, uniform
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Event, InstanceId
from megalith.policy.facts import RequestId
from megalith.sim.kernel import Kernel
from megalith.specs.draws import exponentials
from megalith.specs.fleet import FaultSpec

NS_PER_H = 3600 * NS_PER_S
_LIFE, _VICTIM, _STRAGGLER = 1, 2, 3
"""Streams of the seed."""


class FaultHost(Protocol):
    """The cluster around instances that fail."""

    @property
    def kernel(self) -> Kernel:
        """Time."""
        ...

    def going_on(self) -> bool:
        """Whether requests are live or to come: without any, nothing fails any more."""
        ...

    def up(self) -> Sequence[InstanceId]:
        """Instances that are up, ascending; those that still start are not."""
        ...

    def fail(self, instance: InstanceId) -> Sequence[RequestId]:
        """The instance stops in the middle of its step, accepts nothing, and find() does not know it any more.

        Returns the requests that were there, ascending. The moves that touch it are given up by the caller.
        """
        ...

    def requeue(self, request_id: RequestId) -> None:
        """A request lost its KV: ask the router again; the tokens that it has are kept and computed again."""
        ...

    def restore(self, instance: InstanceId) -> bool:
        """It is up again, with an empty KV cache. False when it is gone."""
        ...

    def emit(self, event: Event) -> None:
        """Tell the controllers that listen."""
        ...


class Moves(Protocol):
    """Whatever moves KV between instances."""

    def down(self, instance: InstanceId) -> None:
        """The instance died; what has to do with it is given up."""
        ...


@dataclass(slots=True)
class FaultCounters:
    """What happened since the start. Only ever rises."""

    failures: int = 0
    repairs: int = 0
    requeued: int = 0
    """Requests that lost their KV to a failure; one counts each time."""
    down_ns: int = 0
    """Time of instances between failure and repair, of repairs that were made."""
    stragglers: int = 0


class Faults:
    """Injects what a FaultSpec says. `slow(instance, factor)` makes a straggler."""

    def __init__(
        self,
        host: FaultHost,
        moves: Sequence[Moves] | None,
        spec: FaultSpec,
        seed: int,
        slow: Callable[[InstanceId, float], object] | None = None,
    ) -> None:
        if (
            not 0.0 <= spec.straggler_share <= 1.0
            or spec.repair_s < 0
            or (spec.mtbf_h is not None and spec.mtbf_h <= 0)
        ):
            raise ConfigError(
                f"A share of {spec.straggler_share:g} stragglers, {spec.repair_s:g} s to repair and {spec.mtbf_h} h "
                "between failures cannot be.",
                "Use a share from 0 to 1, times of at least 0, and more than 0 h.",
            )
        if spec.straggler_share > 0.0 and spec.straggler_factor != 1.0 and slow is None:
            raise ValueError("stragglers need somebody who can slow an instance down")
        self._host = host
        self.moves: list[Moves] = list(moves or ())
        """Told when an instance has failed, before its requests are routed again."""
        self._spec = spec
        self._streams = {name: splitmix64(seed, name) for name in (_LIFE, _VICTIM, _STRAGGLER)}
        self._slow = slow
        self._lives: dict[InstanceId, int] = {}
        """How many lives of an instance have been drawn."""
        self._strikes = 0
        self._due: list[tuple[int, int, Callable[[InstanceId, int], None], InstanceId, int]] = []
        """(when, order, what, instance, number of its life)."""
        self._order = 0
        self._watch_ns: int | None = None
        """When the next look is due."""
        self._failed_ns: dict[InstanceId, int] = {}
        self.before_failure: Callable[[InstanceId], object] | None = None
        """Told just before an instance fails, such as its power meter."""
        self.after_repair: Callable[[InstanceId], object] | None = None
        self.counters = FaultCounters()

    # What the cluster tells

    def start(self) -> None:
        """Draw the fate of all instances that are up, and put the failures by time on the list."""
        for at_s in self._spec.at_s:
            self._put(round(at_s * NS_PER_S), self._strike)
        for instance in self._host.up():
            self.serves(instance)

    def serves(self, instance: InstanceId) -> None:
        """An instance serves from now on, for the first time."""
        share, factor = self._spec.straggler_share, self._spec.straggler_factor
        if factor != 1.0 and self._slow is not None and uniform(self._streams[_STRAGGLER], instance) < share:
            self.counters.stragglers += 1
            self._slow(instance, factor)
        self._live(instance)

    def fail(self, instance: InstanceId) -> None:
        """An instance that is up fails now."""
        now_ns = self._host.kernel.now_ns
        if self.before_failure is not None:
            self.before_failure(instance)
        lost = self._host.fail(instance)
        self.counters.failures += 1
        self._failed_ns[instance] = now_ns
        self._put(now_ns + round(self._spec.repair_s * NS_PER_S), self._repair, instance)
        for moves in self.moves:
            moves.down(instance)
        for request_id in lost:
            self.counters.requeued += 1
            self._host.requeue(request_id)
        self._host.emit(Event("down", now_ns, instance))

    # Inside

    def _live(self, instance: InstanceId) -> None:
        """Draw how long it will be up this time."""
        if self._spec.mtbf_h is not None:
            number = self._lives[instance] = self._lives.get(instance, 0) + 1
            draw = float(exponentials(splitmix64(self._streams[_LIFE], instance), number, 1)[0])
            until_ns = self._host.kernel.now_ns + max(1, round(draw * self._spec.mtbf_h * NS_PER_H))
            self._put(until_ns, self._wear_out, instance, number)

    def _wear_out(self, instance: InstanceId, number: int) -> None:
        """The end of a life, unless something else ended it."""
        if number == self._lives[instance] and instance in self._host.up():
            self.fail(instance)

    def _strike(self, _instance: InstanceId, _number: int) -> None:
        """A failure at a given time hits one that is up."""
        up = self._host.up()
        if up:
            self._strikes += 1
            self.fail(up[splitmix64(self._streams[_VICTIM], self._strikes) % len(up)])

    def _repair(self, instance: InstanceId, _number: int) -> None:
        failed_ns = self._failed_ns.pop(instance)
        if not self._host.restore(instance):
            return
        now_ns = self._host.kernel.now_ns
        self.counters.repairs += 1
        self.counters.down_ns += now_ns - failed_ns
        if self.after_repair is not None:
            self.after_repair(instance)
        self._live(instance)
        self._host.emit(Event("up", now_ns, instance))

    def _put(
        self, at_ns: int, call: Callable[[InstanceId, int], None], instance: InstanceId = -1, number: int = 0
    ) -> None:
        self._order += 1
        heappush(self._due, (at_ns, self._order, call, instance, number))
        self._watch()

    def _watch(self) -> None:
        """Look again when the first on the list is due, in a second at the latest."""
        if not self._due:
            return
        now_ns = self._host.kernel.now_ns
        look_ns = max(now_ns, min(self._due[0][0], now_ns + NS_PER_S))
        if self._watch_ns is None or look_ns < self._watch_ns:
            self._watch_ns = look_ns
            self._host.kernel.at(look_ns, self._look, look_ns)

    def _look(self, look_ns: int) -> None:
        if look_ns != self._watch_ns:
            return  # an earlier look took its place
        self._watch_ns = None
        while self._due and self._due[0][0] <= look_ns and self._host.going_on():
            _, _, call, instance, number = heappop(self._due)
            call(instance, number)
        if self._host.going_on():
            self._watch()
