"""The weights of many models behind one simulated instance: what a switch copies, and how long that takes.

One copier for each instance: copies run one after the other, in integer picoseconds, beside what the device computes.
Knows bytes and rates; must not know requests.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from megalith.base.units import NS_PER_S, format_bytes, format_duration
from megalith.cost.timer import PS_PER_NS
from megalith.policy.experts import Fetch, ModelId, Residency, WeightTiers
from megalith.specs.experts import ExpertsSpec


class ExpertShape(NamedTuple):
    """What all instances of a pool have in common."""

    options: ExpertsSpec
    weight_bytes: int
    """Of one model, as it is read."""
    held_bytes: int
    """Of one model, as it lies on all devices of an instance; vectors are on each."""
    device_bytes: int
    """Device memory of an instance for models, without the router's."""
    host_bytes: int | None
    """Host memory of an instance for models; None: for all of them."""
    host_bytes_per_s: float
    disk_bytes_per_s: float
    source: str
    """Where the rates come from."""

    @property
    def slots(self) -> int:
        """Models that are on the device at once."""
        return min(self.options.count, self.device_bytes // self.held_bytes)

    def words(self, pool: str) -> str:
        """One line for people."""
        switch = format_duration(self.copy_ps(self.weight_bytes, 0) / PS_PER_NS)
        return (
            f"Pool {pool}: {self.options.count:,} models of {format_bytes(self.weight_bytes)}, {self.slots:,} at once "
            f"on the device; a switch takes {switch} at {self.host_bytes_per_s / 1e9:,.0f} GB/s: {self.source}."
        )

    def copy_ps(self, host_bytes: int, disk_bytes: int) -> int:
        """Time of a copy from host memory, after one from disk into it where it was not there."""
        per_s = NS_PER_S * PS_PER_NS
        return round(host_bytes * per_s / self.host_bytes_per_s) + round(disk_bytes * per_s / self.disk_bytes_per_s)


class ExpertCounters:
    """What happened since the start, over all instances that share it."""

    __slots__ = ("copied_bytes", "copy_ps", "disk_bytes", "prefetched", "requests", "switches", "turns", "wait_ps")

    def __init__(self) -> None:
        self.requests = self.turns = self.switches = self.prefetched = 0
        """Requests that had a turn; turns; models copied to the device, and those of them ahead of their turn."""
        self.copied_bytes = self.disk_bytes = 0
        """From host memory, and from disk before that."""
        self.copy_ps = self.wait_ps = 0
        """Time in copies, and the part of it that an instance waited."""

    @property
    def hit_rate(self) -> float:
        """The share of requests whose model was on the device, or was brought by another one of their turn."""
        return 1.0 - self.switches / self.requests if self.requests else float("nan")

    def words(self) -> str:
        """One line for people."""
        ahead = f" ({self.prefetched:,} ahead of their turn)" if self.prefetched else ""
        disk = f", {format_bytes(self.disk_bytes)} of it from disk" if self.disk_bytes else ""
        return (
            f"Models (simulated): {self.turns:,} turns of {self.requests / max(1, self.turns):.2f} requests, "
            f"{self.switches:,} switches{ahead}, {self.hit_rate:.1%} of requests found theirs on the device; "
            f"{format_bytes(self.copied_bytes)} copied{disk}, {format_duration(self.wait_ps / PS_PER_NS)} waited for."
        )


class ExpertWeights:
    """See the module. At the start the first models fill each tier: model 0 is the most wanted."""

    def __init__(self, shape: ExpertShape, counters: ExpertCounters) -> None:
        self.shape, self.counters = shape, counters
        options = shape.options
        host = None if shape.host_bytes is None else Residency(shape.host_bytes, options.cache)
        sizes = (shape.held_bytes,) * options.count
        self.tiers = WeightTiers(sizes, Residency(shape.device_bytes, options.cache), host)
        self.tiers.fill(range(options.count))
        self._free_ps = 0
        """When the copier is done."""
        self._ready_ps: dict[ModelId, int] = {}
        """When models that were copied ahead of their turn are there."""

    def need(self, model: ModelId, now_ps: int) -> int:
        """A step is to run a model now. Returns the time until it can."""
        fetch = self.tiers.need(model)
        ready_ps = self._ready_ps.pop(model, now_ps) if fetch.hit else self._copy(fetch, now_ps)
        wait_ps = max(0, ready_ps - now_ps)
        self.counters.wait_ps += wait_ps
        return wait_ps

    def prefetch(self, model: ModelId, now_ps: int, keep: Collection[ModelId]) -> None:
        """A model will be needed after those of `keep`: begin to copy it, where there is room."""
        fetch = self.tiers.prefetch(model, keep)
        if fetch is not None:
            self.counters.prefetched += 1
            self._ready_ps[model] = self._copy(fetch, now_ps)

    def _copy(self, fetch: Fetch, now_ps: int) -> int:
        """Returns when it is done."""
        for gone in fetch.evicted:
            self._ready_ps.pop(gone, None)
        weight_bytes = self.shape.weight_bytes
        disk_bytes = weight_bytes if fetch.disk_bytes else 0
        duration_ps = self.shape.copy_ps(weight_bytes, disk_bytes)
        counters = self.counters
        counters.switches += 1
        counters.copied_bytes += weight_bytes
        counters.disk_bytes += disk_bytes
        counters.copy_ps += duration_ps
        self._free_ps = max(self._free_ps, now_ps) + duration_ps
        return self._free_ps
