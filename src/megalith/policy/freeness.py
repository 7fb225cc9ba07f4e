"""Llumnix: one figure of load, freeness, that dispatch, migration, priorities and scaling share (OSDI 2024).

Knows dated facts; must not know costs, how a migration is carried out, or true output lengths. Freeness is how many
more blocks each request of an instance could take: F = (M - sum of V) / B, with M the blocks of the instance, V the
virtual usage of a request and B the number of requests; an empty instance has infinite freeness. Virtual usage is

    running         its blocks, and its share of the headroom of its priority
    head of line    the blocks that it needs to come in; others that wait: none (dispatch counts them all)
    draining        a request that is not there, of infinite usage

Formulae after the paper's algorithm 1 and the code of the released artifact (request_scheduler.py, instance_info.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, isfinite
from typing import Literal, NamedTuple

from megalith.base.config import Config
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import (
    SHORTEST_PERIOD_S,
    Command,
    Event,
    InstanceFacts,
    InstanceId,
    Migrate,
    MigrationMode,
    RequestFacts,
    View,
)
from megalith.policy.facts import Request, RequestId
from megalith.policy.router_options import RouterOptions, require
from megalith.policy.routing import RuleRouter


def priority_headroom(instance: InstanceFacts, target_tokens: int | None) -> float:
    """Blocks that fill an instance up to its target load while a request of high priority runs there; 0 without one.

    `target_tokens`: the load at which requests of high priority are still fast (1,600 in the paper); None switches it
    off. The headroom is M - target, shared among the requests of high priority (GetHeadroom), so together it is that.
    """
    if target_tokens is None or not any(request.priority > 0 for request in instance.requests()):
        return 0.0
    return max(0.0, instance.kv_blocks - target_tokens / instance.block_tokens)


def dispatch_freeness(
    instance: InstanceFacts, priority: int = 0, target_tokens: int | None = None, watermark: float = 0.01
) -> float:
    """Freeness as a newcomer sees it: everyone who waits counts, as a request and with the blocks that it needs.

    `watermark`: share of the blocks that stays free at admission. A newcomer of high priority pays the headroom where
    it would be the first of its kind, everyone else where there is one already, as in the artifact.
    """
    reserved = instance.headroom_blocks
    if target_tokens is not None:
        taken = priority_headroom(instance, target_tokens) > 0
        if taken != (priority > 0):
            reserved += max(0.0, instance.kv_blocks - target_tokens / instance.block_tokens)
    available = instance.free_blocks() - watermark * instance.kv_blocks - reserved
    waiting = instance.waiting()
    if waiting:
        available -= instance.waiting_blocks()
    return _freeness(available, instance.running() + waiting)


def migration_freeness(
    instance: InstanceFacts, target_tokens: int | None = None, more_blocks: int = 0, more_requests: int = 0
) -> float:
    """Freeness of what runs, and of the first who waits; with `more_blocks` in `more_requests` running beside it."""
    reserved = instance.headroom_blocks + priority_headroom(instance, target_tokens) + more_blocks
    available = instance.free_blocks() - reserved
    if instance.waiting():
        available -= instance.head_blocks()
        more_requests += 1
    return _freeness(available, instance.running() + more_requests)


def _freeness(available_blocks: float, requests: int) -> float:
    if available_blocks == -inf:
        return -inf
    return available_blocks / requests if requests > 0 else inf


class FreenessOptions(RouterOptions):
    """Dispatch."""

    priority_target_tokens: int | None = None
    """Load to which requests of high priority (above 0) fill up their instance; 1,600 in the paper. None: off, and
    free of its cost, which is a look at every running request."""
    watermark: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.watermark < 1, "watermark must be at least 0 and below 1")


class FreenessRouter(RuleRouter):
    """The instance with the highest dispatch freeness; the first of equals."""

    name = "freeness"

    def __init__(self, options: FreenessOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._target = options.priority_target_tokens
        self._watermark = options.watermark

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:
        """Linear in the instances, up to the first that is empty: nothing is freer."""
        best, highest = instances[0], -inf
        for instance in instances:
            freeness = dispatch_freeness(instance, request.priority, self._target, self._watermark)
            if freeness > highest:
                if freeness == inf:
                    return instance
                best, highest = instance, freeness
        return best


class RebalanceOptions(Config):
    """Migration."""

    threshold: float = 3.0
    """T: below it an instance gives requests away, above it takes them. The artifact took 3, for 256/256 loads 10."""
    period_s: float = 0.2
    """How often sources and targets are paired. In the artifact every fourth report, of one a step, of each."""
    request: Literal["shortest", "longest", "last"] = "shortest"
    """Which one moves, among those of the lowest priority: by tokens known, or the last in rank."""
    balanced: bool = False
    """Only moves after which the gap is smaller, not turned round, and the target still above the threshold."""
    keep: bool = True
    """A source goes on with its target, one request after the other, until either leaves its condition."""
    across_pools: bool = False
    """Pair instances of different pools as well; else a request stays in its pool."""
    mode: MigrationMode = "live"
    max_stages: int = 3
    last_blocks: int = 16
    priority_target_tokens: int | None = None
    """As for the router `freeness`."""
    deadline_s: float = 60.0
    """A migration without an outcome for this long no longer keeps its instances from another one."""

    def __post_init__(self) -> None:
        require(self.period_s >= SHORTEST_PERIOD_S, f"period_s must be at least {SHORTEST_PERIOD_S}")
        require(self.deadline_s > 0 and isfinite(self.threshold), "deadline_s must be above 0 and threshold a number")
        require(self.max_stages >= 1 and self.last_blocks >= 0, "max_stages must be at least 1, last_blocks at least 0")


class _Moving(NamedTuple):
    """One migration that was asked for."""

    command: Migrate
    since_ns: int


class Rebalance:
    """Pairs instances that are short of room with those that have most, and moves one request at a time between them.

    State: the migrations under way, one for each instance at most, as their outcome comes as an event.
    """

    name = "rebalance"
    listens = frozenset({"tick", "command"})

    def __init__(self, options: RebalanceOptions, seed: int = 0) -> None:  # noqa: ARG002
        self.options = options
        self.period_ns: int | None = max(1, round(options.period_s * NS_PER_S))
        self._deadline_ns = round(options.deadline_s * NS_PER_S)
        self._moving: dict[InstanceId, _Moving] = {}
        """Under both of its ends."""
        self._moved: dict[RequestId, int] = {}
        """When requests moved that an old view may still show where they were."""

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """New pairs on a tick; the next request of a pair when one has arrived."""
        if event.kind == "command":
            return self._outcome(event, view)
        self._forget(event.at_ns, view.as_of_ns)
        return [
            self._start(source, target, request, event.at_ns) for source, target, request in self._pairs(view.instances)
        ]

    def freeness(self, instance: InstanceFacts) -> float:
        """What the threshold is compared with."""
        return migration_freeness(instance, self.options.priority_target_tokens)

    # Who with whom

    def _pairs(self, instances: Iterable[InstanceFacts]) -> list[tuple[InstanceFacts, InstanceFacts, RequestFacts]]:
        groups: dict[str, list[InstanceFacts]] = {}
        for instance in instances:
            if instance.role != "prefill" and instance.id not in self._moving:
                groups.setdefault("" if self.options.across_pools else instance.pool, []).append(instance)
        return [pair for group in groups.values() for pair in self._pairs_of(group)]

    def _pairs_of(self, group: list[InstanceFacts]) -> list[tuple[InstanceFacts, InstanceFacts, RequestFacts]]:
        freeness = {instance.id: self.freeness(instance) for instance in group}
        takers = [instance for instance in group if self._takes(instance, freeness[instance.id])]
        sources = [instance for instance in group if self._gives(instance, freeness[instance.id])]
        takers.sort(key=lambda one: (-freeness[one.id], one.id))
        sources.sort(key=lambda one: (freeness[one.id], one.id))
        # Looking at the requests of an instance is what costs: only at as many as there are takers.
        choices = ((source, request) for source in sources if (request := self._choose(source)) is not None)
        return [
            (source, target, request)
            for target, (source, request) in zip(takers, choices, strict=False)
            if not self.options.balanced or self._evens_out(source, target, request)
        ]

    def _gives(self, instance: InstanceFacts, freeness: float) -> bool:
        return freeness < self.options.threshold or instance.preempted() > 0

    def _takes(self, instance: InstanceFacts, freeness: float) -> bool:
        return instance.accepting and freeness > self.options.threshold and instance.preempted() == 0

    def _evens_out(self, source: InstanceFacts, target: InstanceFacts, request: RequestFacts) -> bool:
        """Whether the move leaves the target above the threshold and the gap smaller, but not turned round."""
        headroom = self.options.priority_target_tokens
        target_after = migration_freeness(target, headroom, request.blocks, 1)
        if target_after < self.options.threshold:
            return False
        before, empty = self.freeness(source), self.freeness(target)
        if empty == inf or before == -inf:
            return True
        return 0 < target_after - migration_freeness(source, headroom, -request.blocks, -1) < empty - before

    def _choose(self, instance: InstanceFacts) -> RequestFacts | None:
        """The lowest priority first: normal requests make room for those of high priority."""
        movable = [
            request
            for request in instance.requests()
            if request.decoding and not request.moving and request.id not in self._moved
        ]
        if not movable:
            return None
        lowest = min(request.priority for request in movable)
        movable = [request for request in movable if request.priority == lowest]
        if self.options.request == "last":
            return movable[-1]
        sign = 1 if self.options.request == "shortest" else -1
        return min(movable, key=lambda request: (sign * request.known_tokens, request.id))

    # Under way

    def _start(self, source: InstanceFacts, target: InstanceFacts, request: RequestFacts, at_ns: int) -> Migrate:
        options = self.options
        command = Migrate(request.id, source.id, target.id, options.mode, options.max_stages, options.last_blocks)
        self._moving[source.id] = self._moving[target.id] = _Moving(command, at_ns)
        return command

    def _outcome(self, event: Event, view: View) -> Iterable[Command]:
        command = event.data["command"]
        if not isinstance(command, Migrate):
            return ()
        ours = False
        for end in (command.source, command.target):
            moving = self._moving.get(end)
            if moving is not None and moving.command == command:
                del self._moving[end]
                ours = True
        if not ours or event.data["outcome"] != "done":
            return ()
        self._moved[command.request_id] = event.at_ns
        self._forget(event.at_ns, view.as_of_ns)
        if not self.options.keep:
            return ()
        try:
            ends = [view.by_id(command.source), view.by_id(command.target)]
        except KeyError:
            return ()
        # Only this pair, in this direction; whoever else is in need waits for the tick.
        pairs = self._pairs(ends)
        return [self._start(*pair, event.at_ns) for pair in pairs if pair[0].id == command.source]

    def _forget(self, now_ns: int, as_of_ns: int) -> None:
        """Migrations that were never heard of again, and moves that the view shows by now."""
        for end in [end for end, moving in self._moving.items() if now_ns - moving.since_ns > self._deadline_ns]:
            del self._moving[end]
        for request_id in [request_id for request_id, at_ns in self._moved.items() if at_ns <= as_of_ns]:
            del self._moved[request_id]
