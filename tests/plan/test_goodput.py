"""Goodput: the search against a scan, runs that are long enough, one phase alone against closed forms, errors."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.plan.goodput import GoodputQuestion, alone, goodput, highest, hold, try_rate
from megalith.sim.scenario import Scenario
from megalith.specs.arrivals import SteadyArrivals
from megalith.studies.distserve_cases import colocated, fixed, scenario, split

DECODE_MS = 23.475041 + 2
"""A step of a lone decode but for its context, with vLLM's step times."""


def asked(point: Scenario, **more: float | int) -> GoodputQuestion:
    base = {"step": 1.1, "least_requests": 60, "residences": 0.0}
    return GoodputQuestion(scenario=point, guess_per_s=4.0, **(base | more))  # type: ignore[arg-type]


def figure1(tpot_ms: float = 40, fleet: str = "colocated", seed: int = 0) -> Scenario:
    return scenario(colocated() if fleet == "colocated" else split(2, 1), fixed(), "vllm", 400, tpot_ms, seed)


@given(low=st.integers(-300, 0), width=st.integers(0, 600), start=st.integers(-400, 700), limit=st.integers(-350, 700))
def test_the_ladder_is_searched_as_by_trying_every_rung(low: int, width: int, start: int, limit: int) -> None:
    high, tried = low + width, []

    def keeps(rung: int) -> bool:
        tried.append(rung)
        return rung <= limit

    kept = [rung for rung in range(low, high + 1) if rung <= limit]
    assert highest(keeps, start, low, high) == (kept[-1] if kept else None)
    assert len(tried) == len(set(tried)) <= 22
    assert all(low <= rung <= high for rung in tried)


def test_goodput_is_the_highest_rate_of_a_scan() -> None:
    question = asked(figure1())
    found = goodput(question)
    kept = [rung for rung in range(-10, 25) if try_rate(question.scenario, 1.1**rung, 60).kept]
    assert found.rate_per_s == pytest.approx(1.1 ** max(kept))
    assert found.broken_per_s == pytest.approx(found.rate_per_s * 1.1)
    assert not try_rate(question.scenario, found.broken_per_s or 0.0, 60).kept
    assert found.breaks == "tpot=40ms"
    assert found.attained >= 0.9
    assert found.per_device_per_s == found.rate_per_s


def test_a_run_lasts_as_long_as_it_was_asked_to() -> None:
    """20 requests are two residence times here; ten are asked for."""
    short = asked(figure1(200), least_requests=20)
    trial = hold(short, 4.0)
    assert trial.residences < 10
    long = hold(msgspec.structs.replace(short, residences=10.0), 4.0)
    assert long.residences >= 10
    assert long.requests > trial.requests


def test_limits_that_a_lone_request_breaks_have_no_goodput() -> None:
    found = goodput(asked(figure1(tpot_ms=DECODE_MS - 1)))
    assert (found.rate_per_s, found.attained, found.broken_per_s) == (0.0, 0.0, pytest.approx(0.01, rel=0.06))
    assert found.breaks.startswith("tpot=24.475")


def test_prompts_alone_reach_the_rate_at_which_one_takes_the_gap_between_two() -> None:
    """Fixed arrivals, one prompt a step: nothing waits below 1 / D, everything above."""
    point = figure1(fleet="split")
    load = msgspec.structs.replace(point.workload, arrivals=SteadyArrivals(rate_per_s=1.0))
    pools = [msgspec.structs.replace(pool, token_budget=512, count=1) for pool in point.fleet.pools]
    fleet = msgspec.structs.replace(point.fleet, pools=tuple(pools))
    prompts = alone(msgspec.structs.replace(point, workload=load, fleet=fleet), "prefill")
    found = goodput(asked(prompts, step=1.02, least_requests=1000))
    prompt_s = (22.0522048 + 0.14050924 * 512 + 8.0765848e-6 * 512**2 + 3 + 1e-4 * 512) / 1e3
    assert found.rate_per_s <= 1 / prompt_s < found.rate_per_s * 1.02
    assert found.devices == 1


def test_decodes_alone_meet_no_prompt() -> None:
    """At a low rate every gap is a lone decode step; the side that takes no time is not counted as a device."""
    point = alone(figure1(fleet="split"), "decode")
    trial = hold(asked(point), 0.02)
    assert trial.shares == {"tpot=40ms": 1.0}
    assert trial.residence_s == pytest.approx(63 * (DECODE_MS + 0.06 + 540 * 7e-4) / 1e3, rel=0.01)
    assert asked(point).devices == 1
    assert hold(asked(point), 6.0).attained > hold(asked(figure1()), 6.0).attained


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_fleet_does_not_do_better_than_its_phases_alone(phase: str) -> None:
    whole = figure1(fleet="split")
    rates = [goodput(asked(one, least_requests=100)).rate_per_s for one in (alone(whole, phase), whole)]  # type: ignore[arg-type]
    assert rates[1] <= rates[0] * 1.1


def test_the_split_gains_where_the_limit_is_tight_and_not_where_it_is_loose() -> None:
    """Figure 1 of DistServe, and its control: the same limits with room to spare."""
    gain = {}
    for tpot_ms in (40, 200):
        both, apart = (
            goodput(asked(figure1(tpot_ms, fleet), step=1.1, least_requests=400)).per_device_per_s
            for fleet in ("colocated", "split")
        )
        gain[tpot_ms] = apart / both
    assert 1.7 <= gain[40] <= 2.5
    assert gain[200] < gain[40] - 0.3


def test_what_cannot_be_asked() -> None:
    point = figure1()
    with pytest.raises(ConfigError, match="there is none"):
        asked(msgspec.structs.replace(point, slo=None))
    with pytest.raises(ConfigError, match="cannot be searched"):
        asked(point, step=1.0)
    with pytest.raises(ConfigError, match="at least 1"):
        asked(point, least_requests=0)
    with pytest.raises(ConfigError, match="no pool of that role"):
        alone(point, "decode")
