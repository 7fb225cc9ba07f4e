"""How many servers a budget carries: calibration, headroom by policy, and the verb."""

from __future__ import annotations

import json

import msgspec
import pytest

from megalith.base.errors import ConfigError
from megalith.cli.main import run
from megalith.plan.row import Limits, Lost, RowQuestion, calibrate, headroom, policy_for
from megalith.sim.fluid_row import simulate_rows
from megalith.specs.row_load import NO_BURSTS, POLCA_KINDS, RowLoad

SMOOTH = RowLoad(
    rate_per_server=0.1, start_s=86_400 + 15 * 3600,
    kinds=tuple(msgspec.structs.replace(kind, bursts=NO_BURSTS) for kind in POLCA_KINDS),
)  # fmt: skip
QUESTION = RowQuestion(budget_servers=10, peak=0.76, load=SMOOTH)


def test_the_calibrated_rate_draws_the_peak_in_its_own_window() -> None:
    factor = calibrate(QUESTION, 1200.0)
    (result,) = simulate_rows([QUESTION.row(10, None, factor, 1000)], SMOOTH, QUESTION.machine, 1200.0)
    assert result.peak_share == pytest.approx(0.76, abs=0.015)


def test_a_peak_that_no_rate_draws_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(ConfigError, match="never 99"):
        calibrate(msgspec.structs.replace(QUESTION, peak=0.99), 300.0)
    with pytest.raises(ConfigError, match="cannot be"):
        RowQuestion(other_w=7000.0)


def test_polca_carries_more_than_the_brake_alone_and_both_at_least_the_budgets() -> None:
    question = msgspec.structs.replace(QUESTION, budget_servers=20)
    found = {
        name: headroom(question, policy_for(question, name), 0.25, (20, 26, 28), hours=0.5)
        for name in ("no-cap", "polca")
    }
    assert found["no-cap"].servers >= 20
    assert found["polca"].without_brakes > found["no-cap"].without_brakes
    assert found["polca"].more == found["polca"].servers / 20 - 1
    assert 0 < found["polca"].power_left < 0.2


def test_limits_are_on_each_latency() -> None:
    assert Lost(0.01, 0.05, 0.05, 0.5).within(Limits())
    assert not Lost(0.011, 0.05, 0.05, 0.5).within(Limits())
    assert not Lost(0.0, 0.0, 0.051, 0.0).within(Limits())


def test_a_device_without_watts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"published|measurements"):
        _ = msgspec.structs.replace(QUESTION, device="l4").machine


def test_the_verb_prints_rows_and_their_nature(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ["plan", "power", "--servers", "12", "--budget-servers", "10", "--days", "0.02", "--rate", "0.02"]
    assert run([*tokens, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["nature"], document["fidelity"]) == ("simulated", "fluid")
    assert [one["policy"] for one in document["rows"]] == ["no-cap", "single-threshold", "polca", None]
    assert {"high_p50", "high_p99", "low_p50", "low_p99"} == set(document["rows"][0]["lost"])
    assert run(tokens) == 0
    assert "simulated" in capsys.readouterr().out


def test_the_verb_draws(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{tmp_path}/row.png"
    tokens = ["plan", "power", "--servers", "4", "--budget-servers", "4", "--days", "0.02", "--rate", "0.02"]
    assert run([*tokens, "--policy", "polca", "--out", path]) == 0
    with open(path, "rb") as file:
        assert file.read(4) == b"\x89PNG"


@pytest.mark.parametrize("wrong", [["--policy", "polka"], ["--days", "0"], ["--out", "row.gif"], ["--servers", "1"]])
def test_what_cannot_be_planned_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "power", "--days", "0.02", "--rate", "0.02", *wrong]) != 0
