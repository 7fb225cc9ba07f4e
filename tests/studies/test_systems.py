"""What single studies do besides running: a move of one request, reading a rate off a curve."""

from __future__ import annotations

import msgspec
import pytest

from megalith.policy.autoscale import FreenessScalingOptions
from megalith.specs.lengths import FixedLength
from megalith.studies import llumnix, splitwise
from megalith.studies.run import StudyPoint
from megalith.studies.study import Case


def pause(mode: str, tokens: float) -> float:
    task = llumnix._move(Case(mode, tokens, 0, True))
    result = llumnix.measure(StudyPoint(labels={}, scenario=task.scenario))
    assert result.figures["moves"] == 1.0
    assert result.requests == 1
    found = result.figures["downtime_s"]
    assert found is not None
    return found


def test_a_blocking_copy_takes_what_was_published() -> None:
    """68 ms at 256 tokens and 1,682 ms at 8,192: the copy speed is read from these."""
    assert pause("blocking", 256.0) == pytest.approx(0.068, rel=0.1)
    assert pause("blocking", 8192.0) == pytest.approx(1.682, rel=0.05)


def test_a_live_move_pauses_for_its_last_blocks_only() -> None:
    """Published: 13 to 26 ms. One to three blocks of 3.3 ms each beside 16 ms."""
    for tokens in (256.0, 2048.0, 8192.0):
        assert 0.013 <= pause("live", tokens) <= 0.030


def test_answers_longer_than_the_context_of_the_model_card_are_run() -> None:
    """LLaMA-7B served up to 12,288 tokens there; cut to 4,096 they would not load the instances."""
    task = llumnix._move(Case("live", 4000.0, 0, True))
    load = msgspec.structs.replace(task.scenario.workload, output=FixedLength(tokens=600))
    scenario = msgspec.structs.replace(task.scenario, workload=load)
    result = llumnix.measure(StudyPoint(labels={}, scenario=scenario))
    e2e = result.latencies["e2e_ns"]
    assert e2e is not None
    assert e2e.mean > 599 * (25e6 + 4000 * 2200)


def test_the_scaling_of_the_artifact_differs_in_two_things_only() -> None:
    """Both arms of both experiments scale by the published rule: every 10 s, T and T + 50."""
    for arm in ("llumnix", "dispatch-only"):
        case = Case(arm, 25.0, 0, True)
        plain, artifact = (task(case).scenario for task in (llumnix.scaling, llumnix._scaling_artifact))
        scaler = plain.fleet.controllers[-1]
        assert scaler.options == {"up_below": 25.0, "down_above": 75.0, "victim": "fewest"}
        assert FreenessScalingOptions().period_s == 10.0
        last = msgspec.structs.replace(scaler, options={**scaler.options, "victim": "last"})
        fleet = msgspec.structs.replace(
            plain.fleet, controllers=(*plain.fleet.controllers[:-1], last), heartbeat_s=llumnix.OLD_S
        )
        assert artifact == msgspec.structs.replace(plain, fleet=fleet)


@pytest.mark.parametrize(
    ("curve", "rate"),
    [
        ({50.0: [0.8], 60.0: [1.2]}, 55.0),
        ({50.0: [0.8, 0.6, 5.0], 60.0: [1.2, 1.2, 1.2]}, 55.0),
        ({50.0: [1.0], 60.0: [1.5], 70.0: [0.5], 80.0: [2.0]}, 50.0),
        ({50.0: [1.1], 60.0: [1.2]}, None),
        ({50.0: [0.1], 60.0: [0.2]}, None),
        ({}, None),
    ],
)
def test_the_rate_at_which_the_limits_stop_holding(curve: dict[float, list[float]], rate: float | None) -> None:
    assert splitwise.capacity(curve) == (None if rate is None else pytest.approx(rate))


def test_memory_of_a_machine_is_that_of_the_released_simulator() -> None:
    kv_bytes = splitwise.KV_BLOCKS * 16 * 4_014_080
    assert kv_bytes == pytest.approx(8 * 80 * 2**30 - 329e9, rel=1e-3)
    design = splitwise.scenario(Case("HHcap", 100.0, 0, True), "splitwise:artifact")
    assert [(pool.role, pool.count, pool.power_cap) for pool in design.fleet.pools] == [
        ("prefill", 25, None),
        ("decode", 21, 0.7),
    ]
    assert design.workload.oracle
    assert not splitwise.scenario(Case("HH-predicted", 100.0, 0, True), "splitwise:artifact").workload.oracle
