"""Whole chains: the way of a request against all ways there are, the device of a chain, and what answers have left."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from megalith.policy.block_paths import SiteFacts, StopFacts, path, path_ns, site
from megalith.policy.blocks import HopFacts, Lengths, next_hop

stops = st.builds(StopFacts, st.integers(0, 3), st.integers(0, 9), st.integers(0, 9))
chains = st.lists(st.lists(stops, min_size=1, max_size=3), min_size=1, max_size=5)


def crossing_ns(one: int, other: int) -> int:
    return 3 * abs(one - other)


@given(chains)
def test_a_request_takes_the_quickest_of_all_ways(places: list[list[StopFacts]]) -> None:
    chosen = [options[way] for options, way in zip(places, path(places, crossing_ns), strict=True)]
    assert path_ns(chosen, crossing_ns) == min(path_ns(way, crossing_ns) for way in product(*places))


def test_a_round_is_paid_once_on_a_device_and_again_on_the_next() -> None:
    here, there = StopFacts(0, 10, 1), StopFacts(1, 4, 1)
    assert path_ns([here, here], crossing_ns) == 12
    assert path_ns([here, there], crossing_ns) == 19
    # The shorter round does not pay for a way that leaves the device and comes back.
    assert path([[here], [here, there], [here]], crossing_ns) == [0, 0, 0]


def test_a_chain_goes_where_its_blocks_are_unless_too_much_is_there() -> None:
    empty = SiteFacts(100, 0, 40, 0, 20, 0.0, 0.0)
    other = SiteFacts(60, 40, 40, 20, 20, 0.2, 1.0)
    same = SiteFacts(60, 40, 10, 20, 5, 0.0, 1.0)
    assert site([other, empty], 0.1, 1.0, 10, 100, 9.0) == 1
    assert site([other, same], 0.1, 1.0, 10, 100, 9.0) == 1
    assert site([other, same._replace(work=9.0)], 0.1, 1.0, 10, 100, 9.0) == 0
    assert site([other, same._replace(free_bytes=19)], 0.1, 1.0, 10, 100, 9.0) == 0
    assert site([empty], 0.1, 1.0, 61, 100, 9.0) is None
    assert site([empty], 0.1, 1.0, 0, 39, 9.0) is None


@given(st.lists(st.integers(1, 50)), st.integers(0, 60))
def test_what_is_left_is_the_mean_of_those_that_were_longer(ended: list[int], tokens: int) -> None:
    lengths = Lengths()
    for one in ended:
        lengths.add(one)
    longer = [one for one in ended if one > tokens]
    assert lengths.more(tokens) == (sum(longer) // len(longer) - tokens if longer else tokens)


def test_kv_stays_where_later_tokens_would_lose_more_than_the_queue() -> None:
    owner, other = HopFacts(100, 0, 0, 0), HopFacts(0, 20, 90, 5)
    assert next_hop([owner, other]) == 1
    assert next_hop([owner, other._replace(later_ns=80)]) == 0
    assert next_hop([owner, other._replace(later_ns=80)], coordinated=False) == 1
