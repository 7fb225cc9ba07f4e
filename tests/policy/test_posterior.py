"""Scaling on a posterior and in proportion: against brute force, and what is looked at ahead."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.policy.cluster import Command, Headroom, Scale
from megalith.policy.posterior import (
    Capacity,
    PosteriorScaling,
    PosteriorScalingOptions,
    TargetScaling,
    TargetScalingOptions,
    cheapest,
    fewest,
)
from megalith.policy.registry import controller
from megalith.specs.fleet import PolicySpec
from tests.policy.facts import Facts, Seen, many, tick

S = 10**9
LOADS = st.lists(st.floats(0, 50), min_size=1, max_size=30)
CAPACITIES = st.one_of(
    st.floats(0.1, 20),
    st.lists(st.floats(0.1, 9), min_size=1, max_size=6).map(lambda steps: [*accumulate(steps)]),
)  # fmt: skip


class Known:
    """Samples by the time at which they are asked for."""

    def __init__(self, peaks: dict[float, list[float]]) -> None:
        self.known, self.asked = peaks, list[tuple[float, float]]()

    def peaks(self, from_s: float, until_s: float) -> list[float]:
        self.asked.append((from_s, until_s))
        return self.known[from_s]


@given(CAPACITIES, st.floats(0, 1000))
def test_needed_is_the_first_count_that_carries(given_: Any, load: float) -> None:
    capacity = Capacity(given_)
    count = capacity.needed(load)
    assert capacity.of(count) >= load
    assert count == 0 or capacity.of(count - 1) < load


@given(LOADS, CAPACITIES, st.floats(0, 0.99))
def test_fewest_is_the_smallest_count_with_few_samples_above(loads: list[float], given_: Any, eps: float) -> None:
    capacity = Capacity(given_)
    count = fewest(loads, capacity, eps)

    def above(number: int) -> int:
        return sum(load > capacity.of(number) for load in loads)

    allowed = int(eps * len(loads) + 1e-9)
    assert above(count) <= allowed
    assert count == 0 or above(count - 1) > allowed


@given(LOADS, CAPACITIES, st.floats(0.01, 50), st.integers(0, 40))
def test_cheapest_is_that_of_brute_force(loads: list[float], given_: Any, loss: float, most: int) -> None:
    capacity = Capacity(given_)

    def cost(count: int) -> float:
        return count + loss * sum(max(0.0, load - capacity.of(count)) for load in loads) / len(loads)

    assert cost(cheapest(loads, capacity, loss, most)) == pytest.approx(min(map(cost, range(most + 1))), rel=1e-6)


def test_least_cost_is_the_quantile_when_loads_lie_on_the_capacities() -> None:
    """One instance more saves loss * P(load > n) units: worth it while that is above 1, so eps = 1 / loss."""
    loads = [float(load) for load in range(1, 101)]
    for loss in (5.0, 20.0, 50.0):
        assert cheapest(loads, Capacity(1.0), loss * 0.9999, 200) == fewest(loads, Capacity(1.0), 1 / loss)


def scaling(peaks: dict[float, list[float]], **options: Any) -> PosteriorScaling:
    return PosteriorScaling(PosteriorScalingOptions(**options), estimator=Known(peaks))


def said(policy: Any, count: int, at_s: float = 0.0, **facts: Any) -> list[Command]:
    return list(policy.act(tick(round(at_s * S)), Seen(many(*[Facts(**facts)] * count))))


def test_it_starts_what_the_samples_need_and_lets_one_go_when_they_fall() -> None:
    policy = scaling({0.0: [1.0, 2.0, 3.0, 9.0], 60.0: [1.0, 2.0, 3.0, 9.0], 120.0: [2.0]}, eps=0.25)
    assert said(policy, 1) == [Scale("pool", 1)] * 2  # 9 may be missed, 3 may not
    assert said(policy, 1, at_s=60) == []  # two start
    fresh = scaling({120.0: [2.0]})
    assert said(fresh, 4, at_s=120)[0] == Headroom(3, float("inf"))


def test_it_looks_ahead_for_the_start_and_one_period_and_counts_from_its_offset() -> None:
    known = Known({1000.0: [1.0]})
    options = PosteriorScalingOptions(start_s=600, period_s=60, offset_s=1000)
    list(PosteriorScaling(options, estimator=known).act(tick(0), Seen(many(Facts()))))
    assert known.asked == [(1000.0, 1660.0)]


def test_a_point_forecast_sees_the_mean_only() -> None:
    loads = {0.0: [0.0, 0.0, 0.0, 12.0]}
    assert scaling(loads, eps=0.0).wanted(0.0) == 12
    assert scaling(loads, eps=0.0, point=True).wanted(0.0) == 3
    assert scaling(loads, eps=0.0, point=True, margin=2.0).wanted(0.0) == 6
    assert scaling(loads, by="cost", loss_per_load=4.5, max_count=20).wanted(0.0) == 12
    assert scaling(loads, by="cost", loss_per_load=3.5, max_count=20).wanted(0.0) == 0


def test_no_posterior_is_an_error_that_says_where_one_comes_from() -> None:
    with pytest.raises(ConfigError, match="megalith forecast"):
        said(controller(PolicySpec(name="posterior-scaling"), 0), 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        controller(PolicySpec(name="posterior-scaling", options={"path": "/nowhere/at.all"}), 0)
    for wrong in ({"eps": 1.0}, {"capacity_per_s": [2.0, 1.0]}, {"loss_per_load": 0.0}, {"margin": 0.0}):
        with pytest.raises(ConfigError):
            controller(PolicySpec(name="posterior-scaling", options={"path": "x", **wrong}), 0)


def test_in_proportion_more_start_at_once_and_fewer_only_after_the_window() -> None:
    policy = TargetScaling(TargetScalingOptions(target=4.0, stabilise_s=300.0))
    assert said(policy, 2, outstanding=10) == [Scale("pool", 1)] * 3
    policy = TargetScaling(TargetScalingOptions(target=4.0, stabilise_s=300.0))
    assert said(policy, 3, outstanding=4) == []
    assert said(policy, 3, at_s=100, outstanding=1) == []  # three were wished for 100 s ago
    assert said(policy, 3, at_s=299, outstanding=1) == []
    assert said(policy, 3, at_s=400, outstanding=1)[0] == Headroom(2, float("inf"))


def test_in_proportion_a_tenth_off_is_on_target() -> None:
    for outstanding, more in ((43, 0), (45, 2)):
        policy = TargetScaling(TargetScalingOptions(target=40.0))
        assert len(said(policy, 10, outstanding=outstanding)) == more
