"""Whole chains: on which device one is placed, and on which instances a request takes its way through it.

A device reads the weights of every block that it serves once in each round, and a token waits for that round. So

    cost of placing = its share x (blocks there + blocks that lack) + the share that is there x those that lack

and a request's way costs a round for every device that it enters. BlockLLM places chains by locality and looks at the
next hop; what a chain costs as a whole is what tells a good next hop from a bad one. Pure: facts in, decisions out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple


class SiteFacts(NamedTuple):
    """One device that could serve a chain."""

    free_bytes: int
    """Beside weights and the KV that was promised."""
    weights_bytes: int
    missing_bytes: int
    """Of the blocks of the chain that it lacks."""
    round_ns: int
    """To read all blocks that it has, once each."""
    missing_ns: int
    """To read those that it lacks."""
    share: float
    """Of all requests, those that are expected there."""
    work: float
    """What those compute, in any unit that is the same for all."""


class StopFacts(NamedTuple):
    """One instance that could serve one place of a request's chain."""

    device: int
    round_ns: int
    """A token for each request of the device; paid by who enters it."""
    work_ns: int
    """What this request adds to a round there."""


def site(
    sites: Sequence[SiteFacts], share: float, work: float, kv_bytes: int, most_weights_bytes: int, most_work: float
) -> int | None:
    """The device for a chain that `share` of the requests takes; None when it fits on none as a whole.

    Of those that would compute at most `most_work` the one with the least cost (see the module), then the least work.
    """
    fits = [
        (one.work + work > most_work, share * (one.round_ns + one.missing_ns) + one.share * one.missing_ns,
         one.work, number)
        for number, one in enumerate(sites)
        if one.free_bytes >= one.missing_bytes + kv_bytes
        and one.weights_bytes + one.missing_bytes <= most_weights_bytes
    ]  # fmt: skip
    return min(fits)[-1] if fits else None


def path(places: Sequence[Sequence[StopFacts]], crossing_ns: Callable[[int, int], int]) -> list[int]:
    """Which option of each place: the way through the chain that takes a token least. Ties go to the first.

    Exact, by dynamic programming over the places. `crossing_ns(device, other)` is for the hidden values.
    """
    costs = [one.round_ns + one.work_ns for one in places[0]]
    back: list[list[int]] = []
    for before, options in pairwise(places):
        found = []
        for one in options:
            ways = [
                (
                    cost + (0 if last.device == one.device else one.round_ns + crossing_ns(last.device, one.device)),
                    number,
                )
                for number, (cost, last) in enumerate(zip(costs, before, strict=True))
            ]
            found.append((min(ways), one.work_ns))
        costs = [way[0] + work_ns for way, work_ns in found]
        back.append([way[1] for way, _ in found])
    chosen = [costs.index(min(costs))]
    for step in reversed(back):
        chosen.append(step[chosen[-1]])
    return chosen[::-1]


def path_ns(stops: Sequence[StopFacts], crossing_ns: Callable[[int, int], int]) -> int:
    """What a token takes on one way; see `path`."""
    total = stops[0].round_ns + stops[0].work_ns
    for before, one in pairwise(stops):
        total += one.work_ns
        if one.device != before.device:
            total += one.round_ns + crossing_ns(before.device, one.device)
    return total
