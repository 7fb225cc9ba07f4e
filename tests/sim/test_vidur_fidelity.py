"""Vidur's own runs with its step times, request by request; the table is made by benchmarks/fidelity_vidur.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "vidur"

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="Vidur's runs are not here")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fidelity_vidur

    yield fidelity_vidur
    for name in ("fidelity_vidur", "side_by_side"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["vllm", "sarathi"])
def test_every_request_takes_as_long_as_there(bench: ModuleType, name: str) -> None:
    ours = bench.simulate(bench.RUNS[name], bench.read_rows(DATA / "input_splitwise_conv_first1000.csv.gz"))
    theirs = bench.theirs(bench.read_rows(DATA / bench.OUTPUT.format(name)))
    assert ours.keys() == theirs.keys()
    for metric in ("ttft", "e2e"):
        worst = max(abs(ours[number][metric] / times[metric] - 1) for number, times in theirs.items())
        assert worst < 1e-5, f"{metric} of {name} is off by {worst}"
    assert max(abs(ours[number]["wait"] - times["wait"]) for number, times in theirs.items()) < 1e-6


def test_the_control_a_budget_of_plain_tokens_is_seen(bench: ModuleType) -> None:
    trace = bench.read_rows(DATA / "input_splitwise_conv_first1000.csv.gz")
    ours = bench.simulate(bench.RUNS["vllm"]._replace(policy="prefill-first"), trace)
    theirs = bench.theirs(bench.read_rows(DATA / bench.OUTPUT.format("vllm")))
    assert bench.equal_share(ours, theirs, "e2e") < 0.9
