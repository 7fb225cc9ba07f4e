"""Weights that are streamed from a disk in every step: memory and time.

    time of a step = max(time with all weights in memory, bytes streamed / disk rate)

Reads go on behind the computing, and on into the next step, so that only the slower of the two shows. Knows no disk.
"""

from __future__ import annotations

import msgspec

from megalith.base.config import Config
from megalith.base.units import NS_PER_S
from megalith.cost.compute import CostModel, StepCost, StepShape
from megalith.cost.memory import WeightBytes
from megalith.cost.profile import Profile

ASSUMED_DISK_BYTES_PER_S = 1e9
"""Of a disk that was not measured: a slow NVMe drive."""


class DiskRate(Config, kw_only=True):
    """What a disk gives to several direct readers at once, and where the figure comes from."""

    bytes_per_s: float
    source: str


def disk_rate(profile: Profile) -> DiskRate:
    """What `probe` measured, else an assumption."""
    measured = profile.raw.get("disk_sequential_read_bytes_per_s")
    if measured:
        return DiskRate(bytes_per_s=measured, source="measured by probe")
    return DiskRate(bytes_per_s=ASSUMED_DISK_BYTES_PER_S, source="assumed; `probe` measures it")


def piece_bytes(weights: WeightBytes, limit_bytes: int) -> tuple[list[int], int]:
    """(bytes of the pieces that stream, the first of the head): layers, then the head, in pieces of the limit."""
    sizes = []
    for part in (weights.layers, weights.head):
        pieces = -(-part // limit_bytes)
        sizes.append([-(-part // pieces)] * pieces if part else [])
    return [*sizes[0], *sizes[1]], len(sizes[0])


def windowed(weights: WeightBytes, window_bytes: int) -> WeightBytes:
    """What is in memory: the window, and norms and biases. An embedding table that is no head is read by the row."""
    source = f"window of {weights.total:,} B: what stays, and a ring that the rest streams through"
    return msgspec.structs.replace(weights, layers=window_bytes, experts=0, head=0, tables=0, source=source)


class StreamingCostModel(CostModel):
    """A CostModel whose steps wait for a disk."""

    def __init__(self, cost: CostModel, stream_bytes: int, bytes_per_s: float) -> None:
        super().__init__(cost.spec, cost.profile, cost.weights, cost.kv_format, cost.devices)
        self.stream_ns = round(stream_bytes * NS_PER_S / bytes_per_s)

    def step(self, shape: StepShape) -> StepCost:
        """See CostModel; the disk counts as a link."""
        cost = super().step(shape)
        return StepCost(
            max(cost.duration_ns, self.stream_ns), cost.compute_ns, cost.memory_ns, cost.link_ns + self.stream_ns,
            cost.fixed_ns,
        )  # fmt: skip
