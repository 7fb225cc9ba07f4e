"""What comes of a run of a fleet that serves blocks.

Knows figures; must not know how they came about.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalith.sim.record_figures import RecordFigures
from megalith.specs.blocks import BlockScenario


@dataclass(slots=True)
class BlockCounters:
    """What the fleet did beside computing."""

    hops: int = 0
    messages: int = 0
    kv_moves: int = 0
    recomputes: int = 0
    stood_in: int = 0
    """Hops at admission that went to an equivalent block."""
    trials: int = 0
    redone: int = 0
    added: int = 0
    removed: int = 0


@dataclass(slots=True)
class BlockResult:
    """What came of a run; simulated."""

    scenario: BlockScenario
    figures: RecordFigures
    digest: str
    events: int
    requests: int
    end_ns: int
    busy_share: float
    """Of all devices, from the first arrival to the last one."""
    compute_share: float
    """FLOPs of the linear layers that requests need, done by then, over what the devices can do at their peak."""
    batch: float
    """Rows of a step, on average."""
    weights_bytes: int
    """Of all instances at the end."""
    unit_bytes: int
    """Of one copy of each unit: what must be stored."""
    instances: int
    counters: BlockCounters
