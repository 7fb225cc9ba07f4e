"""Many models behind one instance, as data: how many, where they are kept, in which order they run.

Knows names and numbers. Must not know tiers at work, costs or policies.
"""

from __future__ import annotations

from typing import Final, Literal

from megalith.base.config import Config
from megalith.specs.bounds import bound

MOST_EXPERTS: Final = 1_000_000


class ExpertsSpec(Config, kw_only=True):
    """Many models of the scenario's shape behind each instance of a pool (SN40L's composition of experts)."""

    count: int
    """Models; requests ask for 0 to count - 1."""
    node: str | None = None
    """A node of the catalogue, for host memory and the path from it; None: the link of the device, and host memory
    that holds all models."""
    slots: int | None = None
    """Models that device memory holds at once; None: what `memory_share` gives."""
    memory_share: float = 0.8
    """Of the device memory that is left beside one model, the part for more models; KV has the rest."""
    order: Literal["grouped", "arrival"] = "grouped"
    """grouped: a turn takes all that wait for its model. arrival: only those directly behind one another (control)."""
    cache: Literal["lru", "lfu", "size"] = "lru"
    """Who makes room on the device."""
    prefetch: bool = False
    """Copy the model of the next turn while this one runs."""
    router: bool = False
    """A model of the same size, always resident, reads each prompt first and names the expert."""
    host_bytes_per_s: float | None = None
    """From host memory to all devices of the instance together, instead of what node or device say."""
    host_bytes: int | None = None
    """Host memory for models; the rest of them is on disk. None: what the node says."""
    disk_bytes_per_s: float = 7e9
    """From disk to host memory: one PCIe 4.0 x4 drive, sequential reads by data sheet. An assumption."""

    def __post_init__(self) -> None:
        bound("count", self.count, 1, MOST_EXPERTS, where=" in experts")
        bound("slots", self.slots, 1, MOST_EXPERTS, where=" in experts")
        bound("memory_share", self.memory_share, 0, 1, where=" in experts")
        bound("host_bytes_per_s", self.host_bytes_per_s, 1e6, 1e15, where=" in experts")
        bound("host_bytes", self.host_bytes, 1, 10**18, where=" in experts")
        bound("disk_bytes_per_s", self.disk_bytes_per_s, 1e6, 1e15, where=" in experts")
