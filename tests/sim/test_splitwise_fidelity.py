"""splitwise-sim's own runs with its step times, request by request; all are in benchmarks/fidelity_splitwise.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "splitwise-sim"

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="splitwise-sim's runs are not here")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fidelity_splitwise

    yield fidelity_splitwise
    for name in ("fidelity_splitwise", "side_by_side"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["bl70_2", "hh70_2", "ha70_2", "B_bl_conv70", "L_hh_conv70"])
def test_every_request_takes_as_long_as_there(bench: ModuleType, name: str) -> None:
    run = bench.RUNS[name]
    ours = bench.simulate(run, bench.read_rows(DATA / "inputs" / f"{run.trace}.csv.gz"))
    theirs = bench.theirs(bench.read_rows(DATA / "outputs" / f"{name}.csv.gz"))
    assert ours.keys() == theirs.keys()
    for metric in ("ttft", "tbt", "e2e"):
        worst = max(abs(ours[number][metric] / times[metric] - 1) for number, times in theirs.items())
        assert worst < 1e-5, f"{metric} of {name} is off by {worst}"


def test_the_control_another_batch_policy_is_seen(bench: ModuleType) -> None:
    run = bench.RUNS["bl70_2"]
    trace = bench.read_rows(DATA / "inputs" / f"{run.trace}.csv.gz")
    theirs = bench.theirs(bench.read_rows(DATA / "outputs" / "bl70_2.csv.gz"))
    shares = [
        bench.equal_share(bench.simulate(run, trace, policy), theirs, "e2e")
        for policy in ("splitwise", "prefill-first")
    ]
    assert shares[0] == 1.0
    assert shares[1] < 0.5
