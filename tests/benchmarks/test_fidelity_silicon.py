"""The gate of the step timers on a sample of published runs; the whole of it is benchmarks/fidelity_silicon.py."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "calibration"


@pytest.fixture
def silicon(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("duckdb", reason="parquet is read with duckdb, which is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fidelity_silicon

    yield fidelity_silicon
    for name in ("fidelity_silicon", "closed_loop"):
        sys.modules.pop(name, None)


def test_a_sample_of_published_runs_meets_the_gate(silicon: ModuleType) -> None:
    if not (DATA / "silicon_e2e.parquet").is_file():
        pytest.skip("the published runs (shared/data/calibration) are not here")
    runs = [run for run in silicon.published_runs(DATA) if run.model != "gpt-oss-120b" and run.concurrency <= 64]
    errors = [silicon.Error(run, *silicon.simulate(run)) for run in runs[::12]]
    assert len(errors) >= 25
    tpot = [abs(error.tpot) for error in errors]
    assert statistics.median(tpot) <= 0.15
    assert silicon.quantile(tpot, 0.9) <= 0.35
    assert statistics.median(abs(error.ttft) for error in errors) <= 0.35, "0.30 is the bar of the whole set"


def test_a_loop_leaps_as_it_steps(silicon: ModuleType) -> None:
    """One client alone: its times are those of the timer, added up by hand."""
    from closed_loop import TOKENIZE_PS, Client, ClosedLoop

    from megalith.cost.timer import Prompt
    from megalith.cost.timer_published import published
    from megalith.policy.batching import SplitFuse
    from megalith.policy.facts import Request
    from megalith.policy.kv import KvAccount
    from megalith.policy.scheduler import Limits, Scheduler

    timer = published("llumnix-7b").timer()
    scheduler = Scheduler(SplitFuse(64), KvAccount(100, 16, prefix_cache=False), Limits(max_sequences=8))
    clients = [Client(Request(index, 0, 100, 50), 50) for index in range(2)]
    ClosedLoop(scheduler, timer, clients).run(1)
    prompt = timer.step_ps([Prompt(64, 0, False)], 0, 0, 0) + timer.step_ps([Prompt(36, 64, True)], 0, 0, 0)
    for client in clients:
        assert client.first_ps - client.sent_ps == 100 * TOKENIZE_PS + prompt
        assert client.last_ps - client.first_ps == sum(timer.step_ps((), 1, 100 + j, 100 + j) for j in range(49))
    assert clients[1].sent_ps == clients[0].last_ps


def test_who_comes_while_an_engine_plans_ahead_waits_for_one_step_more(silicon: ModuleType) -> None:
    """A long answer keeps the engine busy; the third request comes when the second is answered."""
    from closed_loop import Client, ClosedLoop

    from megalith.cost.timer_published import published
    from megalith.policy.batching import SplitFuse
    from megalith.policy.facts import Request
    from megalith.policy.kv import KvAccount
    from megalith.policy.scheduler import Limits, Scheduler

    timer, waits = published("llumnix-7b").timer(), []
    for overlap in (False, True):
        scheduler = Scheduler(SplitFuse(512), KvAccount(100, 16, prefix_cache=False), Limits(max_sequences=8))
        clients = [Client(Request(index, 0, 32, output), output) for index, output in enumerate((200, 20, 5))]
        ClosedLoop(scheduler, timer, clients, overlap=overlap).run(2)
        assert clients[2].sent_ps == clients[1].last_ps
        waits.append(clients[2].first_ps - clients[2].sent_ps)
    step = timer.step_ps((), 1, 52, 52)
    assert waits[1] - waits[0] == pytest.approx(step, rel=0.1)


def test_engines_are_those_of_the_scripts(silicon: ModuleType) -> None:
    def run(model: str, device: str, backend: str, precision: str, inference_max: bool) -> object:
        return silicon.Run("k", model, device, backend, "1", precision, 2, 8, 1024, 1024, inference_max, 1.0, 1.0)

    def kernels(*case: object) -> tuple[str, str]:
        engine = silicon.engine_of(run(*case))  # type: ignore[arg-type]
        return engine.kernels, engine.kv

    assert kernels("llama-3.1-70b", "h100-sxm", "vllm", "fp8", True) == ("vllm", "fp8")
    assert kernels("gpt-oss-120b", "h100-sxm", "vllm", "fp4", True) == ("marlin", "bf16")
    assert kernels("gpt-oss-120b", "b200", "vllm", "fp4", True) == ("mxfp8", "fp8")
    assert kernels("qwen3-32b", "h100-sxm", "trtllm", "fp8", False) == ("trtllm-block", "fp8")
    assert kernels("qwen3-32b", "h100-sxm", "sglang", "", False) == ("sglang", "bf16")
