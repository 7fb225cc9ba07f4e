"""The comparison harness: its files agree, its drivers speak the protocol, its page follows the data."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/ as its scripts do, and forget it again."""
    monkeypatch.syspath_prepend(str(ROOT))
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        before = set(sys.modules)
        module = importlib.import_module(name)
        loaded.extend(n for n in set(sys.modules) - before if str(ROOT) in str(getattr(sys.modules[n], "__file__", "")))
        return module

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


def ask(driver: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What a driver answers to these requests."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(
        [sys.executable, str(driver)], input=lines, capture_output=True, text=True, timeout=60, check=True,
        env={"PYTHONPATH": str(ROOT / "peers"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def all_cases() -> list[dict[str, Any]]:
    return [case for path in (ROOT / "cases").glob("*.toml") for case in tomllib.loads(path.read_text())["case"]]


def test_arms_and_cases_are_complete() -> None:
    arms = tomllib.loads((ROOT / "arms.toml").read_text())["arm"]
    assert len({arm["name"] for arm in arms}) == len(arms)
    assert [arm["name"] for arm in arms if not (ROOT / arm["driver"]).exists()] == []
    cases = all_cases()
    assert len({case["name"] for case in cases}) == len(cases)
    assert all({"name", "about", "batch", "prompt_tokens", "output_tokens"} <= set(case) for case in cases)


def test_every_gate_has_its_case(bench: Any) -> None:
    assert {gate.case for gate in bench("gates").GATES} <= {case["name"] for case in all_cases()}


def test_a_driver_says_why_it_is_skipped_and_stays_in_the_protocol() -> None:
    opening = {"open": {"threads": 1, "source": "q4_1", "model": {}, "bin": "/nowhere"}}
    answers = ask(ROOT / "peers" / "llama_cpp_arm.py", opening, {"case": "x", "batch": 1})
    assert "no llama-batched-bench" in answers[0]["skipped"]
    assert "failed" in answers[1]


def test_prompts_are_the_same_everywhere_and_share_no_beginning(bench: Any) -> None:
    driver = bench("peers.driver")
    case = {"case": "c", "batch": 8, "prompt_tokens": 32, "vocab": 4096, "seed": 3}
    once, again = driver.prompts(case), driver.prompts(dict(case))
    assert once == again
    assert driver.prompts({**case, "seed": 4}) != once
    assert len({tuple(ids[:4]) for ids in once}) == 8
    assert all(64 <= token < 4096 and len(ids) == 32 for ids in once for token in ids)


def test_rates_come_from_the_ticks(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = bench("peers.driver")
    now_s = 0.0
    monkeypatch.setattr(driver, "time", SimpleNamespace(perf_counter=lambda: now_s))

    class Clockwork:
        """An engine of exact speed: 50 ms until everybody has a token, then 10 ms a step."""

        version = "clockwork"

        def generate(self, prompts: list[list[int]], output_tokens: int, tick: Any) -> int:
            nonlocal now_s
            for step in range(1, output_tokens + 1):
                now_s += 0.05 if step == 1 else 0.01
                tick(step * len(prompts), len(prompts))
            return output_tokens * len(prompts)

    case = {"case": "c", "batch": 4, "prompt_tokens": 8, "output_tokens": 11, "vocab": 512}
    result = driver.measure(Clockwork(), case)
    assert result["decode_tok_s"] == pytest.approx(400)
    assert result["out_tok_s"] == pytest.approx(44 / 0.15)
    assert "prefill_tok_s" not in result  # decodes may have run meanwhile
    assert driver.measure(Clockwork(), {**case, "batch": 1})["prefill_tok_s"] == pytest.approx(160)
    assert driver.measure(Clockwork(), {**case, "output_tokens": 1})["prefill_tok_s"] == pytest.approx(640)


def test_a_gate_is_judged_against_the_best_peer(bench: Any) -> None:
    gates = bench("gates")
    rows = [
        {"kind": "case", "case": "batch-32", "arm": gates.OURS, "peer": "", "out_tok_s": 300.0},
        {"kind": "case", "case": "batch-32", "arm": "slow", "peer": "a", "out_tok_s": 100.0},
        {"kind": "case", "case": "batch-32", "arm": "fast", "peer": "b", "out_tok_s": 240.0},
    ]
    line = next(line for line in gates.table(rows, {}).splitlines() if line.startswith("| 32 requests, output"))
    assert "240 (fast)" in line
    assert "| 1.25 | 1.5 | no |" in line


def test_the_page_is_what_the_history_gives(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = bench("history")
    monkeypatch.setattr(history, "RESULTS", tmp_path / "RESULTS.md")
    history.write_results()
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "RESULTS.md").read_text()
