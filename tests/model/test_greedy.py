"""The claim of the engine's oracle: 20 prompts x 64 greedy tokens on both real models equal transformers in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalith.model.open import OpenModel
from megalith.model.transformer import Transformer, causal_attention
from tests.model.generation import greedy
from tests.model.packaged import NAMES, opened
from tests.model.reference import check_greedy, reference_logits, reference_model

PROMPTS = [
    "The capital of France is", "Once upon a time, there was a", "def fibonacci(n):\n", "1 2 3 4 5 6",
    "The quick brown fox", "In 1969, the first human", "Q: What is 12 * 12?\nA:", "Dear Sir or Madam,\n\n",
    "Ingredients:\n- 200 g flour\n-", "import numpy as np\n\n", "La tour Eiffel se trouve", "The meaning of life is",
    "Roses are red,\n", "SELECT name FROM", "E = mc", "To be, or not to be,", "Water boils at 100", "<html>\n<body>\n",
    "日本の首都は", "My favourite emoji is 🎉 because",
]  # fmt: skip
_NUM_TOKENS = 64


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[OpenModel, Transformer, Any]:
    """One real model: opened, as our torch decoder, and as transformers'. Loaded once for all tests of it."""
    model = opened(request.param)
    return model, Transformer(model.checkpoint), reference_model(model.checkpoint)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_tokens_equal_transformers(pair: tuple[OpenModel, Transformer, Any]) -> None:
    model, ours, reference = pair
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]
    assert len({tuple(prompt) for prompt in prompts}) == 20
    produced = greedy(ours, prompts, _NUM_TOKENS)
    leads = [check_greedy(reference, p, out) for p, out in zip(prompts, produced, strict=True)]
    # Were one choice a tie, equality would show luck.
    assert min(leads) > 0
    assert sum(len(set(out)) > 8 for out in produced) >= 12


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_logits_equal_transformers_and_a_small_mistake_would_show(pair: tuple[OpenModel, Transformer, Any]) -> None:
    """Tokens are a coarse measure: a norm that is a tenth too large seldom turns one. Logits see it."""
    model, ours, reference = pair
    ids = model.tokenizer.encode("".join(PROMPTS))
    expected = reference_logits(reference, ids)

    def distance() -> float:
        with torch.inference_mode():
            attend = causal_attention(model.spec, [0, len(ids)])
            found = ours.head(ours(torch.tensor(ids), torch.arange(len(ids)), attend))
        return float((found - expected).abs().max())

    assert len(ids) > 100
    assert distance() < 1e-3
    weight = ours.layers[7].attn_norm.weight
    kept = weight.data.clone()
    weight.data[3] *= 1.1
    try:
        assert distance() > 1e-2
    finally:
        weight.data.copy_(kept)
