"""The points of the BlockLLM study: what is stored, what fits, and that arms serve the same requests."""

from __future__ import annotations

from megalith.policy.block_zoo import make_zoo
from megalith.studies import blockllm
from megalith.studies.blockllm_cases import CHANGES, scenario, serve, stored_bytes
from megalith.studies.study import Case, Computed


def options(arm: str, at: float = 25.0) -> dict[str, float | str]:
    experiment = next(one for one in blockllm.STUDY.experiments if one.name == "rate")
    task = experiment.task(Case(arm, at, 0, True))
    assert isinstance(task, Computed)
    return task.options


def test_arms_differ_in_sharing_and_placement_only() -> None:
    seen = {arm.name: scenario(options(arm.name)) for arm in blockllm.SHARING}
    assert [one.sharing for one in seen.values()] == ["blocks", "parameters", "parameters", "model", "model"]
    assert [one.locality for one in seen.values()] == [True, True, False, True, False]
    assert len({(str(one.workload), str(one.zoo), one.seed, one.kv) for one in seen.values()}) == 1


def test_each_arm_of_the_ablation_changes_one_thing() -> None:
    assert {name: len(change) for name, change in CHANGES.items()} == {
        "coordinated": 0, "pinned": 1, "queue": 1, "true-output": 1,
    }  # fmt: skip


def test_what_fits_and_what_is_stored() -> None:
    small = {"rate": 20.0, "requests": 12, "seed": 0}
    found = {sharing: serve({**small, "sharing": sharing, "applications": 60}) for sharing in ("model", "blocks")}
    assert found["model"] == {"fits": 0.0, "stored_gb": found["model"]["stored_gb"]}
    assert found["blocks"]["fits"] == 1.0
    assert found["blocks"]["requests"] == 12
    assert found["model"]["stored_gb"] > 2 * found["blocks"]["stored_gb"]


def test_stored_bytes_are_those_of_the_units() -> None:
    one = scenario({**options("model"), "applications": 3})
    assert len(make_zoo(one.zoo, one.sharing, one.seed).units) == 3
    assert stored_bytes(one) == stored_bytes(scenario({**options("parameters"), "applications": 3}))
