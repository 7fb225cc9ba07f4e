"""Which instances there are: the first placement by expected popularity, more where queues are long, fewer where idle.

Knows devices and units; must not know requests beyond how many an instance has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil

from megalith.policy import blocks as decide
from megalith.policy.block_zoo import Unit, make_zoo
from megalith.policy.blocks import DeviceFacts
from megalith.sim.block_parts import BaseTimes, Device, Instance, load_ns, make_devices, no_room
from megalith.sim.kernel import COMMAND, Kernel
from megalith.specs.blocks import BlockScenario

SLACK = 1.25
"""Locality may load a device by this much more than the mean of all; a choice."""
KV_REQUESTS = 4
"""A device gets an instance only with room for the KV of so many requests of SEEN_TOKENS beside it; a choice."""
SEEN_TOKENS = 2048
RETRY_NS = 500_000_000
"""A unit for which there was no room is looked at again after as long; a choice."""
IDLE_NS = 10_000_000_000
"""An added instance that nobody has used for as long may make room for another; a choice."""


class BlockFleet:
    """Devices and the instances on them."""

    def __init__(self, kernel: Kernel, scenario: BlockScenario, ready: Callable[[Instance], object]) -> None:
        """`ready(instance)` is told when an instance that was added has its weights. Raises ConfigError, DoesNotFit."""
        self.kernel, self.scenario, self._ready = kernel, scenario, ready
        self.zoo = make_zoo(scenario.zoo, scenario.sharing, scenario.seed)
        self.bases = {name: BaseTimes(scenario, name) for name in scenario.zoo.bases}
        self.devices = make_devices(scenario)
        self.instances: dict[int, list[Instance]] = {unit.id: [] for unit in self.zoo.units}
        """By unit, those that serve."""
        self.loading: dict[int, Instance] = {}
        """By unit, the one that is on its way."""
        self.added = self.removed = 0
        self._tried_ns: dict[int, int] = {}
        """By unit, when there was no room for another one."""
        self._next_id = 0
        self._memory = self.devices[0].free_bytes
        self._chains: dict[int, list[int]] = {unit.id: [] for unit in self.zoo.units}
        for application, chain in enumerate(self.zoo.chains):
            for member in chain:
                self._chains[member].append(application)
        self._provision()

    # First placement

    def _provision(self) -> None:
        """As many instances of each unit as its part of the requests is of the devices, the first of each before the
        second; a device's expected load is in parts of all requests, through whole models."""
        number = len(self.devices)
        load = dict.fromkeys(range(number), 0.0)
        wanted = {unit.id: max(1, ceil(unit.share * number)) for unit in self.zoo.units}
        order = sorted(self.zoo.units, key=lambda unit: (-unit.share, unit.id))
        for round_ in range(max(wanted.values())):
            for unit in order:
                if round_ < wanted[unit.id]:
                    part = unit.share * unit.blocks / (self.scenario.zoo.blocks * wanted[unit.id])
                    self._first(unit, part, load, needed=round_ == 0)

    def _first(self, unit: Unit, part: float, load: dict[int, float], needed: bool) -> None:
        facts = [self._facts(device, unit, load[device.id] + part) for device in self.devices]
        here = {instance.device.id for instance in self.instances[unit.id]}
        facts = [one._replace(free_bytes=-1) if number in here else one for number, one in enumerate(facts)]
        place = self._place(unit, facts, SLACK / len(self.devices))
        if place is not None:
            load[place] += part
            self._serve(self._make(unit, self.devices[place]))
        elif needed:
            raise no_room(unit, self._bytes(unit), self.scenario)

    # While it runs

    def occupancy(self, instance: Instance, waiting: int = 0) -> float:
        """See policy.blocks."""
        return decide.occupancy(instance.present, waiting, self.scenario.max_sequences)

    def scale(self, unit: Unit) -> None:
        """One more instance of a unit, unless one is on its way or there is no room."""
        now_ns = self.kernel.now_ns
        if unit.id in self.loading or now_ns - self._tried_ns.get(unit.id, -RETRY_NS) < RETRY_NS:
            return
        place = self._room(unit)
        if place is None and self._make_room(unit):
            place = self._room(unit)
        if place is None:
            self._tried_ns[unit.id] = now_ns
            return
        instance = self._make(unit, self.devices[place])
        self.loading[unit.id] = instance
        self.added += 1
        self.kernel.log(COMMAND, unit.id, place)
        self.kernel.at(self.kernel.now_ns + load_ns(instance, self.scenario), self._loaded, instance)

    def _loaded(self, instance: Instance) -> None:
        del self.loading[instance.unit.id]
        instance.idle_ns = self.kernel.now_ns
        self._serve(instance)
        self._ready(instance)

    def _room(self, unit: Unit) -> int | None:
        rounds = [device.round_ns() for device in self.devices]
        facts = [self._facts(device, unit, rounds[device.id]) for device in self.devices]
        here = {instance.device.id for instance in self.instances[unit.id]}
        facts = [one._replace(free_bytes=-1) if number in here else one for number, one in enumerate(facts)]
        return self._place(unit, facts, SLACK * sum(rounds) / len(rounds))

    def _make_room(self, unit: Unit) -> bool:
        """Take the instance away that has been idle longest, of a unit that has others."""
        now_ns = self.kernel.now_ns
        idle = [
            (one.idle_ns, one.id, one)
            for number, found in self.instances.items()
            if len(found) > 1 and number != unit.id
            for one in found
            if not one.present and not one.queue and now_ns - one.idle_ns >= IDLE_NS
        ]
        if not idle:
            return False
        instance = min(idle, key=lambda entry: entry[:2])[2]
        self.instances[instance.unit.id].remove(instance)
        instance.device.instances.remove(instance)
        instance.device.weights_bytes -= instance.num_bytes
        instance.device.free_bytes += instance.num_bytes
        self.removed += 1
        return True

    # Inside

    def _bytes(self, unit: Unit) -> int:
        return -(-self.bases[unit.base].weight_bytes * unit.blocks // self.scenario.zoo.blocks)

    def _make(self, unit: Unit, device: Device) -> Instance:
        self._next_id += 1
        instance = Instance(self._next_id, unit, self.bases[unit.base], device, self.scenario.zoo.blocks)
        device.weights_bytes += instance.num_bytes
        device.free_bytes -= instance.num_bytes
        return instance

    def _serve(self, instance: Instance) -> None:
        self.instances[instance.unit.id].append(instance)
        instance.device.instances.append(instance)

    def _place(self, unit: Unit, facts: list[DeviceFacts], most_load: float) -> int | None:
        base, blocks = self.bases[unit.base], self.scenario.zoo.blocks
        kv_bytes = KV_REQUESTS * SEEN_TOKENS * base.token_kv_bytes * unit.blocks // blocks
        most = int(self._memory * self.scenario.weights_share)
        return decide.place(facts, self._bytes(unit), kv_bytes, most, most_load, self.scenario.locality)

    def _facts(self, device: Device, unit: Unit, load: float) -> DeviceFacts:
        return DeviceFacts(device.free_bytes, device.weights_bytes, load, self._neighbours(device, unit))

    def _neighbours(self, device: Device, unit: Unit) -> float:
        """Popularity of the chains of this unit that go on at this device; on its server, half of it."""
        if unit.blocks == self.scenario.zoo.blocks:
            return 0.0
        here = self._units(device.instances)
        near = self._units(one for other in self.devices if other.server == device.server for one in other.instances)
        total = 0.0
        for application in self._chains[unit.id]:
            weight = self.zoo.applications[application].weight
            for member in self.zoo.chains[application]:
                if member != unit.id:
                    total += weight * (1.0 if member in here else 0.5 if member in near else 0.0)
        return total

    @staticmethod
    def _units(instances: Iterable[Instance]) -> set[int]:
        return {instance.unit.id for instance in instances}
