"""The native runner under the engine: the same tokens however the work is cut, and torch never imported."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megalith.engine.batch import Runner
from megalith.engine.launch import why_not_native
from megalith.engine.params import SamplingParams
from megalith.model.open import OpenModel
from tests.engine.running import Way, make_engine, run_prompts
from tests.engine.tiny import VOCAB

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=3)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, frequency_penalty=0.3, seed=5, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def native(tiny_model: OpenModel) -> Iterator[Runner]:
    reason = why_not_native(tiny_model)
    if reason is not None:
        pytest.skip(reason)
    from megalith.engine.native_runner import NativeRunner

    runner = NativeRunner(
        tiny_model.spec, tiny_model.checkpoint, block_tokens=16, num_blocks=64, num_host_blocks=64, max_rows=512,
        threads=1,
    )  # fmt: skip
    yield runner
    runner.close()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_and_log_probabilities_are_bitwise_the_same(
    native: Runner, tiny_model: OpenModel, params: SamplingParams
) -> None:
    rng = np.random.default_rng(2)
    start = rng.integers(3, VOCAB, 40).tolist()
    prompts = [start + rng.integers(3, VOCAB, n).tolist() for n in (1, 4, 30, 90, 2, 17)]
    prompts += [rng.integers(3, VOCAB, n).tolist() for n in (1, 2, 33, 64)]
    tokenizer = tiny_model.tokenizer
    alone = [run_prompts(make_engine(native, Way()), tokenizer, [p], params, Way())[0] for p in prompts]
    assert len({delta.token_ids[-5:] for delta in alone}) > 5
    ways = [
        Way(),
        Way(budget=7, sequences=6),
        Way(prefix=True, budget=48, arrivals=(0, 3, 0, 5, 1, 0, 2, 7, 0, 0)),
        Way(policy="prefill-first", arrivals=(0, 3, 0, 5, 1, 0, 2, 7, 0, 0)),
        Way(blocks=24, budget=64),
        Way(blocks=24, budget=64, preempt="swap", prefix=True),
    ]
    for way in ways:
        engine = make_engine(native, way)
        together = run_prompts(engine, tokenizer, prompts, params, way)
        for a, b in zip(alone, together, strict=True):
            assert a.token_ids == b.token_ids, way
            # Floats compared exactly: the sums are the same sums.
            assert a.logprobs == b.logprobs, way
        if way.blocks is not None:
            assert engine.scheduler.counters.preemptions > 0
        if way.prefix:
            assert engine.scheduler.counters.prefix_hit_tokens > 0


def test_the_native_path_never_imports_torch(native: Runner, tiny: Path) -> None:
    del native  # only for its skip
    script = f"""
        import asyncio, sys
        from megalith.engine.api import EngineConfig
        from megalith.engine.launch import build_engine
        from megalith.engine.params import Grammar, SamplingParams

        built = build_engine(EngineConfig(model={str(tiny)!r}, mode="native", num_blocks=64, threads=1))

        async def main():
            await built.engine.start()
            grammar = Grammar(kind="regex", definition="[0-9]{{3}}")
            params = SamplingParams(max_tokens=5, grammar=grammar, logprobs=1)
            text = "".join([d.text async for d in built.engine.generate([70, 71, 72], params)])
            await built.engine.stop()
            return text

        text = asyncio.run(main())
        assert len(text) == 3 and text.isdigit(), text
        heavy = [name for name in ("torch", "transformers") if name in sys.modules]
        assert not heavy, heavy
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
