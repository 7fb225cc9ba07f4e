"""Designs of prompt and token machines: published sizes from budgets, choice against trying every size."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import CapacityError, ConfigError
from megalith.plan.machine_design import Machine, Mix, Rated, choose, mix_of, valley
from megalith.studies.splitwise_designs import CAPPED, NEW, OLD, POWER


@pytest.mark.parametrize(
    ("design", "prompt", "token", "share", "sizes"),
    [
        ("Base-A100", OLD, None, 1.0, (70, 0)),
        ("Base-H100", NEW, None, 1.0, (40, 0)),
        ("HH", NEW, NEW, 0.625, (25, 15)),
        ("HA", NEW, OLD, 0.625, (25, 26)),
        ("HHcap", NEW, CAPPED, 0.625, (25, 21)),
        ("AA", OLD, OLD, 0.634, (45, 25)),
    ],
)
def test_published_clusters_of_equal_power_follow_from_their_share(
    design: str, prompt: Machine, token: Machine | None, share: float, sizes: tuple[int, int]
) -> None:
    mix = mix_of(design, prompt, token, POWER, share)
    assert (mix.prompts, mix.tokens) == sizes
    assert mix.power <= POWER


def test_the_published_cluster_of_equal_cost_costs_the_same() -> None:
    assert Mix("HA", NEW, 30, OLD, 21).cost == pytest.approx(40 * NEW.cost, rel=0.01)
    assert Mix("Base-A100", OLD, 86).cost == pytest.approx(40 * NEW.cost, rel=0.01)


RATED = st.lists(
    st.builds(
        lambda prompts, tokens, rate: Rated(Mix("x", NEW, prompts, OLD, tokens), rate),
        st.integers(1, 40), st.integers(1, 40), st.floats(0.0, 200.0),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@given(rated=RATED, cost=st.floats(10, 400), power=st.floats(100, 4000))
def test_the_fastest_is_the_fastest_of_all_sizes_within_the_budgets(
    rated: list[Rated], cost: float, power: float
) -> None:
    rates = [
        times / 100 * one.rate
        for one in rated
        for times in range(1, 1001)
        if times / 100 * one.mix.cost <= cost and times / 100 * one.mix.power <= power
    ]
    if not any(one.rate > 0 for one in rated):
        with pytest.raises(CapacityError):
            choose(rated, "rate", cost=cost, power=power)
        return
    best = choose(rated, "rate", cost=cost, power=power)
    assert best.cost <= cost * (1 + 1e-6)
    assert best.power <= power * (1 + 1e-6)
    assert best.rate >= max(rates, default=0.0) * (1 - 1e-6)


@given(rated=RATED, rate=st.floats(1, 300), objective=st.sampled_from(["cost", "power"]))
def test_the_cheapest_serves_the_rate_and_nothing_is_cheaper(rated: list[Rated], rate: float, objective: str) -> None:
    able = [one for one in rated if one.rate > 0 and rate / one.rate < math.inf]
    if not able:
        with pytest.raises(CapacityError):
            choose(rated, objective, rate=rate)  # type: ignore[arg-type]
        return
    best = choose(rated, objective, rate=rate)  # type: ignore[arg-type]
    assert best.rate == pytest.approx(rate)
    least = min(rate / one.rate * getattr(one.mix, objective) for one in able)
    assert getattr(best, objective) == pytest.approx(least)


def test_the_valley_is_what_comes_close_to_the_best_of_a_design() -> None:
    mixes = [Mix("AA", OLD, n, OLD, 70 - n) for n in (30, 40, 50)]
    rated = [Rated(mix, rate) for mix, rate in zip(mixes, (90.0, 100.0, 96.0), strict=True)]
    assert valley(rated, "AA") == mixes[1:]
    assert valley(rated, "HH") == []
    assert valley([Rated(mixes[0], 0.0)], "AA") == []


def test_questions_without_an_answer() -> None:
    rated = [Rated(Mix("AA", OLD, 45, OLD, 25), 100.0)]
    with pytest.raises(ConfigError, match="no size"):
        choose(rated, "rate")
    with pytest.raises(ConfigError, match="no load"):
        choose(rated, "cost")
    with pytest.raises(CapacityError, match="500 requests"):
        choose(rated, "cost", rate=500.0, power=POWER)
    with pytest.raises(ConfigError, match="no room"):
        mix_of("HH", NEW, NEW, 50.0, 0.5)
