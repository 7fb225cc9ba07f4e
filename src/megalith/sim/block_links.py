"""Links between the devices of a fleet that serves blocks: fast inside a server, slower between servers.

Every device has a port of its own on either, shared max-min fairly (sim/network.py). Knows devices and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from megalith.base.units import NS_PER_S
from megalith.sim.block_parts import Device
from megalith.sim.kernel import Kernel
from megalith.sim.network import Network
from megalith.specs.blocks import BlockScenario
from megalith.specs.fleet import LinkSpec, PairSpec


class Links:
    """See the module. `inside_bytes_per_s` is of the links inside a server."""

    def __init__(
        self, kernel: Kernel, scenario: BlockScenario, inside_bytes_per_s: float, devices: Sequence[Device]
    ) -> None:
        self._scenario, self._inside = scenario, inside_bytes_per_s
        self._devices = devices
        pairs = tuple(
            PairSpec(source=str(server), target=str(server), bytes_per_s=inside_bytes_per_s,
                     latency_s=scenario.inside_latency_s)
            for server in range(len(scenario.servers))
        )  # fmt: skip
        link = LinkSpec(bytes_per_s=scenario.between_bytes_per_s, latency_s=scenario.between_latency_s, pairs=pairs)
        self.network = Network(kernel, link, lambda device: str(devices[device].server))

    def bytes_per_s(self, one: Device, other: Device) -> float:
        """Of the link between two devices."""
        return self._inside if one.server == other.server else self._scenario.between_bytes_per_s

    def latency_ns(self, one: Device, other: Device) -> int:
        """Of the link between two devices."""
        scenario = self._scenario
        latency_s = scenario.inside_latency_s if one.server == other.server else scenario.between_latency_s
        return round(latency_s * NS_PER_S)

    def between_ns(self, one: int, other: int) -> int:
        """The same, by number."""
        return self.latency_ns(self._devices[one], self._devices[other])
