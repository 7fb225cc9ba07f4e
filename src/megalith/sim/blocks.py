"""A simulated fleet that serves blocks: requests hop from block to block, and every block batches on its own.

A request is admitted when every block of its chain has an instance with room for its KV; then each round takes it
through the chain once and gives it one token, the first round computing its prompt. A device runs one step of one of
its instances at a time. Hidden values that go to another device are messages on the ports of sim/network.py, as is KV
that moves. Whole models are chains of one block, so that all ways of sharing run through the same code.

Everything is integer picoseconds or nanoseconds on sim/kernel.py; decisions are those of policy/blocks.py.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from functools import partial

from megalith.base.random import uniform
from megalith.cost.timer import PS_PER_NS
from megalith.policy import blocks as decide
from megalith.policy.block_paths import path
from megalith.policy.blocks import HopFacts, QueueFacts
from megalith.policy.facts import Request
from megalith.sim.block_ahead import Ahead
from megalith.sim.block_fleet import BlockFleet
from megalith.sim.block_hops import Hops
from megalith.sim.block_links import Links
from megalith.sim.block_parts import TOKEN_BYTES, Device, Instance, Row
from megalith.sim.block_result import BlockCounters, BlockResult
from megalith.sim.kernel import ARRIVE, FINISH, FIRST, MOVE, STEP_END, Kernel
from megalith.sim.live import Live
from megalith.sim.network import Transfer
from megalith.sim.record import Recorder
from megalith.specs.blocks import BlockScenario
from megalith.specs.workload import open_workload

_CHOICE = 11
"""Stream of draws: which application."""


class BlockRun:
    """One run: make it, `run()`."""

    def __init__(self, scenario: BlockScenario, recorder: Recorder | None = None) -> None:
        """Raises ConfigError and DoesNotFit on what cannot be run."""
        self.scenario = scenario
        self.kernel = Kernel()
        self.recorder = Recorder(scenario.slo) if recorder is None else recorder
        self.fleet = BlockFleet(self.kernel, scenario, self._more_room)
        self.counters = BlockCounters()
        self.waiting: dict[int, deque[Live]] = {one.id: deque() for one in self.fleet.zoo.applications}
        """By application, those that have no place yet, in order."""
        rate = self.fleet.bases[scenario.zoo.bases[0]].timer.cost.profile.peer_bytes_per_s
        self.links = Links(self.kernel, scenario, rate, self.fleet.devices)
        self.lengths = decide.Lengths()
        self.hops = Hops(self.links, self.lengths, scenario.kv == "coordinated")
        self.ahead = Ahead(scenario, self.counters, self._send, self._advance, self._arrived, self._queue)
        self._shapes = open_workload(scenario.workload, scenario.seed)
        self._ended = self._rows = self._steps = 0
        self._flops = 0.0
        self._last_arrival: tuple[int, int, float] = (0, 0, 0.0)
        """(time, busy picoseconds, FLOPs) as the last request came."""
        self._first_ns = -1
        self._feed(None)

    def run(self, progress: Callable[[int], object] | None = None) -> BlockResult:
        """Run to the end. `progress(ended)` is called now and then."""
        while self.kernel.run(20_000):
            if progress is not None:
                progress(self._ended)
        if left := sum(map(len, self.waiting.values())):
            raise RuntimeError(f"{left} requests never found a place")
        return self._result()

    # Arrivals and admission

    def _feed(self, _argument: object) -> None:
        shape = next(self._shapes, None)
        if shape is not None:
            request = Request(shape.index, shape.at_ns or 0, shape.input_tokens, shape.output_tokens)
            self.kernel.at(
                max(self.kernel.now_ns, request.arrival_ns), self._arrive, Live(request, shape.output_tokens)
            )

    def _arrive(self, live: Live) -> None:
        now_ns, scenario = self.kernel.now_ns, self.scenario
        if self._first_ns < 0:
            self._first_ns = now_ns
        application = self.fleet.zoo.pick(uniform(scenario.seed * 16 + _CHOICE, live.request.id))
        self.kernel.log(ARRIVE, live.request.id, application)
        self._last_arrival = (now_ns, self._busy_ps(), self._flops)
        queue = self.waiting[application]
        queue.append(live)
        self._admit(application)
        self._feed(None)

    def _admit(self, application: int) -> None:
        """Give those of an application a place who can have one, in order."""
        queue = self.waiting[application]
        while queue:
            row = Row(queue[0], application)
            if not self._settle(row):
                break
            queue.popleft()
            live = row.live
            live.scheduled_ns, live.instance = self.kernel.now_ns, row.owners[0].id
            self._arrived([row], row.owners[0])

    def _settle(self, row: Row) -> bool:
        """An instance for every hop, with room for its KV; otherwise none, and more are started where one lacked."""
        places: list[list[Instance]] = []
        waiting = len(self.waiting[row.application])
        chain = [self.fleet.zoo.units[number] for number in self.fleet.zoo.chains[row.application]]
        whole = Counter(one.device.id for unit in chain for one in self.fleet.instances[unit.id])
        for unit in chain:
            options = self.fleet.instances[unit.id]
            if all(self.fleet.occupancy(one, waiting) > self.scenario.scale_above for one in options):
                self.fleet.scale(row.application, unit)
                if self.scenario.adaptive:
                    for other in unit.stand_ins:
                        options = options + self.fleet.instances[other]
            fits = [one for one in options if self._has_room(one, row, max(1, whole[one.device.id]))]
            if not fits:
                self.fleet.scale(row.application, unit)
                return False
            places.append(fits)
        ways = path([[self.hops.stop(one) for one in fits] for fits in places], self.links.between_ns)
        row.owners = [fits[way] for fits, way in zip(places, ways, strict=True)]
        for unit, owner in zip(chain, row.owners, strict=True):
            owner.present += 1
            owner.device.free_bytes -= owner.kv_bytes(row.tokens)
            self.counters.stood_in += owner.unit.id != unit.id
        return True

    def _has_room(self, instance: Instance, row: Row, hops: int = 1) -> bool:
        """Whether so many hops of a request could have their KV on its device."""
        room = instance.device.free_bytes >= hops * instance.kv_bytes(row.tokens)
        return room and instance.present < self.scenario.max_sequences

    def _more_room(self) -> None:
        for application, queue in self.waiting.items():
            if queue:
                self._admit(application)

    # Steps

    def _queue(self, row: Row, instance: Instance) -> None:
        row.queued_ns = self.kernel.now_ns
        instance.queue.append(row)
        if row.computes > 1:
            instance.prompt_tokens += row.computes

    def _begin(self, device: Device) -> None:
        if device.running:
            return
        ready = [one for one in device.instances if one.queue]
        if not ready:
            return
        facts = [QueueFacts(one.unit.base, one.unit.first, one.id, one.queue[0].queued_ns) for one in ready]
        instance = ready[decide.turn(facts, device.last)]
        device.last = instance.unit.base, instance.unit.first, instance.id
        rows = instance.take(self.scenario.max_sequences, self.scenario.token_budget)
        duration_ps = instance.step_ps(rows)
        device.running = True
        now_ps = self.kernel.now_ns * PS_PER_NS
        begun_ps = max(now_ps, device.free_ps)
        ahead = self.ahead.rows(instance, rows, duration_ps) if self.scenario.speculation else []
        if ahead:
            surrogate_ps = round(duration_ps * self.scenario.surrogate_share)
            begun_ps += surrogate_ps
            device.busy_ps += surrogate_ps
            self.kernel.at(-(-begun_ps // PS_PER_NS), self.ahead.send, (instance, ahead))
        device.busy_ps += duration_ps
        device.end_ps = device.free_ps = begun_ps + duration_ps
        self._steps += 1
        self._rows += len(rows)
        end_ns = -(-device.end_ps // PS_PER_NS)
        self.kernel.at(end_ns, self._end, (instance, rows, frozenset(ahead)), STEP_END + device.id)

    def _end(self, event: tuple[Instance, list[Row], frozenset[Row]]) -> None:
        instance, rows, ahead = event
        device, done = instance.device, []
        truths: dict[Instance, list[Row]] = {}
        for row in rows:
            if row in ahead:
                truths.setdefault(self._owner(row), []).append(row)
            elif self.ahead.stands(row, instance):
                done.append(row)
        for target, found in truths.items():
            self._message(device, target, len(found) * target.base.row_bytes, partial(self.ahead.truth, found, target))
        self._advance(done, instance)
        device.running = False  # only now, so that all who stay here are in its queues
        self._begin(device)

    def _advance(self, rows: list[Row], instance: Instance) -> None:
        """These rows are through with an instance: on to the next, or a token is there."""
        onward: dict[Instance, list[Row]] = {}
        finished = False
        gaps: Counter[int] = Counter()
        for row in rows:
            row.moved = False
            row.place += 1
            if row.place == len(row.owners) and self._token(row, instance, gaps):
                finished = True
                continue
            target = self._route(row, instance.device)
            if target is not None:
                onward.setdefault(target, []).append(row)
        for target, found in onward.items():
            self._send(instance, target, found)
        for gap_ps, count in sorted(gaps.items()):
            self.recorder.steps(gap_ps, 0, 1, count)
        if finished:
            self._more_room()

    def _token(self, row: Row, instance: Instance, gaps: Counter[int]) -> bool:
        """One more token; True when it was the last."""
        live, now_ps = row.live, self.kernel.now_ns * PS_PER_NS
        self._flops += float(row.new_tokens * instance.base.token_flops)
        live.generated += 1
        if live.generated == 1:
            live.first_ns = self.kernel.now_ns
            self.kernel.log(FIRST, live.request.id, instance.id)
        else:
            gaps[now_ps - row.round_ps] += 1
        row.round_ps = now_ps
        row.context += row.new_tokens
        row.new_tokens, row.place = 1, 0
        if live.generated < live.output_tokens:
            return False
        self.lengths.add(live.generated)
        live.finish_ns, live.outcome = self.kernel.now_ns, "finished"
        for owner in row.owners:
            owner.present -= 1
            owner.idle_ns = self.kernel.now_ns
            owner.device.free_bytes += owner.kv_bytes(row.tokens)
        self.kernel.log(FINISH, live.request.id, live.generated)
        self.recorder.finished(live)
        self._ended += 1
        return True

    # Hops

    def _owner(self, row: Row) -> Instance:
        return row.owners[row.place]

    def _route(self, row: Row, source: Device) -> Instance | None:
        """Who takes the next hop: who has its KV, unless it is quicker elsewhere. None: its KV is on the way there."""
        owner = self._owner(row)
        others = self.fleet.instances[owner.unit.id]
        if len(others) < 2 or row.context == 0 or self.scenario.kv == "pinned":
            return owner
        now_ns = self.kernel.now_ns
        if owner.queue or owner.device.queue_ns(now_ns) == 0:
            return owner  # it joins a step that is to come, or begins at once
        if self.scenario.kv == "coordinated" and all(one.device is owner.device for one in row.owners):
            return owner  # each later token would wait for one round more elsewhere, for a queue that is over in one
        options = [owner, *[one for one in others if one is not owner and self._has_room(one, row)]]
        facts = [self.hops.facts(row, one, source, now_ns) for one in options]
        chosen = options[decide.next_hop(facts, self.scenario.kv == "coordinated")]
        if chosen is owner:
            return owner
        return self._move(row, chosen, facts[options.index(chosen)])

    def _move(self, row: Row, target: Instance, facts: HopFacts) -> Instance | None:
        """Its KV of this block goes to, or is computed again at, another instance, which has it from then on."""
        owner = self._owner(row)
        for one, sign in ((owner, 1), (target, -1)):
            one.present -= sign
            one.device.free_bytes += sign * one.kv_bytes(row.tokens)
        row.owners[row.place] = target
        row.live.migrations += 1
        self.kernel.log(MOVE, row.live.request.id, target.id)
        if facts.recompute_ns < facts.transfer_ns:
            self.counters.recomputes += 1
            row.moved = True
            return target
        self.counters.kv_moves += 1
        if owner.device is target.device:
            return target
        self._message(owner.device, target, target.kv_bytes(row.context), partial(self._arrived, [row], target))
        return None

    def _send(self, instance: Instance, target: Instance, rows: list[Row]) -> None:
        """Hidden values, or tokens at the end of a round, go to the next instance."""
        self.counters.hops += len(rows)
        num_bytes = sum([TOKEN_BYTES if row.place == 0 else row.new_tokens * instance.base.row_bytes for row in rows])
        self._message(instance.device, target, num_bytes, partial(self._arrived, rows, target))

    def _arrived(self, rows: list[Row], target: Instance) -> None:
        """All of a message are there before a step begins."""
        for row in rows:
            self._queue(row, target)
        self._begin(target.device)

    def _message(self, source: Device, target: Instance, num_bytes: int, then: Callable[[], object]) -> None:
        if source is target.device:
            then()
            return
        self.counters.messages += 1

        def done(_transfer: Transfer) -> None:
            then()

        self.links.network.send(source.id, target.device.id, num_bytes, done)

    # Result

    def _busy_ps(self) -> int:
        return sum([device.busy_ps for device in self.fleet.devices])

    def _result(self) -> BlockResult:
        fleet = self.fleet
        self.counters.added, self.counters.removed = fleet.added, fleet.removed
        at_ns, busy_ps, flops = self._last_arrival
        window_ns = max(1, at_ns - self._first_ns)
        profile = fleet.bases[self.scenario.zoo.bases[0]].timer.cost.profile
        peak = 2.0 / profile.rates.mac_ns * window_ns * len(fleet.devices)
        figures = self.recorder.figures()
        return BlockResult(
            scenario=self.scenario, figures=figures, digest=self.kernel.digest(), events=self.kernel.events,
            requests=self._ended, end_ns=self.kernel.now_ns,
            busy_share=busy_ps / (window_ns * PS_PER_NS * len(fleet.devices)),
            compute_share=flops / peak,
            batch=self._rows / max(1, self._steps),
            weights_bytes=sum(device.weights_bytes for device in fleet.devices),
            unit_bytes=sum(found[0].num_bytes for found in fleet.instances.values()),
            instances=sum(map(len, fleet.instances.values())),
            counters=self.counters,
        )  # fmt: skip


def simulate_blocks(scenario: BlockScenario, progress: Callable[[int], object] | None = None) -> BlockResult:
    """Run a scenario to its end. Raises ConfigError and DoesNotFit."""
    return BlockRun(scenario).run(progress)
