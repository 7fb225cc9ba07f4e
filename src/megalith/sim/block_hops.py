"""What a hop would cost: facts for the decisions of policy/blocks.py and policy/block_paths.py.

Knows devices, links and what answers of the past were like; decides nothing.
"""

from __future__ import annotations

from megalith.base.units import NS_PER_S
from megalith.policy.block_paths import StopFacts, path_ns
from megalith.policy.blocks import HopFacts, Lengths
from megalith.sim.block_links import Links
from megalith.sim.block_parts import Device, Instance, Row


class Hops:
    """See the module."""

    def __init__(self, links: Links, lengths: Lengths, later: bool = True) -> None:
        """`later`: what later tokens take counts."""
        self.links, self.lengths, self._later = links, lengths, later

    def stop(self, instance: Instance) -> StopFacts:
        """For a request that is not there yet."""
        work_ns = instance.base.row_ns if instance.present else instance.base.row_ns + instance.base.step_ns
        return StopFacts(instance.device.id, instance.device.round_ns(), instance.part(work_ns))

    def facts(self, row: Row, instance: Instance, source: Device, now_ns: int) -> HopFacts:
        """For the next hop of a request that comes from `source`, to an instance of the block that is next."""
        device, owner = instance.device, row.owners[row.place]
        network = 0 if device is source else self.links.latency_ns(source, device)
        queue_ns = device.queue_ns(now_ns)
        if not instance.queue:
            queue_ns += instance.part(instance.base.step_ns)  # a step of its own; others are joined
        if instance is owner:
            return HopFacts(queue_ns, 0, 0, network)
        again_ns = instance.part(row.context * instance.base.prompt_token_ns)
        later_ns = self._later_ns(row, instance) if self._later else 0
        if device is owner.device:
            return HopFacts(queue_ns, 0, again_ns, network, later_ns)
        kv_bytes = instance.kv_bytes(row.context)
        rate = self.links.bytes_per_s(owner.device, device)
        move_ns = round(kv_bytes * NS_PER_S / rate) + self.links.latency_ns(owner.device, device)
        return HopFacts(queue_ns, move_ns, again_ns, network, later_ns)

    def _later_ns(self, row: Row, instance: Instance) -> int:
        """What all its later tokens take longer if this instance has its KV from now on."""
        stops = [self.stop(one) for one in row.owners]
        now_ns = path_ns(stops, self.links.between_ns)
        stops[row.place] = self.stop(instance)
        return (path_ns(stops, self.links.between_ns) - now_ns) * self.lengths.more(row.live.generated)
