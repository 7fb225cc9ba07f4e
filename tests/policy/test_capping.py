"""Power: thresholds, hysteresis, the wait before the high priority is touched, brakes, and the baselines."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.policy.capping import (
    Capping,
    NoCap,
    Polca,
    PolcaOptions,
    ScopeOptions,
    SingleThreshold,
    SingleThresholdOptions,
)
from megalith.policy.cluster import Command, Event, SetClock
from tests.policy.facts import Seen

S = 10**9
BASE, DEEP, HIGH, BRAKE = 1275 / 1410, 1110 / 1410, 1305 / 1410, 288 / 1410


def polca(**options: Any) -> Polca:
    return Polca(PolcaOptions(low=("batch",), high=("chat",), **options))


def sample(policy: Capping, share: float, at_s: float, domain: str = "row") -> list[Command]:
    data = {"domain": domain, "power_w": share * 260_000, "budget_w": 260_000}
    return list(policy.act(Event("telemetry", round(at_s * S), data=data), Seen()))


def test_below_the_first_threshold_nothing_happens() -> None:
    policy = polca()
    assert sample(policy, 0.79, 0) == sample(policy, 0.80, 2) == []


def test_low_priority_is_slowed_first_and_high_only_when_that_had_time_to_work() -> None:
    policy = polca()
    assert sample(policy, 0.81, 0) == [SetClock("batch", BASE)]
    assert sample(policy, 0.90, 2) == [SetClock("batch", DEEP)]
    # A clock takes 40 s: the samples until then say nothing about the last step.
    assert [sample(policy, 0.92, at_s) for at_s in range(4, 42, 2)] == [[]] * 19
    assert sample(policy, 0.92, 42) == [SetClock("chat", HIGH)]
    assert sample(policy, 0.99, 100) == []
    eager = polca(hold_s=0)
    assert sample(eager, 0.90, 0) == [SetClock("batch", DEEP)]
    assert sample(eager, 0.90, 2) == [SetClock("chat", HIGH)]


def test_levels_are_left_five_points_below_where_they_are_entered() -> None:
    policy = polca(hold_s=0)
    for at_s in (0, 2):
        sample(policy, 0.90, at_s)
    assert sample(policy, 0.841, 4) == []
    assert sample(policy, 0.839, 6) == [SetClock("batch", BASE), SetClock("chat", 1.0)]
    assert sample(policy, 0.751, 8) == []
    assert sample(policy, 0.749, 10) == [SetClock("batch", 1.0)]
    sample(policy, 0.90, 12)
    assert sample(policy, 0.5, 14) == [SetClock("batch", 1.0)]


def test_above_the_budget_everything_brakes_at_once_and_the_low_power_of_a_brake_misleads_nobody() -> None:
    policy = polca()
    assert sample(policy, 1.01, 0) == [SetClock("row", BRAKE, brake=True), SetClock("batch", DEEP)]
    assert sample(policy, 1.01, 2) == [SetClock("row", BRAKE, brake=True)]
    assert sample(policy, 0.3, 4) == sample(policy, 0.3, 7) == []
    assert sample(policy, 0.3, 8) == [SetClock("batch", 1.0)]


def test_without_scopes_the_whole_domain_has_low_priority() -> None:
    assert sample(Polca(PolcaOptions()), 0.9, 0) == [SetClock("row", DEEP)]


def test_domains_have_states_of_their_own_and_a_missing_sample_decides_nothing() -> None:
    policy = Polca(PolcaOptions())
    assert sample(policy, 0.9, 0) == [SetClock("row", DEEP)]
    assert sample(policy, 0.9, 0, "other") == [SetClock("other", DEEP)]
    assert sample(policy, float("nan"), 2) == []
    assert sample(policy, 0.9, 4) == []


def test_a_clock_that_was_refused_is_asked_for_again() -> None:
    policy = polca()
    [command] = sample(policy, 0.9, 0)
    refused = Event("command", 0, data={"command": command, "outcome": "refused", "reason": ""})
    assert list(policy.act(refused, Seen())) == []
    assert sample(policy, 0.87, 2) == [command]
    [release] = sample(policy, 0.7, 4)
    policy.act(Event("command", 0, data={"command": release, "outcome": "refused", "reason": ""}), Seen())
    assert sample(policy, 0.7, 6) == [SetClock("batch", 1.0)]


def test_the_baselines_slow_everybody_or_nobody() -> None:
    single = SingleThreshold(SingleThresholdOptions(low=("batch",), high=("chat",)))
    assert sample(single, 0.88, 0) == []
    assert sample(single, 0.90, 2) == [SetClock("batch", DEEP), SetClock("chat", DEEP)]
    assert sample(single, 0.85, 4) == []
    assert sample(single, 0.83, 6) == [SetClock("batch", 1.0), SetClock("chat", 1.0)]
    none = NoCap(ScopeOptions(low=("batch",)))
    assert sample(none, 0.99, 0) == []
    assert sample(none, 1.2, 2) == [SetClock("row", BRAKE, brake=True)]


@pytest.mark.parametrize(
    "bad", [{"first": 0.9, "second": 0.8}, {"hysteresis": 0.9}, {"base_clock": 0.0}, {"high_clock": 1.2}]
)
def test_thresholds_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        PolcaOptions(**bad)


def reference(shares: list[float], hold_s: float) -> list[tuple[float, float]]:
    """The rule as one function of thresholds, without brakes: clocks of low and high after each sample."""
    level, since, clocks = 0, 0.0, []
    for at_s, p in enumerate(shares):
        up = 1 if p > 0.80 else 0
        if p > 0.89:
            up = 3 if level == 2 and at_s >= since + hold_s else max(2, level)
        down = 0 if p < 0.80 - 0.05 else 1 if p < 0.89 - 0.05 else level
        new = max(up, min(level, down))
        if new != level:
            level, since = new, float(at_s)
        clocks.append(((1.0, BASE, DEEP, DEEP)[level], (1.0, 1.0, 1.0, HIGH)[level]))
    return clocks


@given(shares=st.lists(st.floats(0.6, 1.0), max_size=60), hold_s=st.sampled_from([0.0, 2.0, 10.0]))
def test_any_run_of_samples_gives_the_clocks_of_the_rule(shares: list[float], hold_s: float) -> None:
    policy, now, seen = polca(hold_s=hold_s), {"batch": 1.0, "chat": 1.0}, []
    for at_s, share in enumerate(shares):
        for command in sample(policy, share, at_s):
            assert isinstance(command, SetClock)
            assert now[command.scope] != command.fraction
            now[command.scope] = command.fraction
        seen.append((now["batch"], now["chat"]))
    assert seen == reference([share * 260_000 / 260_000 for share in shares], hold_s)
