"""The SN40L study: its fast gates, and that the control takes the gain away."""

from __future__ import annotations

from megalith.studies import sn40l, sn40l_cases
from megalith.studies.registry import study
from megalith.studies.run import run_study
from megalith.studies.study import Case, Simulated


def test_fast_gates_and_controls() -> None:
    found = study("sn40l")
    judgement = found.judge(results := run_study(found, fast=True, workers=1))
    assert results.failures == []
    assert [gate for gate in judgement.gates if not gate.passed] == []
    by_note = {(one.claim.key, one.note): one for one in judgement.findings}
    # Without its DDR tier nothing is left of the gain over a DGX; with all links of the DGX a fifth of it.
    assert by_note["overall-a100", "20 tokens, SN40L without its DDR"].word == "not reproduced"
    assert (by_note["overall-a100", "20 tokens, all eight links of the DGX"].ours or 0) < 2
    assert by_note["overall-a100", "200 tokens, batch 1"].word == "partly"
    assert by_note["overall-a100", "20 tokens, ideal fusion"].word == "exceeded"
    assert {one.word for one in judgement.findings if one.counts} == {"reproduced"}


def test_arms_differ_by_one_thing() -> None:
    tasks = [sn40l_cases.run_experts(Case(arm, 50, 0, True)) for arm in ("sn40l", "no-ddr")]
    specs = []
    for task in tasks:
        assert isinstance(task, Simulated)
        specs.append(task.scenario.fleet.pools[0].experts)
    assert [spec and spec.host_bytes_per_s for spec in specs] == [None, 32e9]
    assert tasks[0].scenario.workload == tasks[1].scenario.workload


def test_the_parts_of_a_plan_are_its_latency() -> None:
    for platform in sn40l_cases.PLANNED:
        options = {"arm": platform.arm.name, "count": 150, "output": 20, "batch": 8}
        found = sn40l_cases.predicted(options)
        parts = [found[name] or 0.0 for name in ("router_ms", "switching_ms", "prompts_ms", "decode_ms")]
        assert abs(sum(parts) - (found["ms"] or 0.0)) < 1e-6
    assert sn40l.COUNTS[0] == 1.0
