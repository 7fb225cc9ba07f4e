"""NodeSpec: a server with its devices, its slower memory and the path between them, as published.

Knows figures and their sources. Must not know models or formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from megalith.base.config import Config
from megalith.specs import catalog


class NodeSpec(Config, kw_only=True):
    """One node. A profile: figures of makers and papers, none measured here."""

    title: str
    device: str
    """Name of a catalogue device."""
    devices: int
    host_memory_bytes: int
    """Memory behind that of the devices: DDR attached to them, or that of the host."""
    host_bytes_per_s: int
    """From there to device memory, for one model that is cut over all devices, as the paper counts it."""
    host_links_bytes_per_s: int
    """The same if every link of the node carried its own share at its rated speed."""
    published_capacity_bytes: int
    """Device memory of the node as its maker counts it."""
    source: str
    date: str


@functools.cache
def nodes() -> Mapping[str, NodeSpec]:
    """Every node of the catalogue by its name."""
    return catalog.entries("nodes", "nodes", NodeSpec)


def node(name: str) -> NodeSpec:
    """The node of that name. Raises ConfigError with the nearest names."""
    return catalog.named(name, nodes(), "node")
