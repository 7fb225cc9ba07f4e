"""Residency of whole models: bytes under a cap, who goes first, what a switch copies; against plain lists."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.random import splitmix64
from megalith.cost.expert_cache import lru_hit_rate, popularity
from megalith.policy.experts import CACHE_RULES, CacheRule, Fetch, Residency, WeightTiers

SIZES = (3, 5, 2, 7, 4, 1, 6, 5)


def use(tier: Residency, model: int, size: int = 1) -> tuple[int, ...]:
    return () if tier.use(model) else tier.put(model, size)


@given(st.lists(st.integers(0, 7), max_size=80), st.integers(7, 20))
@settings(max_examples=150)
def test_lru_is_a_list_in_the_order_of_use(references: list[int], cap: int) -> None:
    tier, order, hits = Residency(cap), list[int](), 0
    for model in references:
        gone = use(tier, model, SIZES[model])
        if model in order:
            hits += 1
            order.remove(model)
        expected = []
        while sum(SIZES[one] for one in order) + SIZES[model] > cap:
            expected.append(order.pop(0))
        order.append(model)
        assert list(gone) == expected
        assert tier.models() == order
        assert tier.used_bytes == sum(SIZES[one] for one in order) <= cap
    assert (tier.hits, tier.misses) == (hits, len(references) - hits)


@given(
    st.sampled_from(CACHE_RULES),
    st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 7), max_size=2), st.booleans()), max_size=60),
    st.integers(7, 20),
)
@settings(max_examples=150)
def test_every_rule_keeps_the_cap_and_those_that_must_stay(
    rule: CacheRule, calls: list[tuple[int, set[int], bool]], cap: int
) -> None:
    tier = Residency(cap, rule)
    for model, keep, drops in calls:
        before, used = set(tier.models()), tier.used_bytes
        try:
            gone = tier.put(model, SIZES[model], keep)
        except DoesNotFit:
            assert sum(SIZES[one] for one in keep & before) + SIZES[model] > cap
            assert (set(tier.models()), tier.used_bytes) == (before, used)
            continue
        assert model in tier
        assert not keep & set(gone)
        assert set(tier.models()) == before - set(gone) | {model}
        assert tier.used_bytes == sum(SIZES[one] for one in tier.models()) <= cap
        if drops:
            tier.drop(model)
            assert model not in tier


def test_lfu_keeps_the_often_used_and_size_counts_bytes() -> None:
    lfu = Residency(2, "lfu")
    for model in (0, 0, 0, 1):
        use(lfu, model)
    assert use(lfu, 2) == (1,), "0 was used three times"
    by_size = Residency(10, "size")
    use(by_size, 0, 8)
    use(by_size, 1, 2)
    assert use(by_size, 2, 2) == (0,), "one use for 8 bytes is less than one for 2"


def test_age_counts_where_size_does() -> None:
    tier = Residency(2, "size")
    for _ in range(3):
        use(tier, 0)
    for model in (1, 2, 3, 4, 5):  # each makes the next newcomer worth as much as the last that went
        use(tier, model)
    assert 0 not in tier, "used three times, long ago"


@pytest.mark.parametrize("zipf", [0.0, 0.7, 1.1])
@pytest.mark.parametrize("slots", [5, 40])
def test_lru_hits_as_often_as_che_says(zipf: float, slots: int) -> None:
    shares = popularity(100, zipf)
    bounds = [sum(shares[: k + 1]) for k in range(100)]
    tier, draws = Residency(slots), 12_000
    for number in range(draws):
        point = splitmix64(1, number) / 2**64
        use(tier, next((k for k, bound in enumerate(bounds) if point < bound), 99))
    assert tier.hits / draws == pytest.approx(lru_hit_rate(shares, slots), abs=0.02)


def test_a_switch_copies_from_the_next_tier_that_has_the_model() -> None:
    tiers = WeightTiers((10, 10, 10, 10), Residency(20), Residency(30))
    tiers.fill(range(4))
    assert tiers.device.models() == [1, 0], "the most wanted goes last"
    assert tiers.need(0) == Fetch(0)
    assert tiers.need(2) == Fetch(2, 10, 0, (1,)), "host memory has it"
    # Host memory is asked for all that is used: 1 is the one that was not for longest.
    assert tiers.need(3) == Fetch(3, 10, 10, (0,), (1,)), "only the disk has it"
    assert tiers.need(1) == Fetch(1, 10, 10, (2,), (0,))
    assert tiers.device.used_bytes == 20
    assert (tiers.device.hits, tiers.device.misses) == (1, 3)


def test_a_prefetch_displaces_nobody_who_runs_and_is_no_hit() -> None:
    tiers = WeightTiers((10, 10, 10), Residency(20))
    tiers.need(0)
    assert tiers.prefetch(1, (0,)) == Fetch(1, 10)
    assert tiers.prefetch(1, (0,)) is None, "it is here"
    assert tiers.prefetch(2, (0, 1)) is None, "no room beside both"
    assert tiers.device.misses == 1
    assert tiers.need(1).hit


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="does not fit a tier"):
        WeightTiers((10, 30), Residency(20))
    with pytest.raises(ConfigError, match="lru"):
        Residency(10, "fifo")  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        Residency(10).drop(1)
