"""Models that nobody has made yet: `dense:100T` or `moe:200T`, in the proportions of GenZ's hypothetical ones.

The released analyser of GenZ (arXiv:2406.01698, Models/Model_sets/misc.py) has SuperLLM-5T-Dense (128 layers, 192 heads
of 256, 24 KV heads, gated FFN of 4 hidden) and SuperLLM-10T-MoE (128 layers, 108 heads of 128, 12 KV heads, 32 experts
of 4 hidden, 4 a token). Depth, width and heads grow in proportion, so that parameters grow with the cube of the width.
Knows shapes only; must not know devices.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megalith.base.errors import ConfigError
from megalith.cost.parameters import count
from megalith.specs.model import ModelSpec

_TEXT = re.compile(r"(dense|moe):(\d+(?:\.\d+)?)([bt])", re.IGNORECASE)
LEAST, MOST = 1e9, 1e17
VOCAB = 256_000
MAX_CONTEXT = 102_400
"""Both as in the released analyser."""


class _Family(NamedTuple):
    head_dim: int
    group: int
    """Query heads that share a KV head."""
    hidden_per_layer: float
    experts: int
    experts_per_token: int


FAMILIES = {"dense": _Family(256, 8, 192 * 256 / 128, 0, 0), "moe": _Family(128, 9, 108 * 128 / 128, 32, 4)}


def is_shape(name: str) -> bool:
    """Whether a name asks for a hypothetical model."""
    return name.lower().startswith(("dense:", "moe:"))


def hypothetical(name: str) -> ModelSpec:
    """The model of that kind whose parameters come nearest to what is asked for. Raises ConfigError."""
    match = _TEXT.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name!r} is no hypothetical model.", "Write it like dense:100T, dense:70B or moe:200T.")
    kind, wanted = match[1].lower(), float(match[2]) * {"b": 1e9, "t": 1e12}[match[3].lower()]
    if not LEAST <= wanted <= MOST:
        raise ConfigError(f"{name!r} is outside of what is answered.", "Ask for 1B to 100000T.")
    low, high = 1, 2
    while _total(name, kind, high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _total(name, kind, middle) < wanted else (low, middle)
    return min((_spec(name, kind, size) for size in (low, high)), key=lambda spec: abs(count(spec).total - wanted))


def _total(name: str, kind: str, kv_heads: int) -> int:
    return count(_spec(name, kind, kv_heads)).total


def _spec(name: str, kind: str, kv_heads: int) -> ModelSpec:
    family = FAMILIES[kind]
    heads = kv_heads * family.group
    hidden = heads * family.head_dim
    return ModelSpec(
        name=name, family="mixtral" if family.experts else "llama",
        num_layers=max(1, round(hidden / family.hidden_per_layer)), hidden=hidden,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=family.head_dim, ffn=4 * hidden, vocab=VOCAB,
        max_context=MAX_CONTEXT, num_experts=family.experts, experts_per_token=family.experts_per_token,
        source="proportions of the hypothetical models of GenZ (arXiv:2406.01698)",
    )  # fmt: skip
