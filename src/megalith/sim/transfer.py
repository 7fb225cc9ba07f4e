"""The hand-off of a finished prompt: its KV goes from the instance that computed it to the one that decodes.

Knows schedulers, the network and bytes; must not know routers. Blocks are reserved at the decode side first and the
request is committed there when the last byte is in; until then its KV stays on the prefill side, whose memory is the
buffer for bursts. Whoever is refused waits there in the order of finished prompts, or decodes there.

    push        reserve and send when the prompt is done
    pull        the decode side fetches when less than `accept_share` of its blocks wait and there is room (DistServe,
                OSDI 2024, and its decoding_stage_scheduler.py)
    layerwise   reserve when the prompt starts; each layer is sent when it has been computed (Splitwise, ISCA 2024)

Layer-wise, a step of T with n layers can send from T / n on, and the bytes of its last layer only after it. So with a
link that nobody else uses the time that shows is max(t / n, t - T * (n - 1) / n) for a transfer of t: the rest is
hidden under the prompt.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from megalith.base.errors import PromptTooLong
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import InstanceId, TransferMode
from megalith.policy.facts import Request, RequestId
from megalith.sim.network import Network, Transfer
from megalith.sim.parties import Host, KvShape, Party
from megalith.specs.fleet import HandoffSpec


@dataclass(slots=True)
class HandoffCounters:
    """What happened since the start. Only ever rises."""

    done: int = 0
    kept: int = 0
    """Prompts that decode where they ran, for want of room or of a decode side."""
    waited: int = 0
    """Hand-offs that were refused at first and waited."""
    lost: int = 0
    """Hand-offs whose request ended, or whose prefill side went down, before the KV was over."""
    exposed_ns: int = 0
    """From the end of the prompt to the commit on the decode side, added up over those that were done."""
    longest_exposed_ns: int = 0
    num_bytes: int = 0
    """Bytes of KV of those that were done."""


class _Handoff:
    """One prompt on its way through its states."""

    __slots__ = (
        "computed_bytes",
        "mode",
        "moved_bytes",
        "ready_ns",
        "request",
        "reserved",
        "source",
        "state",
        "step",
        "target",
        "transfer",
    )

    def __init__(self, request: Request, source: InstanceId, target: InstanceId, mode: TransferMode) -> None:
        self.request = request
        self.source = source
        self.target = target
        self.mode: TransferMode = mode
        self.state: Literal["prompt", "queued", "copying", "ended"] = "prompt"
        self.reserved = False
        self.transfer: Transfer | None = None
        self.moved_bytes = 0
        """Sent layer by layer, in transfers that ended."""
        self.computed_bytes = 0
        """Of the prompt steps that have begun."""
        self.step = 0
        """Number of the prompt step whose layers go now."""
        self.ready_ns = 0


class Handoffs:
    """All hand-offs of a cluster. Calls are O(1), but for `down`, which is O(hand-offs)."""

    def __init__(self, host: Host, network: Network, spec: HandoffSpec, kv: KvShape) -> None:
        self._host = host
        self.network = network
        self._spec = spec
        self.kv = kv
        self._live: dict[RequestId, _Handoff] = {}
        self._queues: dict[InstanceId, deque[_Handoff]] = {}
        """By decode side, in the order of finished prompts."""
        self._waiting_on: Counter[InstanceId] = Counter()
        """Hand-offs that wait, by prefill side."""
        self._blocks_coming: Counter[InstanceId] = Counter()
        self._serving: set[InstanceId] = set()
        self._waiting: dict[RequestId, _Handoff] = {}
        self._watching = False
        self._max_wait_ns = round(spec.max_wait_s * NS_PER_S)
        self.counters = HandoffCounters()

    def __contains__(self, request_id: RequestId) -> bool:
        """Whether the request is to be handed off, or is on its way."""
        return request_id in self._live

    def __len__(self) -> int:
        return len(self._live)

    def waiting(self, instance: InstanceId) -> int:
        """Finished prompts that wait on this prefill side."""
        return self._waiting_on[instance]

    # What the cluster tells

    def expect(self, request: Request, source: InstanceId, target: InstanceId, mode: TransferMode) -> None:
        """The request was routed: its prompt runs on `source`, it decodes on `target`."""
        if source == target or request.id in self._live:
            raise ValueError(f"request {request.id} cannot be handed from {source} to {target}")
        self._live[request.id] = _Handoff(request, source, target, mode)

    def prompt_step(self, request_id: RequestId, new_tokens: int, start_ns: int, end_ns: int) -> None:
        """A step with `new_tokens` of the prompt begins, and will end at `end_ns`. Only `layerwise` takes note."""
        handoff = self._live.get(request_id)
        if handoff is None or handoff.mode != "layerwise" or handoff.state != "prompt":
            return
        handoff.moved_bytes += self._collect(handoff)
        source = self._host.find(handoff.source)
        if source is None:
            return
        known = source.scheduler.progress(request_id).known
        if not handoff.reserved and not self._reserve(handoff, known + 1):
            handoff.mode = "push"
            return
        layers, fresh = self.kv.layers, self.kv.size(new_tokens, 1)
        backlog = handoff.computed_bytes - handoff.moved_bytes
        ready = backlog + fresh * (layers - 1) // layers
        handoff.computed_bytes += fresh
        handoff.step += 1
        # A layer's worth from the step before keeps the link busy until the first layer of this one is computed.
        begin_ns = start_ns if backlog * layers >= fresh else start_ns + (end_ns - start_ns) // layers
        if ready and end_ns > begin_ns:
            self._host.kernel.at(begin_ns, self._stream, (handoff, handoff.step, ready, end_ns))

    def prompt_done(self, request_id: RequestId) -> bool:
        """The first token is out, at the end of a step of the prefill side, before it plans the next one.

        True when the request has left the batch, to be handed off; False when it goes on decoding there.
        """
        handoff = self._live.get(request_id)
        source = self._host.find(handoff.source) if handoff is not None else None
        if handoff is None or source is None or handoff.state != "prompt":
            return False
        handoff.ready_ns = self._host.kernel.now_ns
        handoff.moved_bytes += self._collect(handoff)
        if handoff.reserved or (not self._queue(handoff.target) and self._accepts(handoff)):
            source.scheduler.hold(request_id)
            self._copy(handoff, source)
            return True
        full = self._waiting_on[handoff.source] >= self._spec.max_waiting
        if self._spec.refused == "local" or full or not self._ever_fits(handoff):
            self._keep(handoff)
            return False
        source.scheduler.hold(request_id)
        self._wait(handoff)
        return True

    def preempted(self, request_id: RequestId) -> None:
        """The prompt lost its blocks before it was done: what was sent of it is sent again."""
        handoff = self._live.get(request_id)
        if handoff is not None and handoff.state == "prompt":
            self._start_over(handoff)

    def gone(self, request_id: RequestId) -> None:
        """The request ended or was taken away, wherever it stood. Its blocks on the prefill side are not touched."""
        handoff = self._live.get(request_id)
        if handoff is not None:
            self.counters.lost += handoff.state != "prompt"
            self._end(handoff)
            self._give_back(handoff)

    def room(self, instance: InstanceId) -> None:
        """Blocks may have come free on this decode side. Costs nothing when nobody waits for it."""
        if self._queues.get(instance) and instance not in self._serving:
            self._serving.add(instance)
            self._host.kernel.at(self._host.kernel.now_ns, self._serve, instance)

    def down(self, instance: InstanceId) -> None:
        """The instance died, and find() does not know it any more. Requests it was to decode find another way."""
        for handoff in [h for h in self._live.values() if instance in (h.source, h.target)]:
            if handoff.source == instance:
                self.gone(handoff.request.id)
            else:
                self._lost_target(handoff)

    # Reserve

    def _reserve(self, handoff: _Handoff, known_tokens: int) -> bool:
        target = self._host.find(handoff.target)
        if target is None:
            return False
        target.interrupt(self._host.kernel.now_ns)
        try:
            handoff.reserved = target.scheduler.reserve(handoff.request, known_tokens)
        except PromptTooLong:
            return False
        if handoff.reserved:
            self._blocks_coming[handoff.target] += self._blocks(target, handoff)
            target.wake(self._host.kernel.now_ns)
        return handoff.reserved

    def _accepts(self, handoff: _Handoff) -> bool:
        """Reserve for a finished prompt, by the rule of its mode."""
        source, target = self._host.find(handoff.source), self._host.find(handoff.target)
        if source is None or target is None:
            return False
        if handoff.mode == "pull":
            target.interrupt(self._host.kernel.now_ns)
            waiting = self._blocks_coming[handoff.target] + target.facts.waiting_blocks()
            if waiting >= self._spec.accept_share * target.scheduler.kv.num_blocks:
                return False
        return self._reserve(handoff, source.scheduler.progress(handoff.request.id).known)

    def _ever_fits(self, handoff: _Handoff) -> bool:
        target = self._host.find(handoff.target)
        if target is None:
            return False
        tokens = handoff.request.prompt_tokens + handoff.request.max_new_tokens - 1
        return target.scheduler.kv.blocks_for(tokens) <= target.scheduler.kv.num_blocks

    def _blocks(self, target: Party, handoff: _Handoff) -> int:
        return target.scheduler.kv.blocks_for(handoff.request.prompt_tokens)

    # Wait

    def _queue(self, instance: InstanceId) -> deque[_Handoff]:
        """Those that wait for this decode side, without those that left from the middle."""
        queue = self._queues.setdefault(instance, deque())
        while queue and (queue[0].state != "queued" or queue[0].target != instance):
            queue.popleft()
        return queue

    def _wait(self, handoff: _Handoff) -> None:
        handoff.state = "queued"
        self.counters.waited += 1
        self._waiting_on[handoff.source] += 1
        self._queue(handoff.target).append(handoff)
        self._waiting[handoff.request.id] = handoff
        self._watch()

    def _serve(self, instance: InstanceId) -> None:
        self._serving.discard(instance)
        queue = self._queue(instance)
        while queue:
            handoff = queue[0]
            source = self._host.find(handoff.source)
            if source is None or not self._accepts(handoff):
                return
            queue.popleft()
            self._leave_queue(handoff)
            self._copy(handoff, source)
            self._queue(instance)

    def _leave_queue(self, handoff: _Handoff) -> None:
        """Nobody waits any more; its entry in the queue is dropped when it is met."""
        if self._waiting.pop(handoff.request.id, None) is not None:
            self._waiting_on[handoff.source] -= 1

    def _watch(self) -> None:
        """Look for the end of somebody's wait when it comes, but soon enough not to keep an idle clock running."""
        if self._waiting and not self._watching:
            self._watching = True
            now_ns = self._host.kernel.now_ns
            first_ns = min([handoff.ready_ns for handoff in self._waiting.values()]) + self._max_wait_ns
            self._host.kernel.at(max(now_ns, min(first_ns, now_ns + NS_PER_S)), self._overdue)

    def _overdue(self, _: None) -> None:
        self._watching = False
        latest_ns = self._host.kernel.now_ns - self._max_wait_ns
        for handoff in [handoff for handoff in self._waiting.values() if handoff.ready_ns <= latest_ns]:
            if handoff.state == "queued":
                self._resume(handoff)
        self._watch()

    # Copy

    def _collect(self, handoff: _Handoff) -> int:
        """End the transfer of layers that runs. Returns the bytes that it moved and nobody has counted."""
        transfer, handoff.transfer = handoff.transfer, None
        return self.network.cancel(transfer) if transfer is not None else 0

    def _start_over(self, handoff: _Handoff) -> None:
        self._collect(handoff)
        handoff.moved_bytes = handoff.computed_bytes = 0
        handoff.step += 1

    def _stream(self, event: tuple[_Handoff, int, int, int]) -> None:
        """The first layer of a prompt step is computed: the others follow at the pace of the step."""
        handoff, step, num_bytes, end_ns = event
        if handoff.state != "prompt" or handoff.step != step:
            return
        pace = max(1, num_bytes * NS_PER_S // (end_ns - self._host.kernel.now_ns))
        handoff.transfer = self.network.send(handoff.source, handoff.target, num_bytes, _ignore, pace)

    def _copy(self, handoff: _Handoff, source: Party) -> None:
        handoff.state = "copying"
        left = max(0, self._total_bytes(handoff, source) - handoff.moved_bytes)
        if handoff.mode == "push":
            left = round(left * (1.0 - self._spec.hidden))
        handoff.transfer = self.network.send(
            handoff.source, handoff.target, left, lambda _transfer: self._commit(handoff)
        )

    def _total_bytes(self, handoff: _Handoff, source: Party) -> int:
        block_tokens = source.scheduler.kv.block_tokens if self._spec.whole_blocks else 1
        return self.kv.size(source.scheduler.progress(handoff.request.id).computed, block_tokens)

    def _commit(self, handoff: _Handoff) -> None:
        source, target = self._host.find(handoff.source), self._host.find(handoff.target)
        if handoff.state != "copying" or source is None or target is None:
            raise RuntimeError(f"the KV of request {handoff.request.id} arrived, but its hand-off is {handoff.state}")
        now_ns, request_id = self._host.kernel.now_ns, handoff.request.id
        self.counters.num_bytes += self._total_bytes(handoff, source)
        source.interrupt(now_ns)
        target.interrupt(now_ns)
        target.scheduler.commit(request_id)
        source.scheduler.depart(request_id)
        self._blocks_coming[handoff.target] -= self._blocks(target, handoff)
        self._end(handoff)
        exposed_ns = now_ns - handoff.ready_ns
        self.counters.done += 1
        self.counters.exposed_ns += exposed_ns
        self.counters.longest_exposed_ns = max(self.counters.longest_exposed_ns, exposed_ns)
        self._host.moved(request_id, handoff.source, handoff.target, "handoff")
        target.wake(now_ns)
        source.wake(now_ns)
        self.room(handoff.target)
        self.room(handoff.source)

    # End

    def _end(self, handoff: _Handoff) -> None:
        """Forget a hand-off; nothing of it is on the wire any more."""
        self._leave_queue(handoff)
        self._collect(handoff)
        handoff.state = "ended"
        del self._live[handoff.request.id]

    def _give_back(self, handoff: _Handoff) -> None:
        """Free what was reserved on the decode side, if that is up."""
        target = self._host.find(handoff.target)
        if handoff.reserved and target is not None:
            target.interrupt(self._host.kernel.now_ns)
            target.scheduler.abort(handoff.request.id)
            self._blocks_coming[handoff.target] -= self._blocks(target, handoff)
            target.wake(self._host.kernel.now_ns)
            self.room(handoff.target)
        handoff.reserved = False

    def _keep(self, handoff: _Handoff) -> None:
        """It decodes where its prompt ran, and is in the batch there."""
        self._end(handoff)
        self._give_back(handoff)
        self.counters.kept += 1
        self._host.kept(handoff.request.id, handoff.source)

    def _resume(self, handoff: _Handoff) -> None:
        """It was held on the prefill side and goes on there."""
        source = self._host.find(handoff.source)
        if source is not None:
            source.interrupt(self._host.kernel.now_ns)
            source.scheduler.commit(handoff.request.id)
        self._keep(handoff)
        if source is not None:
            self._host.resumed(handoff.request.id, handoff.source)
            source.wake(self._host.kernel.now_ns)

    def _lost_target(self, handoff: _Handoff) -> None:
        lost, state = handoff.target, handoff.state
        self._blocks_coming.pop(lost, None)
        handoff.reserved = False
        self._start_over(handoff)
        other = self._host.retarget(handoff.request.id, lost)
        if other is None or other == handoff.source or self._host.find(other) is None:
            if state == "prompt":
                self._keep(handoff)
            else:
                self._resume(handoff)
            return
        handoff.target = other
        self._leave_queue(handoff)
        if state != "prompt":
            self._wait(handoff)
            self.room(other)


def _ignore(transfer: Transfer) -> None:
    """Bytes of layers: they are counted when the prompt or its next step is done."""
