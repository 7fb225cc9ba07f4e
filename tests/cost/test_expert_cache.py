"""Popularity and Che's approximation: exact where it is, bounds where it is not."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megalith.base.errors import ConfigError
from megalith.cost.expert_cache import characteristic_time, distinct, lru_hit_rate, popularity


@pytest.mark.parametrize("zipf", [0.0, 0.5, 1.0, 2.0])
def test_shares_add_up_and_fall(zipf: float) -> None:
    shares = popularity(150, zipf)
    assert sum(shares) == pytest.approx(1.0)
    assert list(shares) == sorted(shares, reverse=True)
    assert shares[0] / shares[9] == pytest.approx(10**zipf)


@pytest.mark.parametrize("slots", [1, 35, 149])
def test_uniform_popularity_hits_by_the_part_that_is_there(slots: int) -> None:
    assert lru_hit_rate(popularity(150), slots) == pytest.approx(slots / 150)


def test_more_room_and_more_skew_hit_more_often() -> None:
    rates = [[lru_hit_rate(popularity(150, zipf), slots) for slots in (0, 5, 50, 100, 150, 999)]
             for zipf in (0.0, 0.8, 1.6)]  # fmt: skip
    for line in rates:
        assert line[0] == 0.0
        assert line[-2:] == [1.0, 1.0]
        assert line == sorted(line)
    for less, more in pairwise(rates):
        assert all(b > a for a, b in zip(less[1:4], more[1:4], strict=True))


def test_two_models_and_one_place_by_hand() -> None:
    """T solves exp(-pT) + exp(-qT) = 1; the hit rate is p (1 - exp(-pT)) + q (1 - exp(-qT))."""
    from math import exp

    time = characteristic_time((0.75, 0.25), 1)
    assert exp(-0.75 * time) + exp(-0.25 * time) == pytest.approx(1.0)
    by_hand = 1.0 - 0.75 * exp(-0.75 * time) - 0.25 * exp(-0.25 * time)
    assert lru_hit_rate((0.75, 0.25), 1) == pytest.approx(by_hand)


def test_different_models_of_a_batch() -> None:
    assert distinct(popularity(150), 1) == pytest.approx(1.0)
    assert distinct((0.5, 0.5), 2) == pytest.approx(1.5)
    assert 7.8 < distinct(popularity(150), 8) < 8.0
    assert distinct(popularity(150, 1.2), 8) < distinct(popularity(150), 8)


@pytest.mark.parametrize(("models", "zipf"), [(0, 0.0), (5, -1.0), (5, float("nan"))])
def test_nonsense_is_refused(models: int, zipf: float) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        popularity(models, zipf)
