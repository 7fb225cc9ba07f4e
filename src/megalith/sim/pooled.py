"""KV of one request on several instances: blocks lent, copied, given back, whatever happens to either side.

Knows two schedulers, the network and bytes; must not know which blocks to move where. After Infinite-LLM
(arXiv:2401.02669, section 4), whose view of the cluster may be old because nothing is taken that was not reserved:

    of a request that decodes   the target reserves; the blocks are copied while it decodes on; between two steps of the
                                source they are given up there, and read over the network from then on
    of a request that waits     the target reserves, and the request needs so many blocks fewer to come in; what is
                                reserved for one that does not come in within `hold_s` is given back

Blocks go back when the request gives up its own: when it ends, is preempted or moves. When a holder fails, requests
with KV there wait again and are computed afresh; when the owner fails, all that others hold of its requests is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Command, InstanceId, Migrate, MoveKv
from megalith.policy.facts import RequestId
from megalith.sim.network import Transfer
from megalith.sim.parties import Executor
from megalith.sim.pooled_instance import PooledInstance
from megalith.sim.pooled_steps import CoupledSteps, Span, StepCounters

if TYPE_CHECKING:
    from megalith.sim.cluster import Cluster


@dataclass(slots=True)
class PooledCounters:
    """What happened since the start. Only ever rises, but for `lent_blocks`."""

    moved: int = 0
    """Moves of running requests that were done, with"""
    moved_blocks: int = 0
    moved_bytes: int = 0
    """also of moves that were aborted later."""
    placed: int = 0
    """Reservations for requests that waited, with"""
    placed_blocks: int = 0
    lapsed: int = 0
    """Reservations that were given back because the request did not come in."""
    refused: int = 0
    aborted: int = 0
    recomputed: int = 0
    """Requests that lost KV with a holder that failed."""
    lent_blocks: int = 0
    """Lent now,"""
    most_lent_blocks: int = 0
    """and at most."""
    steps: StepCounters = field(default_factory=StepCounters)


class _Move(NamedTuple):
    """Blocks on their way."""

    command: MoveKv
    transfer: Transfer


class Pooled:
    """All KV that is not where its request runs. Calls are O(requests with KV elsewhere) at most."""

    def __init__(self, cluster: Cluster, steps: CoupledSteps, hold_s: float) -> None:
        self._cluster = cluster
        self._steps = steps
        self._spans = steps.spans
        self._moves: dict[RequestId, _Move] = {}
        self._hold_ns = max(1, round(hold_s * NS_PER_S))
        self.counters = PooledCounters(steps=steps.counters)

    def __contains__(self, request_id: RequestId) -> bool:
        """Whether another instance has or gets KV of this request."""
        return request_id in self._moves or any(request_id in spans for spans in self._spans.values())

    def spans(self, owner: InstanceId) -> Mapping[RequestId, list[Span]]:
        """Where KV of the requests of an instance is elsewhere."""
        return self._spans.get(owner, {})

    # What the cluster tells

    def carry_out(self, command: Command) -> str | None:
        """Begin a MoveKv. Returns why it is refused; how it ends otherwise comes as an event of the kind `command`."""
        if not isinstance(command, MoveKv):
            raise TypeError(f"{command} moves no KV")
        refused = self._start(command)
        self.counters.refused += refused is not None
        return refused

    def down(self, instance: InstanceId) -> None:
        """The instance died, and find() does not know it any more; its scheduler is a new one already."""
        for move in list(self._moves.values()):
            if move.command.source == instance:
                self._abort(move.command.request_id, "the source died")
            elif move.command.target == instance:
                self._abort(move.command.request_id, "the target died", reclaim=False)
        for request_id in list(self._spans.get(instance, ())):
            self._give_back(instance, request_id)
        self._steps.forget(instance)
        self._couple(instance)
        for owner, requests in list(self._spans.items()):
            for request_id, spans in list(requests.items()):
                if any(span.holder == instance for span in spans):
                    self._lose(owner, request_id, instance)

    # Begin

    def _start(self, command: MoveKv) -> str | None:
        cluster, now_ns = self._cluster, self._cluster.kernel.now_ns
        if cluster.find(command.source) is None or cluster.find(command.target) is None:
            return "an instance is down or gone"
        source, target = self._instance(command.source), self._instance(command.target)
        live = cluster.live.get(command.request_id)
        if live is None or command.request_id not in source.lives:
            return "the request is not on the source"
        if command.source == command.target or command.blocks < 1:
            return "there is nothing to move"
        if live.moving or command.request_id in self._moves:
            return "the request is on its way already"
        if not target.facts.accepting:
            return "the target accepts nothing"
        source.interrupt(now_ns)
        waits = source.memory.waits(command.request_id)
        if not waits and source.memory.movable(command.request_id) < command.blocks:
            return "the request has not so many complete blocks there, or does not decode"
        target.interrupt(now_ns)
        if not target.memory.lend(command.blocks):
            return "the target has no room to lend"
        if waits and not source.memory.place(command.request_id, command.blocks):
            target.memory.reclaim(command.blocks)
            return "the request needs no more blocks elsewhere"
        self._lent(command.blocks)
        source.memory.memory.on_release = partial(self._released, command.source)
        if waits:
            self._place(command)
        else:
            self._copy(command)
        return None

    def _place(self, command: MoveKv) -> None:
        cluster = self._cluster
        self._add(command)
        self.counters.placed += 1
        self.counters.placed_blocks += command.blocks
        cluster.kernel.at(cluster.kernel.now_ns + self._hold_ns, self._lapse, (command.source, command.request_id))
        self._instance(command.source).wake(cluster.kernel.now_ns)
        cluster.control.over(command, "done")

    def _copy(self, command: MoveKv) -> None:
        steps = self._steps
        num_bytes = command.blocks * steps.block_tokens * steps.shape.token_bytes

        def copied(_transfer: Transfer) -> None:
            self.counters.moved_bytes += num_bytes
            self._instance(command.source).at_boundary(lambda: self._commit(command))

        transfer = steps.network.send(command.source, command.target, num_bytes, copied)
        self._moves[command.request_id] = _Move(command, transfer)

    # End

    def _commit(self, command: MoveKv) -> None:
        """The copy is there, between two steps of the source: from the next one on it is read there."""
        move = self._moves.get(command.request_id)
        if move is None or move.command is not command:
            return
        source = self._instance(command.source)
        if not source.memory.send_away(command.request_id, command.blocks):
            self._abort(command.request_id, "the request does not decode any more")
            return
        del self._moves[command.request_id]
        self._add(command)
        self.counters.moved += 1
        self.counters.moved_blocks += command.blocks
        source.wake(self._cluster.kernel.now_ns)
        self._cluster.control.over(command, "done")

    def _abort(self, request_id: RequestId, reason: str, reclaim: bool = True) -> None:
        """What was on its way is not needed any more, or nobody is there to take it."""
        command, transfer = self._moves.pop(request_id)
        if transfer.live:
            self.counters.moved_bytes += self._steps.network.cancel(transfer)
        if reclaim:
            self._reclaim(Span(command.target, command.blocks))
        else:
            self.counters.lent_blocks -= command.blocks
        self.counters.aborted += 1
        self._cluster.control.over(command, "aborted", reason)

    def _released(self, owner: InstanceId, request_id: RequestId) -> None:
        """The request gave up its blocks on the owner, by whatever way. The owner may be planning a step."""
        if request_id in self._moves:
            self._abort(request_id, "the request gave up its blocks")
        if request_id in self._spans.get(owner, ()):
            self._give_back(owner, request_id)

    def _lapse(self, event: tuple[InstanceId, RequestId]) -> None:
        """Give back what is kept for a request that still waits."""
        owner, request_id = event
        spans = self._spans.get(owner, {}).get(request_id)
        source = self._cluster.find(owner)
        if spans is None or source is None or not self._instance(owner).memory.waits(request_id):
            return
        self._instance(owner).memory.place(request_id, -sum([span.blocks for span in spans]))
        self.counters.lapsed += 1
        self._give_back(owner, request_id)

    def _lose(self, owner: InstanceId, request_id: RequestId, failed: InstanceId) -> None:
        """A holder failed: what it had of this request is gone, and with it the request's place in the batch."""
        instance, spans = self._instance(owner), self._spans[owner][request_id]
        gone = [span for span in spans if span.holder == failed]
        self._spans[owner][request_id] = [span for span in spans if span.holder != failed]
        self.counters.lent_blocks -= sum([span.blocks for span in gone])
        if instance.memory.waits(request_id):
            instance.memory.place(request_id, -sum([span.blocks for span in gone]))
            self._tidy(owner, request_id)
        else:
            # The step under way ends as it began: nobody notices earlier.
            instance.at_boundary(lambda: self._drop(instance, request_id))

    def _drop(self, instance: PooledInstance, request_id: RequestId) -> None:
        live = instance.lives.get(request_id)
        if live is None or not instance.memory.memory.away_blocks(request_id) or not instance.memory.drop(request_id):
            return
        self.counters.recomputed += 1
        instance.left(live)
        live.preemptions += 1
        self._cluster.preempted(instance, live)
        instance.changed()

    # Books

    def _instance(self, instance: InstanceId) -> PooledInstance:
        return self._steps.instances[instance]

    def _add(self, command: MoveKv) -> None:
        spans = self._spans.setdefault(command.source, {}).setdefault(command.request_id, [])
        if spans and spans[-1].holder == command.target:
            spans[-1].blocks += command.blocks
        else:
            spans.append(Span(command.target, command.blocks))
        self._couple(command.source)
        self._couple(command.target)

    def _lent(self, blocks: int) -> None:
        counters = self.counters
        counters.lent_blocks += blocks
        counters.most_lent_blocks = max(counters.most_lent_blocks, counters.lent_blocks)

    def _give_back(self, owner: InstanceId, request_id: RequestId) -> None:
        spans = self._spans[owner].pop(request_id)
        for span in spans:
            self._reclaim(span)
        self._tidy(owner, request_id)

    def _reclaim(self, span: Span) -> None:
        holder, now_ns = self._instance(span.holder), self._cluster.kernel.now_ns
        holder.interrupt(now_ns)
        holder.memory.reclaim(span.blocks)
        self.counters.lent_blocks -= span.blocks
        self._couple(span.holder)
        holder.wake(now_ns)

    def _tidy(self, owner: InstanceId, request_id: RequestId) -> None:
        requests = self._spans[owner]
        if not requests.get(request_id, True):
            del requests[request_id]
        if not requests:
            del self._spans[owner]
        self._couple(owner)

    def _couple(self, instance_id: InstanceId) -> None:
        """From the next step on it leaps, or steps."""
        instance = self._instance(instance_id)
        coupled = instance_id in self._spans or instance.memory.memory.lent > 0
        if coupled and not instance.coupled and not instance.down:
            instance.interrupt(self._cluster.kernel.now_ns)
        instance.coupled = coupled


class Guarded:
    """Carries out migrations, but of requests whose KV is spread: a copy of one part of it would be of no use."""

    def __init__(self, migrations: Executor, pooled: Pooled) -> None:
        self._migrations = migrations
        self._pooled = pooled

    def carry_out(self, command: Command) -> str | None:
        """See Executor."""
        if isinstance(command, Migrate) and command.request_id in self._pooled:
            return "its KV is spread over several instances"
        return self._migrations.carry_out(command)
