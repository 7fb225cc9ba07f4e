"""Decisions of a fleet that serves blocks: which instance is next, where one is placed, when to begin ahead.

    cost of a hop = queue time + min(transfer of KV, recompute) + network        (BlockLLM's best-effort coordination)

Pure: facts in, decisions out. Ties go to the first. Knows no clock and no event.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class HopFacts(NamedTuple):
    """One instance that could take the next hop of a request."""

    queue_ns: int
    """Until it would begin."""
    transfer_ns: int
    """To bring the KV of the request there; 0 for who has it."""
    recompute_ns: int
    """To compute it there again; 0 for who has it."""
    network_ns: int
    """For the hidden values to get there."""


class DeviceFacts(NamedTuple):
    """One device that could take one more instance."""

    free_bytes: int
    """Beside weights and the KV that was promised."""
    weights_bytes: int
    load: float
    """What its requests take for a token each, or what is expected of them."""
    neighbours: float
    """Popularity of the chains that this device could serve on; those on its server count half."""


def hop_cost_ns(facts: HopFacts) -> int:
    """See the module."""
    return facts.queue_ns + min(facts.transfer_ns, facts.recompute_ns) + facts.network_ns


def next_hop(options: Sequence[HopFacts], coordinated: bool = True) -> int:
    """Which of the options; without coordination the shortest queue, wherever the KV is."""
    costs = [hop_cost_ns(one) if coordinated else one.queue_ns for one in options]
    return costs.index(min(costs))


def occupancy(present: int, waiting: int, most: int) -> float:
    """Of an instance that may have `most` requests at once."""
    return (present + waiting) / most


def place(
    devices: Sequence[DeviceFacts],
    num_bytes: int,
    kv_bytes: int,
    most_weights_bytes: int,
    most_load: float,
    locality: bool,
) -> int | None:
    """The device for one more instance of `num_bytes`; None when no device has room for it and `kv_bytes` of KV.

    With locality the one that is nearest to the rest of its chains, of those whose load is at most `most_load`, which
    is in the unit of the loads; without, and where all are alike, the one with the least load.
    """
    fits = [
        (one.load > most_load, -round(one.neighbours * 1e6) if locality else 0, one.load, one.weights_bytes, number)
        for number, one in enumerate(devices)
        if one.free_bytes >= num_bytes + kv_bytes and one.weights_bytes + num_bytes <= most_weights_bytes
    ]
    return min(fits)[-1] if fits else None


def begins_ahead(own_queue: int, next_queue: int, next_busy: bool, surrogate_ns: int, step_ns: int) -> bool:
    """Whether a surrogate should run for a hop that crosses servers: only in time that nobody else wants.

    Nobody waits on either device and the surrogate is quicker than the block.
    """
    return own_queue == 0 and next_queue == 0 and not next_busy and surrogate_ns < step_ns


def turn(queues: Sequence[tuple[int, int, int]]) -> int:
    """Which queue of a device runs next, of (arrival of its head, place in the chain, time of a step) each.

    The oldest, but those behind in their chains may overtake by as much as the steps between them take: then they
    meet those ahead and one step serves both.
    """
    keys = [head_ns + place * step_ns for head_ns, place, step_ns in queues]
    return keys.index(min(keys))
