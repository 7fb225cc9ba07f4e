"""The claim of the engine's oracle: 20 prompts x 64 greedy tokens on both real models equal transformers in float32."""

from __future__ import annotations

import pytest

from megalith.model.transformer import Transformer
from tests.model.generation import greedy
from tests.model.packaged import NAMES, opened
from tests.model.reference import check_greedy, reference_model

PROMPTS = [
    "The capital of France is", "Once upon a time, there was a", "def fibonacci(n):\n", "1 2 3 4 5 6",
    "The quick brown fox", "In 1969, the first human", "Q: What is 12 * 12?\nA:", "Dear Sir or Madam,\n\n",
    "Ingredients:\n- 200 g flour\n-", "import numpy as np\n\n", "La tour Eiffel se trouve", "The meaning of life is",
    "Roses are red,\n", "SELECT name FROM", "E = mc", "To be, or not to be,", "Water boils at 100", "<html>\n<body>\n",
    "日本の首都は", "My favourite emoji is 🎉 because",
]  # fmt: skip
_NUM_TOKENS = 64


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    model = opened(name)
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]
    assert len({tuple(prompt) for prompt in prompts}) == 20
    produced = greedy(Transformer(model.checkpoint), prompts, _NUM_TOKENS)
    reference = reference_model(model.checkpoint)
    leads = [check_greedy(reference, p, out) for p, out in zip(prompts, produced, strict=True)]
    # Were every choice a matter of course, equality would show little; were one a tie, it would show luck.
    assert min(leads) > 0
    assert sum(len(set(out)) > 8 for out in produced) >= 12


@pytest.mark.slow
def test_a_small_mistake_would_be_seen() -> None:
    """The control: one norm weight off by a tenth, and the tokens differ."""
    model = opened("smollm2")
    wrong = Transformer(model.checkpoint)
    wrong.layers[7].attn_norm.weight.data[3] *= 1.1
    prompts = [model.tokenizer.encode(text) for text in PROMPTS[:4]]
    produced = greedy(wrong, prompts, _NUM_TOKENS // 2)
    reference = reference_model(model.checkpoint)
    same = 0
    for prompt, out in zip(prompts, produced, strict=True):
        try:
            check_greedy(reference, prompt, out)
            same += 1
        except AssertionError:
            continue
    assert same < len(prompts)
