"""The benchmark of real against simulated: its clock, its speed of the machine, its simulated side."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from megalith.cost.calibrate_steps import TimedStep
from megalith.cost.compute import CostModel
from megalith.cost.memory import WeightBytes
from megalith.cost.profile import Band, Profile, Rates
from megalith.specs.model import ModelSpec

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
SPEC = ModelSpec(
    name="small", family="llama", num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn=128, vocab=500,
    max_context=2048,
)  # fmt: skip
PROFILE = Profile(
    name="here", kind="native", memory_bytes=1 << 34, source="made up", date="2026-11-23",
    band=Band(low=0.9, high=1.1, source="made up"),
    rates=Rates(
        step_ns=5e6, sequence_ns=1e6, weight_byte_ns=0.0, mac_ns=10.0, logit_mac_ns=0.0, kv_byte_ns=1.0, pair_mac_ns=0.1
    ),
)  # fmt: skip
COST = CostModel(
    SPEC, PROFILE, WeightBytes(format="q8_0", layers=100_000, experts=0, head=32_000, tables=0, vectors=500)
)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("shadow_live")


@pytest.fixture
def shadow(monkeypatch: pytest.MonkeyPatch, live: Any) -> Any:
    return importlib.import_module("shadow")


def test_the_processor_clock_jumps_over_idle_time_and_can_be_stopped(live: Any) -> None:
    clock = live.RunClock("processor")
    clock.wait_until(10**12)
    assert 10**12 <= clock.now_ns() < 10**12 + 10**9
    clock.stop()
    stopped_ns = clock.now_ns()
    sum(range(100_000))
    clock.start()
    assert clock.now_ns() - stopped_ns < 10**6


def test_the_speed_of_the_machine_is_that_of_the_steps_around_a_turn(
    live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = COST.decode_step(1, 9).duration_ns
    slow = [1.0] * 20 + [2.0] * 20
    steps = [TimedStep(((1, 9),), 1, round(exact * factor)) for factor in slow]
    run = live.LiveRun("bursts", "splitfuse", 0, tmp_path)
    monkeypatch.setattr(run, "calibration_steps", lambda: steps)
    run.turns = [(100 * (i + 1), i + 1) for i in range(40)]
    speeds = run.speeds(COST, "moment")
    assert [at_ns for at_ns, _ in speeds] == [100 * i for i in range(40)]
    assert [round(factor, 3) for _, factor in speeds[:16]] == [1.0] * 16
    assert [round(factor, 3) for _, factor in speeds[24:]] == [2.0] * 16
    assert run.speeds(COST, "none") == [(0, 1.0)]
    assert run.speeds(COST, "run") == [(0, pytest.approx(1.5, rel=1e-6))]


@pytest.mark.parametrize("policy", ["splitfuse", "prefill-first"])
def test_the_simulated_side_follows_the_speed_of_the_machine(shadow: Any, live: Any, policy: str) -> None:
    even = shadow.simulated("bursts", policy, COST, [(0, 1.0)])
    assert len(even) == len(live.shapes_of("bursts"))
    assert all(0 < times.first_ns - times.due_ns <= times.finish_ns - times.due_ns for times in even.values())
    same = shadow.simulated(
        "bursts", policy, COST, [(0, 1.0), *[(at_ns, 1.0) for at_ns in range(10**9, 10**10, 10**8)]]
    )
    assert same == even
    middle = 30 * 10**9
    slower = shadow.simulated("bursts", policy, COST, [(0, 1.0), (middle, 1.5)])
    assert {i: slower[i] for i, t in even.items() if t.finish_ns < middle} == {
        i: t for i, t in even.items() if t.finish_ns < middle
    }
    late = [i for i, t in even.items() if t.due_ns > middle]
    ratio = sum(slower[i].metrics()["e2e"] for i in late) / sum(even[i].metrics()["e2e"] for i in late)
    assert ratio > 1.3


def test_a_percentile_is_of_all_repeats_together(shadow: Any) -> None:
    found = shadow.versus([[100, 200, 300], [100, 200, 400]], [[110, 219, 300], [110, 219, 300]], 50, 0.10)
    assert (found["measured_ns"], found["simulated_ns"], found["error"], found["met"]) == (200, 219, 0.095, True)
    assert not shadow.versus([[100]], [[111]], 50, 0.10)["met"]
