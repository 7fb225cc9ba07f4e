"""Correct means: in float32 the engine's greedy tokens are those of Hugging Face transformers, on both real models.

The oracle holds the same dequantised weights and gets the same ids. One forward of it over prompt and output checks all
64 choices of a prompt (see `check_greedy`), and the engine produces them in one go with everything on that must
not matter: chunked prompts, requests that come and go, prefix hits, and a KV cache too small for all of them.
"""

from __future__ import annotations

import pytest

from megalith.engine.params import SamplingParams
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import open_model
from tests.engine.prompts import PROMPTS
from tests.engine.running import Way, make_engine, run_prompts
from tests.model.reference import check_greedy, reference_model

NEW = 64


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_greedy_tokens_equal_transformers_in_float32(name: str) -> None:
    model = open_model(name)
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]
    blocks = 70  # 20 sequences of about 80 tokens would need 100
    runner = TorchRunner(model.spec, model.checkpoint, num_blocks=blocks, num_host_blocks=blocks, threads=1)
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    way = Way(budget=48, prefix=True, preempt="swap", blocks=blocks, arrivals=(0, 0, 0, 1, 2) * 4)
    engine = make_engine(runner, way)
    outputs = run_prompts(engine, model.tokenizer, prompts, params, way)
    assert engine.scheduler.counters.preempted_swap > 0
    runner.close()
    reference = reference_model(model.checkpoint)
    leads = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.token_ids) == NEW
        leads.append(check_greedy(reference, prompt, list(output.token_ids)))
    print(f"{name}: {len(prompts) * NEW} tokens equal; the closest choice led by {min(leads):.5f}")
