"""The gate against real vLLM: measured runs are met request by request, on the measured kernels of the same device.

Host time a step is never calibrated on what is reported: it comes from the other run, on another machine, or from the
first requests of a run while the rest is reported. The constants below are what `benchmarks/fidelity_vllm.py` finds;
one test finds one of them again.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megalith.base.errors import ConfigError
from megalith.cost.kernel_profile import read_profile
from megalith.cost.kernel_table import KernelTable
from megalith.cost.timer import PS_PER_NS, Prompt, StepTimer
from megalith.specs import catalog

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "llmservingsim"
FREE, FULL = "RTXPRO6000_Llama-3.1-8B", "RTX4090_Llama-3.1-8B"
HOST_NS = {FREE: 650_000, FULL: 210_000}
"""Calibrated on the first 100 requests of each run."""

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the measured vLLM runs beside the project")


@pytest.fixture(scope="module")
def vllm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        module = importlib.import_module("fidelity_vllm")
        yield module
        del sys.modules["fidelity_vllm"], sys.modules["side_by_side"]


@pytest.fixture(scope="module")
def runs(vllm: ModuleType) -> dict[str, Any]:
    return {name: vllm.read_run(DATA, name) for name in (FREE, FULL)}


def stepped(vllm: ModuleType, run: Any, timer: StepTimer) -> tuple[dict[int, list[int]], int]:
    """The same replay without the simulator: plan, time, complete. First and last token of each request in ns, and
    how often somebody was preempted."""
    scheduler = vllm.scheduler(run)
    waiting = vllm.arrivals(run)[::-1]
    lives = {live.request.id: live for live in waiting}
    tokens = dict.fromkeys(lives, 0)
    times: dict[int, list[int]] = {number: [] for number in lives}
    now_ps = preempted = 0
    while waiting or scheduler.num_running or scheduler.num_waiting:
        while waiting and waiting[-1].request.arrival_ns <= -(-now_ps // PS_PER_NS):
            scheduler.add(waiting.pop().request)
        plan = scheduler.plan()
        preempted += len(plan.preempts)
        if plan.empty:
            now_ps = waiting[-1].request.arrival_ns * PS_PER_NS
            continue
        prompts = [Prompt(chunk.new_tokens, chunk.context_tokens, chunk.samples) for chunk in plan.listed]
        decodes = plan.chunks[: plan.decodes]
        assert plan.decode_context_sum == sum(chunk.context_tokens for chunk in decodes)
        longest = max((chunk.context_tokens for chunk in decodes), default=0)
        now_ps += timer.step_ps(prompts, plan.decodes, plan.decode_context_sum, longest)
        finished = []
        for chunk in plan.chunks:
            if chunk.samples:
                number = chunk.request_id
                tokens[number] += 1
                if tokens[number] in (1, lives[number].output_tokens):
                    times[number].append(-(-now_ps // PS_PER_NS))
                if tokens[number] == lives[number].output_tokens:
                    finished.append(number)
        scheduler.complete(plan, finished)
    scheduler.check_integrity()
    return times, preempted


@pytest.mark.parametrize("name", [FREE, FULL])
def test_the_simulator_leaps_over_the_very_steps(vllm: ModuleType, runs: dict[str, Any], name: str) -> None:
    run = runs[name]
    timer = run.timer(HOST_NS[name])
    leapt = vllm.replay(run, timer)
    times, preempted = stepped(vllm, run, timer)
    assert {number: [live.first_ns, live.finish_ns] for number, live in leapt.items()} == times
    assert sum(live.preemptions for live in leapt.values()) == preempted


def test_without_kv_pressure(vllm: ModuleType, runs: dict[str, Any]) -> None:
    """Within 2 %; the host time is the other machine's."""
    lives = vllm.replay(runs[FREE], runs[FREE].timer(HOST_NS[FULL]))
    found = vllm.simulated_errors(runs[FREE], lives)
    assert len(lives) == 300
    assert found.e2e_mean < 0.02
    assert found.e2e_median < 0.02
    assert abs(found.bias_e2e) < 0.02
    assert abs(found.bias_tpot) < 0.02
    assert sum(live.preemptions for live in lives.values()) == 0


def test_the_rest_of_a_run_from_its_beginning(vllm: ModuleType, runs: dict[str, Any]) -> None:
    """The host time of the first 100 requests gives the other 200 within 1 %."""
    run = runs[FREE]
    first = vllm.first_requests(run)
    assert vllm.calibrate(run, first) == HOST_NS[FREE]
    rest = {one.number for one in run.requests} - set(first)
    found = vllm.simulated_errors(run, vllm.replay(run, run.timer(HOST_NS[FREE])), rest)
    assert len(rest) == 200
    assert found.e2e_mean < 0.01
    assert found.e2e_p90 < 0.02


def test_with_the_kv_cache_full(vllm: ModuleType, runs: dict[str, Any]) -> None:
    """Within 5 %, with preemptions; the host time is the other machine's."""
    run = runs[FULL]
    lives = vllm.replay(run, run.timer(HOST_NS[FREE]))
    found = vllm.simulated_errors(run, lives)
    assert run.kv_blocks == 2587
    assert found.e2e_mean < 0.05
    assert found.e2e_median < 0.05
    assert abs(found.bias_e2e) < 0.05
    assert sum(live.preemptions for live in lives.values()) > 100


def test_what_decides_it(vllm: ModuleType, runs: dict[str, Any]) -> None:
    """The controls: without host time, uneven contexts or blocks found again the error grows."""
    free, full = runs[FREE], runs[FULL]
    even = KernelTable(read_profile(free.profile)._replace(skew={}), free.model, 1, HOST_NS[FREE])
    plain = vllm.simulated_errors(free, vllm.replay(free, even)).bias_e2e
    skewed = vllm.simulated_errors(free, vllm.replay(free, free.timer(HOST_NS[FREE]))).bias_e2e
    hostless = vllm.simulated_errors(free, vllm.replay(free, free.timer(0))).bias_e2e
    assert plain < skewed - 0.01
    assert hostless < skewed - 0.02
    timer = full.timer(HOST_NS[FREE])
    hit = vllm.simulated_errors(full, vllm.replay(full, timer)).e2e_mean
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "prefix_hashes", lambda run, tokens=None: {one.number: () for one in run.requests})
        missed = vllm.simulated_errors(full, vllm.replay(full, timer)).e2e_mean
    assert missed > hit + 0.02


def test_runs_that_are_not_replayed_say_why(vllm: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "vllm_measured" / "some_llama-3.1-8b"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text('{"engine_kwargs": {"data_parallel_size": 2}}')
    with pytest.raises(ConfigError, match="data parallel over 2"):
        vllm.read_run(tmp_path, folder.name)
    assert vllm._model("Qwen/Qwen3-32B-Instruct-2507") == catalog.model("qwen3-32b")
