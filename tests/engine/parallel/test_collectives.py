"""Sums over ranks: right, the same bits everywhere and every time, as slow as the link says, and never a hang."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.cost.collective import Collective, Link, all_reduce_ns, crossover_ns
from megalith.engine.batch import F32
from megalith.engine.parallel.collectives import PeerLost
from tests.engine.parallel.together import close, together, wired

MS = 1_000_000


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 5), st.sampled_from(["star", "ring"]), st.integers(1, 40), st.integers(0, 2**32 - 1),
    st.sampled_from([1, 900]),
)  # fmt: skip
def test_sums_are_right_and_the_same_bits_on_every_rank(
    size: int, collective: Collective, rows: int, seed: int, width: int
) -> None:
    values = np.random.default_rng(seed).normal(size=(size, rows, width)).astype(np.float32)
    ranks = wired(size, collective)
    try:
        first, second = (together(ranks, lambda rank: rank.all_reduce(values[rank.rank])) for _ in range(2))
        np.testing.assert_allclose(first[0], values.astype(np.float64).sum(axis=0), atol=1e-5)
        for found in (*first, *second):
            assert found.shape == (rows, width)
            assert (found == first[0]).all()
    finally:
        close(ranks)


def test_the_star_adds_in_the_order_of_ranks() -> None:
    values = np.array([[1e8], [1.0], [-1e8], [1.0]], np.float32)
    ranks = wired(4, "star")
    try:
        found = together(ranks, lambda rank: rank.all_reduce(values[rank.rank]))
        assert found[3][0] == ((np.float32(1e8) + np.float32(1)) + np.float32(-1e8)) + np.float32(1)
    finally:
        close(ranks)


def timed(collective: Collective, link: Link, values: F32, size: int = 4) -> float:
    """Nanoseconds of the fastest of three all-reduces on the slowest rank: a busy machine only adds."""
    ranks = wired(size, collective, link)
    try:
        taken = []
        for _ in range(3):
            begin = time.monotonic_ns()
            together(ranks, lambda rank: rank.all_reduce(values))
            taken.append(time.monotonic_ns() - begin)
        return min(taken)
    finally:
        close(ranks)


@pytest.mark.parametrize("collective", ["star", "ring"])
def test_an_imposed_link_takes_the_time_of_the_formula(collective: Collective) -> None:
    values = np.ones((64, 1024), np.float32)  # 256 KiB
    link = Link(latency_ns=20 * MS, bytes_per_s=20_000_000)
    predicted = all_reduce_ns(collective, values.nbytes, 4, link)
    found = timed(collective, link, values)
    assert 0.99 * predicted < found < predicted + 60 * MS


def test_beyond_the_crossover_the_star_is_faster_and_before_it_the_ring() -> None:
    values = np.ones((16, 1024), np.float32)
    rate = 2_000_000
    at = crossover_ns(values.nbytes, 4, Link(bytes_per_s=rate))
    assert at is not None
    for collective in ("star", "ring"):
        assert all_reduce_ns(collective, values.nbytes, 4, Link(latency_ns=round(at), bytes_per_s=rate)) == (
            pytest.approx(all_reduce_ns("star", values.nbytes, 4, Link(latency_ns=round(at), bytes_per_s=rate)))
        )
    for factor, faster in ((0.0, "ring"), (3.0, "star")):
        link = Link(latency_ns=round(factor * at), bytes_per_s=rate)
        star, ring = timed("star", link, values), timed("ring", link, values)
        assert (star < ring) == (faster == "star")
    assert crossover_ns(values.nbytes, 2, Link(bytes_per_s=rate)) is None, "two ranks have two hops either way"


@pytest.mark.parametrize("collective", ["star", "ring"])
def test_a_rank_that_goes_or_is_silent_is_an_error_on_the_others(collective: Collective) -> None:
    ranks = wired(3, collective, deadline_s=0.5)
    try:
        for channel in ranks[2].channels.values():
            channel.sock.close()
        with pytest.raises(PeerLost, match="rank 2"):
            ranks[0].all_reduce(np.ones(4, np.float32)) if collective == "ring" else together(
                ranks[:2], lambda rank: rank.all_reduce(np.ones(4, np.float32))
            )
    finally:
        close(ranks)
    ranks = wired(2, collective, deadline_s=0.2)
    try:
        with pytest.raises(PeerLost, match=r"did not answer within 0\.2 s"):
            ranks[0].all_reduce(np.ones(4, np.float32))
    finally:
        close(ranks)
