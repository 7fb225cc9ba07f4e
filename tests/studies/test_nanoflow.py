"""The NanoFlow study: what binds, and that its arms differ by the mechanism alone."""

from __future__ import annotations

import msgspec
import pytest

from megalith.plan.nano import optimum_per_s
from megalith.studies.nanoflow import ANSWERS, OFF, ON, STUDY, WORKLOADS, classes, online, serving
from megalith.studies.nanoflow_published import ENGINES, FLOPS_PER_S, OWN, PARAMETERS
from megalith.studies.study import Case, Simulated


def test_what_binds_by_the_length_of_answers() -> None:
    short, long = (classes({"arm": ANSWERS.name, "at": at}) for at in (512.0, 32_768.0))
    assert short["memory"] is not None
    assert short["memory"] < 1.0
    assert long["memory"] is not None
    assert long["memory"] > 1.0


def test_the_published_optimum_and_ratio() -> None:
    assert optimum_per_s(FLOPS_PER_S, PARAMETERS) == pytest.approx(1857, rel=0.01)
    ratios = [OWN[name] / ENGINES["TensorRT-LLM"][name] for name in WORKLOADS]
    assert sum(ratios) / len(ratios) == pytest.approx(1.91, rel=0.08)


@pytest.mark.parametrize("task", [serving, online])
def test_arms_differ_by_the_overlap_alone(task: object) -> None:
    assert callable(task)
    on, off = (task(Case(arm.name, 4.0, 1, True)) for arm in (ON, OFF))
    assert isinstance(on, Simulated)
    assert isinstance(off, Simulated)
    (pool,) = on.scenario.fleet.pools
    assert pool.overlap == "nanoflow"
    plain = msgspec.structs.replace(pool, overlap="none")
    assert plain == off.scenario.fleet.pools[0]
    assert on.scenario.workload == off.scenario.workload


def test_claims_of_other_engines_have_no_say() -> None:
    assert {"engines", "online"} <= {claim.key for claim in STUDY.claims}
