"""How the study `polca` reads its points: counts up to the first brake, worst seeds, and what is missing fails."""

from __future__ import annotations

from megalith.sim.sweep import PointResult
from megalith.studies import polca
from megalith.studies.results import Results

QUIET = {"high_p50": 0.005, "high_p99": 0.01, "low_p50": 0.04, "low_p99": 0.08, "served": 0.0, "free_rise_2": 0.05,
         "free_rise_40": 0.11, "peak": 0.95}  # fmt: skip


def judged(brakes: dict[tuple[str, float, int], float], slow: float = 1.0, p99: float = 0.01) -> polca.Judgement:
    """The study where only these rows brake."""
    results = Results(polca.STUDY)
    for name, cases in results.cases.items():
        for case in cases:
            figures = {**QUIET, "brakes": 0.0, "slowdown": 0.0, "swing": 0.3, "power": 0.001, "p99": p99}
            if name == "servers":
                figures["brakes"] = brakes.get((case.arm, case.at, case.seed), 0.0)
            if name == "training" and case.at > 41:
                figures["brakes"] = 9.0
            if name == "delay" and case.at == 120.0 and case.seed == 0:
                figures["brakes"] = slow
            results.add(name, case, PointResult(key="", labels={}, figures=figures))
    return polca.judge(results)


ALL_BRAKE = {("no-cap", at, seed): 12.0 for at in (52.0, 54.0, 56.0) for seed in range(3)}


def test_servers_count_up_to_the_first_brake_of_any_seed() -> None:
    found = judged(ALL_BRAKE | {("polca", 54.0, 2): 1.0})
    by_key = {finding.claim.key: finding for finding in found.findings}
    assert (by_key["servers"].on, by_key["servers"].off) == ("52 servers", "50 servers")
    assert by_key["servers"].word == "reproduced"
    assert by_key["brakes"].ours == 12.0
    assert [gate.name for gate in found.gates if not gate.passed] == []


def test_a_brake_of_one_seed_at_52_fails_the_gate_and_the_claim() -> None:
    found = judged(ALL_BRAKE | {("polca", 52.0, 1): 1.0})
    assert [gate.name for gate in found.gates if not gate.passed] == ["brakes with POLCA at 52, most seed"]
    assert {finding.claim.key: finding.word for finding in found.findings}["servers"] == "partly"


def test_a_model_in_which_slow_clocks_do_no_harm_is_too_kind() -> None:
    [failed] = [gate for gate in judged(ALL_BRAKE, slow=0.0).gates if not gate.passed]
    assert "120 s" in failed.name


def test_a_control_that_does_not_brake_fails_and_so_does_a_fluid_run_that_is_off() -> None:
    failed = [gate.name for gate in judged({}, p99=0.06).gates if not gate.passed]
    assert failed == ["brakes without capping at 52, least seed", "fluid against exact, p99"]


def test_without_results_nothing_passes() -> None:
    found = polca.judge(Results(polca.STUDY))
    assert not any(gate.passed for gate in found.gates)
    assert {finding.word for finding in found.findings} == {"no result"}
