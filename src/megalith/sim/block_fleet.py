"""Which instances there are: the first placement by expected popularity, more where queues are long, fewer where idle.

Knows devices and units; must not know requests beyond how many an instance has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil

from megalith.policy import blocks as decide
from megalith.policy.block_paths import SiteFacts, site
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

    def __init__(self, kernel: Kernel, scenario: BlockScenario, ready: Callable[[], object]) -> None:
        """`ready()` is called when instances that were added have their weights. Raises ConfigError, DoesNotFit."""
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
        """As many places for each application, or unit, as its part of the requests is of the devices."""
        self._load = dict.fromkeys(range(len(self.devices)), 0.0)
        if self.scenario.locality:
            self._provision_chains()
        else:
            self._provision_units()

    def _provision_chains(self) -> None:
        """Chains as wholes, those with most work first, each where it costs least (policy.block_paths).

        Where they do not all fit there are fewer of the popular ones; a chain that fits nowhere even so is cut.
        """
        known = {one.id: self._wanted(one.weight) for one in self.zoo.applications}
        for most in range(max(known.values()), 0, -1):
            if self._chains_fit({one: min(wanted, most) for one, wanted in known.items()}, last=most == 1):
                return
            for device in self.devices:
                for instance in list(device.instances):
                    self._remove(instance)

    def _chains_fit(self, wanted: dict[int, int], last: bool) -> bool:
        number = len(self.devices)
        work = {one.id: one.weight * self.bases[one.base].token_flops / wanted[one.id] for one in self.zoo.applications}
        most = SLACK * sum(work[one] * wanted[one] for one in work) / number
        shares, works = [0.0] * number, [0.0] * number
        for one in sorted(work, key=lambda one: (-work[one], one)):
            application = self.zoo.applications[one]
            units = [self.zoo.units[member] for member in self.zoo.chains[one]]
            for _ in range(wanted[one]):
                share = application.weight / wanted[one]
                place = self._site_of(units, share, work[one], shares, works, most)
                if place is not None:
                    shares[place] += share
                    works[place] += work[one]
                    for unit in self._lacking(self.devices[place], units):
                        self._serve(self._make(unit, self.devices[place]))
                elif not last:
                    return False
                else:
                    for unit in units:
                        if not self.instances[unit.id]:
                            self._first(unit, unit.share, needed=True)
        return True

    def _site_of(
        self, units: list[Unit], share: float, work: float, shares: list[float], works: list[float], most_work: float,
        grows: Unit | None = None,
    ) -> int | None:  # fmt: skip
        """The device for a chain; one that lacks the unit that `grows`, where one does."""
        sites = [self._site(device, units, shares, works) for device in self.devices]
        if grows is not None:
            here = {instance.device.id for instance in self.instances[grows.id]}
            sites = [one._replace(free_bytes=-1) if number in here else one for number, one in enumerate(sites)]
        kv_bytes = KV_REQUESTS * SEEN_TOKENS * self.bases[units[0].base].token_kv_bytes
        return site(sites, share, work, kv_bytes, int(self._memory * self.scenario.weights_share), most_work)

    def _wanted(self, share: float) -> int:
        return max(1, ceil(share * len(self.devices))) if self.scenario.replicas == "popularity" else 1

    def _site(self, device: Device, units: list[Unit], share: list[float], work: list[float]) -> SiteFacts:
        lacking = self._lacking(device, units)
        return SiteFacts(
            device.free_bytes, device.weights_bytes, sum(self._bytes(unit) for unit in lacking),
            sum(instance.part(instance.base.step_ns) for instance in device.instances),
            sum(self.bases[unit.base].step_ns * unit.blocks // self.scenario.zoo.blocks for unit in lacking),
            share[device.id], work[device.id],
        )  # fmt: skip

    def _lacking(self, device: Device, units: list[Unit]) -> list[Unit]:
        here = self._units(device.instances)
        return [unit for unit in units if unit.id not in here]

    def _provision_units(self) -> None:
        """Each unit by itself, the first of each before the second; loads are parts of all requests."""
        wanted = {unit.id: self._wanted(unit.share) for unit in self.zoo.units}
        order = sorted(self.zoo.units, key=lambda unit: (-unit.share, unit.id))
        for round_ in range(max(wanted.values())):
            for unit in order:
                if round_ < wanted[unit.id]:
                    part = unit.share * unit.blocks / (self.scenario.zoo.blocks * wanted[unit.id])
                    self._first(unit, part, needed=round_ == 0)

    def _first(self, unit: Unit, part: float, needed: bool) -> None:
        load = self._load
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

    def scale(self, application: int, unit: Unit) -> None:
        """One more place for a unit, with locality for what a device lacks of a whole chain; none while one is on its
        way, or where there is no room."""
        now_ns = self.kernel.now_ns
        if unit.id in self.loading or now_ns - self._tried_ns.get(unit.id, -RETRY_NS) < RETRY_NS:
            return
        found = self._growth(application, unit)
        if found is None and self._make_room(unit):
            found = self._growth(application, unit)
        if found is None:
            self._tried_ns[unit.id] = now_ns
            return
        place, units = found
        made = [self._make(one, self.devices[place]) for one in units]
        self.added += len(made)
        num_bytes = 0
        for instance in made:
            self.loading[instance.unit.id] = instance
            num_bytes += instance.num_bytes
            self.kernel.log(COMMAND, instance.unit.id, place)
        self.kernel.at(now_ns + load_ns(num_bytes, self.scenario), self._loaded, made)

    def _loaded(self, made: list[Instance]) -> None:
        for instance in made:
            del self.loading[instance.unit.id]
            instance.idle_ns = self.kernel.now_ns
            self._serve(instance)
        self._ready()

    def _growth(self, application: int, unit: Unit) -> tuple[int, list[Unit]] | None:
        """A device, and which units it is to get."""
        chain = [self.zoo.units[member] for member in self.zoo.chains[application]]
        if self.scenario.locality and unit in chain and not any(one.id in self.loading for one in chain):
            present = [float(device.present()) for device in self.devices]
            # Half of what is too much for where it is now will come here.
            more = max([one.present for one in self.instances[unit.id]], default=2) / 2
            most = SLACK * (sum(present) + more) / len(present)
            place = self._site_of(chain, more, more, present, present, most, unit)
            if place is not None:
                return place, self._lacking(self.devices[place], chain)
        place = self._room(unit)
        return None if place is None else (place, [unit])

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
        self._remove(instance)
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

    def _remove(self, instance: Instance) -> None:
        self.instances[instance.unit.id].remove(instance)
        instance.device.instances.remove(instance)
        instance.device.weights_bytes -= instance.num_bytes
        instance.device.free_bytes += instance.num_bytes

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
