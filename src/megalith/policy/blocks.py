"""Decisions of a fleet that serves blocks: which instance is next, where one is placed, when to begin ahead.

    cost of a hop = queue time + min(transfer of KV, recompute) + network        (BlockLLM's best-effort coordination)
                    + what each later token takes longer that way

Without the last term KV goes back and forth: a queue is over in milliseconds, while KV that has left stays away. Pure:
facts in, decisions out. Ties go to the first. Knows no clock and no event.
"""

from __future__ import annotations

from bisect import bisect_right, insort
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
    later_ns: int = 0
    """All later tokens together, over what they take with the KV where it is; below 0 where they are quicker."""


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
    return facts.queue_ns + min(facts.transfer_ns, facts.recompute_ns) + facts.network_ns + facts.later_ns


class Lengths:
    """What answers of the past say of how much is still to come. Knows only those that have ended."""

    def __init__(self) -> None:
        self._ended: list[int] = []

    def add(self, tokens: int) -> None:
        """One more has ended, at so many tokens."""
        insort(self._ended, tokens)

    def more(self, tokens: int) -> int:
        """Expected after so many: the mean over all that were longer; as many again where none was."""
        longer = self._ended[bisect_right(self._ended, tokens) :]
        return sum(longer) // len(longer) - tokens if longer else tokens


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


class QueueFacts(NamedTuple):
    """One queue of a device that has rows."""

    base: str
    place: int
    """Of its block in a chain."""
    unit: int
    head_ns: int
    """Since when its first row waits."""


def turn(queues: Sequence[QueueFacts], last: tuple[str, int, int]) -> int:
    """Which queue of a device runs next; `last` is (base, place, unit) of the one before.

    A device goes on along the chains of one base, so that rows at different places meet and one step serves them; at
    the end of the chains the base whose rows have waited longest is next, from its first block on.
    """
    onward = [(one.place, one.unit, number) for number, one in enumerate(queues)
              if one.base == last[0] and (one.place, one.unit) > last[1:]]  # fmt: skip
    if onward:
        return min(onward)[-1]
    oldest = min(queues, key=lambda one: (one.head_ns, one.unit)).base
    return min((one.place, one.unit, number) for number, one in enumerate(queues) if one.base == oldest)[-1]
