"""`plan serve` with layers that live elsewhere: what they free, what they cost, and when they are offered."""

from __future__ import annotations

import json
import shlex

import pytest

from megalith.cli.main import run


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))


def plan(text: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    run(shlex.split(f"plan serve {text} --json"))
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_model_that_is_too_large_runs_when_it_borrows(capsys: pytest.CaptureFixture[str]) -> None:
    alone = plan("opt-66b --device a100-80gb --context 1024", capsys)
    peer = plan("opt-66b --device a100-80gb --context 1024 --peer-layers 40", capsys)
    host = plan("opt-66b --device a100-80gb --context 1024 --host-layers 40", capsys)
    assert (alone["fits"], peer["fits"], host["fits"]) == (False, True, True)
    assert peer["need_bytes"] == host["need_bytes"]
    times = [one["points"][0]["tpot_ns"]["value"] for one in (alone, peer, host)]  # type: ignore[index]
    assert times[0] < times[1] < times[2]
    assert "40 of 64 layers lie in the memory of a peer" in " ".join(peer["notes"])  # type: ignore[arg-type]


def test_a_small_loan_is_offered_and_a_dear_one_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    tight = plan("llama-3.1-70b --device a100-80gb --devices 2 --context 2048 --batch 8", capsys)
    offers = [one["change"] for one in tight["remedies"] if "--peer-layers" in one["change"]]  # type: ignore[index, union-attr]
    assert len(offers) == 1
    far = plan("llama-3.1-70b --device h100 --batch 4", capsys)
    assert not [one for one in far["remedies"] if "--peer-layers" in one["change"]]  # type: ignore[index, union-attr]


def test_more_layers_than_there_are_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split("plan serve opt-66b --device a100-80gb --peer-layers 65")) == 2
    assert "65 layers cannot be borrowed of 64" in capsys.readouterr().err
