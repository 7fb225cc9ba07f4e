"""Moving a running request from one instance to another, in stages that can be abandoned at any time.

Knows two schedulers, the network and bytes; must not know which request to move where. After Llumnix (Sun et al., OSDI
2024, section 4.2), whose downtime does not depend on the length of the request:

    stage 0    the target reserves blocks; all complete blocks are copied while the source decodes
    stage k    the blocks that were completed during stage k - 1 are copied
    last       when at most `last_blocks` are left, or the stages are used up: the request leaves the batch of the
               source, the rest is copied, the target commits, the source frees

`blocking` has only the last stage. `recompute` copies nothing: the request leaves, and its known tokens are computed
again. Until the commit the source has everything, so whatever goes wrong (the request ends or is preempted, the target
refuses or dies), the request stays or goes on there; if the source dies, what the target reserved is given back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megalith.base.errors import CapacityError, PromptTooLong, RequestError
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Command, Event, InstanceId, Migrate
from megalith.policy.facts import Request, RequestId
from megalith.sim.network import Transfer
from megalith.sim.parties import Host, MoveKind, Party
from megalith.sim.transfer import Handoffs
from megalith.specs.fleet import MigrationSpec


@dataclass(slots=True)
class MigrationCounters:
    """What happened since the start. Only ever rises."""

    done: int = 0
    refused: int = 0
    """Never began."""
    aborted: int = 0
    stages: int = 0
    num_bytes: int = 0
    """Bytes of KV that were copied, also for migrations that were aborted later."""
    downtime_ns: int = 0
    """From leaving the batch of the source to the commit at the target, added up; nothing of it for `recompute`."""
    longest_downtime_ns: int = 0


class _Migration:
    """One request under way."""

    __slots__ = ("command", "copied_blocks", "ended", "held_ns", "request", "reserved", "stages", "transfer")

    def __init__(self, command: Migrate, request: Request) -> None:
        self.command = command
        self.request = request
        self.stages = 0
        """Stages that began."""
        self.copied_blocks = 0
        self.reserved = False
        self.held_ns: int | None = None
        """When it left the batch of the source; None while it decodes there."""
        self.transfer: Transfer | None = None
        self.ended = False


class Migrations:
    """All migrations of a cluster. Calls are O(1), but for `down`, which is O(migrations)."""

    def __init__(
        self,
        host: Host,
        handoffs: Handoffs,
        spec: MigrationSpec,
        slow: Callable[[InstanceId, float], object] | None = None,
    ) -> None:
        """Bytes and network are those of `handoffs`, whose requests are on their way already and are refused.

        `slow(instance, factor)`: its steps take `factor` times as long from now on; needed for `spec.slowdown`.
        """
        if spec.slowdown != 1.0 and slow is None:
            raise ValueError("a slow-down needs somebody who can slow an instance down")
        self._host = host
        self._handoffs = handoffs
        self._network = handoffs.network
        self._kv = handoffs.kv
        self._spec = spec
        self._slow = slow if spec.slowdown != 1.0 else None
        self._stage_ns = round(spec.stage_s * NS_PER_S)
        self._live: dict[RequestId, _Migration] = {}
        self._busy: Counter[InstanceId] = Counter()
        self.counters = MigrationCounters()

    def __contains__(self, request_id: RequestId) -> bool:
        """Whether a migration of the request is under way."""
        return request_id in self._live

    def __len__(self) -> int:
        return len(self._live)

    def busy(self, instance: InstanceId) -> bool:
        """Whether the instance takes part in one, as source or target."""
        return instance in self._busy

    # What the cluster tells

    def carry_out(self, command: Command) -> str | None:
        """Begin a Migrate. Returns why it is refused; how it ends otherwise comes as an event of the kind `command`."""
        if not isinstance(command, Migrate):
            raise TypeError(f"{command} is no migration")
        refused = self._start(command)
        self.counters.refused += refused is not None
        return refused

    def _start(self, command: Migrate) -> str | None:
        source, target = self._host.find(command.source), self._host.find(command.target)
        request = self._host.request(command.request_id)
        if source is None or target is None:
            return "an instance is down or gone"
        if request is None:
            return "the request has ended"
        reason = self._objection(command, source, target)
        if reason:
            return reason
        migration = _Migration(command, request)
        if command.mode != "recompute":
            computed = source.scheduler.progress(request.id).computed
            if not self._make_room(migration, computed + 1):
                return "the target has no room"
        self._begin(migration)
        if command.mode == "live":
            self._next_stage(migration)
        else:
            last = self._drop if command.mode == "blocking" else self._recompute
            source.at_boundary(lambda: last(migration))
        return None

    def gone(self, request_id: RequestId) -> None:
        """The request finished or was taken away; call it before its blocks are freed, if it was taken away."""
        migration = self._live.get(request_id)
        if migration is not None:
            self._abort(migration, "the request ended")

    def preempted(self, request_id: RequestId) -> None:
        """The source took the request's blocks. A `recompute` goes on all the same."""
        migration = self._live.get(request_id)
        if migration is not None and migration.command.mode != "recompute":
            self._abort(migration, "the request was preempted")

    def down(self, instance: InstanceId) -> None:
        """The instance died, and find() does not know it any more."""
        for migration in list(self._live.values()):
            if instance == migration.command.source:
                self._abort(migration, "the source died")
            elif instance == migration.command.target:
                self._abort(migration, "the target died")

    # Begin

    def _objection(self, command: Migrate, source: Party, target: Party) -> str:
        """Why the command cannot begin; empty when it can."""
        request_id = command.request_id
        if command.source == command.target:
            return "source and target are the same"
        if request_id in self._live or request_id in self._handoffs:
            return "the request is on its way already"
        if max(self._busy[command.source], self._busy[command.target]) >= self._spec.at_once:
            return "an instance takes part in another migration"
        if not target.facts.accepting:
            return "the target accepts no requests"
        source.interrupt(self._host.kernel.now_ns)
        try:
            computed, known, _ = source.scheduler.progress(request_id)
        except KeyError:
            return "the request is not on the source"
        if command.mode == "recompute":
            return ""
        on_device = request_id in source.scheduler.kv.requests_on_device
        return "" if on_device and known - computed == 1 else "the request does not decode"

    def _begin(self, migration: _Migration) -> None:
        self._live[migration.request.id] = migration
        for instance in (migration.command.source, migration.command.target):
            self._busy[instance] += 1
            if self._slow is not None and self._busy[instance] == 1:
                self._slow(instance, self._spec.slowdown)

    def _make_room(self, migration: _Migration, known_tokens: int) -> bool:
        """Reserve blocks at the target, or more of them."""
        target = self._host.find(migration.command.target)
        if target is None:
            return False
        now_ns = self._host.kernel.now_ns
        target.interrupt(now_ns)
        if migration.reserved:
            room = target.scheduler.extend(migration.request.id, known_tokens)
        else:
            try:
                room = migration.reserved = target.scheduler.reserve(migration.request, known_tokens)
            except PromptTooLong:
                room = False
        target.wake(now_ns)
        return room

    # Stages

    def _next_stage(self, migration: _Migration) -> None:
        """The source still decodes: copy what is complete, or leave the batch when little is left."""
        command = migration.command
        source = self._host.find(command.source)
        if source is None:
            return
        source.interrupt(self._host.kernel.now_ns)
        kv = source.scheduler.kv
        computed = source.scheduler.progress(command.request_id).computed
        left = kv.blocks_for(computed) - migration.copied_blocks
        if left <= command.last_blocks or migration.stages + 1 >= command.max_stages:
            source.at_boundary(lambda: self._drop(migration))
        elif self._make_room(migration, computed + 1):
            blocks = computed // kv.block_tokens - migration.copied_blocks
            self._copy(migration, blocks, self._kv.size(blocks * kv.block_tokens, 1))
        else:
            self._abort(migration, "the target has no room")

    def _drop(self, migration: _Migration) -> None:
        """The last stage, between two steps of the source: the request leaves its batch and keeps its blocks."""
        source = self._host.find(migration.command.source)
        if migration.ended or source is None:
            return
        request_id, kv = migration.request.id, source.scheduler.kv
        computed, known, _ = source.scheduler.progress(request_id)
        source.scheduler.hold(request_id)
        self._host.held(request_id, source.id)
        migration.held_ns = self._host.kernel.now_ns
        if self._make_room(migration, known):
            block_tokens = kv.block_tokens if self._spec.whole_blocks else 1
            copied_bytes = self._kv.size(migration.copied_blocks * kv.block_tokens, 1)
            self._copy(migration, 0, self._kv.size(computed, block_tokens) - copied_bytes)
        else:
            self._abort(migration, "the target has no room")

    def _copy(self, migration: _Migration, blocks: int, num_bytes: int) -> None:
        migration.stages += 1
        self.counters.stages += 1
        now_ns = self._host.kernel.now_ns
        self._host.kernel.at(now_ns + self._stage_ns, self._send, (migration, blocks, num_bytes))

    def _send(self, event: tuple[_Migration, int, int]) -> None:
        migration, blocks, num_bytes = event
        if migration.ended:
            return
        command = migration.command

        def copied(_transfer: Transfer) -> None:
            migration.transfer = None
            migration.copied_blocks += blocks
            self.counters.num_bytes += num_bytes
            if migration.held_ns is None:
                self._next_stage(migration)
            else:
                self._commit(migration, migration.held_ns)

        migration.transfer = self._network.send(command.source, command.target, num_bytes, copied)

    # End

    def _commit(self, migration: _Migration, held_ns: int) -> None:
        request_id, command, now_ns = migration.request.id, migration.command, self._host.kernel.now_ns
        source, target = self._host.find(command.source), self._host.find(command.target)
        if source is None or target is None:
            raise RuntimeError(f"the KV of request {request_id} arrived, but source or target is down")
        source.interrupt(now_ns)
        target.interrupt(now_ns)
        target.scheduler.commit(request_id)
        source.scheduler.depart(request_id)
        downtime_ns = now_ns - held_ns
        self.counters.downtime_ns += downtime_ns
        self.counters.longest_downtime_ns = max(self.counters.longest_downtime_ns, downtime_ns)
        self._moved(migration, "migration", downtime_ns)

    def _recompute(self, migration: _Migration) -> None:
        command = migration.command
        source, target = self._host.find(command.source), self._host.find(command.target)
        if migration.ended or source is None or target is None:
            return
        try:
            self._host.resubmit(command.request_id, command.target)
        except (CapacityError, RequestError) as error:
            self._abort(migration, f"the target refused: {error.what}")
            return
        source.scheduler.depart(command.request_id)
        self._moved(migration, "recompute", None)

    def _moved(self, migration: _Migration, kind: MoveKind, downtime_ns: int | None) -> None:
        command, now_ns = migration.command, self._host.kernel.now_ns
        self._end(migration)
        self.counters.done += 1
        self._host.moved(command.request_id, command.source, command.target, kind)
        for instance in (command.target, command.source):
            party = self._host.find(instance)
            if party is not None:
                party.wake(now_ns)
            self._handoffs.room(instance)
        self._tell(command, "done", "", downtime_ns=downtime_ns, stages=migration.stages)

    def _abort(self, migration: _Migration, reason: str) -> None:
        """Leave the request where it is, if it still is there, and give back what the target reserved."""
        command, now_ns = migration.command, self._host.kernel.now_ns
        self._end(migration)
        if migration.transfer is not None:
            self.counters.num_bytes += self._network.cancel(migration.transfer)
        target, source = self._host.find(command.target), self._host.find(command.source)
        if migration.reserved and target is not None:
            target.interrupt(now_ns)
            target.scheduler.abort(command.request_id)
            target.wake(now_ns)
            self._handoffs.room(command.target)
        if migration.held_ns is not None and source is not None:
            source.interrupt(now_ns)
            source.scheduler.commit(command.request_id)
            self._host.resumed(command.request_id, command.source)
            source.wake(now_ns)
        self.counters.aborted += 1
        self._tell(command, "aborted", reason, stages=migration.stages)

    def _end(self, migration: _Migration) -> None:
        migration.ended = True
        del self._live[migration.request.id]
        for instance in (migration.command.source, migration.command.target):
            self._busy[instance] -= 1
            if not self._busy[instance]:
                del self._busy[instance]
                if self._slow is not None and self._host.find(instance) is not None:
                    self._slow(instance, 1.0)

    def _tell(self, command: Migrate, outcome: str, reason: str, **more: int | None) -> None:
        data = {"command": command, "outcome": outcome, "reason": reason, **more}
        self._host.emit(Event("command", self._host.kernel.now_ns, command.request_id, data))
