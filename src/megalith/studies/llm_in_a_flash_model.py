"""A Llama with gated ReLU FFNs of which about one neuron in twenty fires: random weights, a real model directory.

How often a neuron fires is drawn from a Beta distribution with mean ACTIVE: few fire for almost every token, most for
almost none, as in trained ReLU models (arXiv:2312.11514, figures 3 and 4). Sixteen components of every hidden state are
constant; a neuron's weights to them are its threshold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megalith.model.safetensors_write import Stored, write_directory

F32 = NDArray[np.float32]
ACTIVE, SPREAD = 0.05, 3.0
"""Mean, and a + b of Beta(a, b): the smaller, the more neurons fire nearly always or nearly never."""
_CONSTANT, _HEIGHT = 16, 2.5
"""Components that are constant, and what a norm makes of each."""
_GROWTH = 0.05
"""Variance that a layer's FFN adds to hidden states of variance 1."""


class Shape(NamedTuple):
    """Sizes of the model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    context: int = 512


def write_relu_model(path: Path, shape: Shape, seed: int = 0) -> Path:
    """Write the directory; there is none of that name yet. float32, a tokenizer of bytes."""
    tokenizer = _tokenizer()
    vocab = tokenizer.get_vocab_size()
    sizes = _sizes(shape, vocab)
    tensors = [Stored(name, "F32", size, 4 * int(np.prod(size))) for name, size in sizes.items()]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "intermediate_size": shape.ffn, "vocab_size": vocab,
        "max_position_embeddings": shape.context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "relu",
        "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 0,
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    beside = {"config.json": json.dumps(config).encode(), "tokenizer.json": tokenizer.to_str().encode()}
    write_directory(path, tensors, _pieces(sizes, shape, seed), beside)
    return path


def _tokenizer() -> Tokenizer:
    """Id 0 is special, then every byte."""
    texts = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([texts[0]])
    return tokenizer


def _sizes(shape: Shape, vocab: int) -> dict[str, tuple[int, ...]]:
    d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d)}
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        sizes |= {f"{at}{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        sizes |= {f"{at}self_attn.{name}_proj.weight": size
                  for name, size in (("q", (q, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, q)))}  # fmt: skip
        sizes |= {f"{at}mlp.{name}_proj.weight": (shape.ffn, d) for name in ("gate", "up")}
        sizes[f"{at}mlp.down_proj.weight"] = (d, shape.ffn)
    return sizes | {"model.norm.weight": (d,), "lm_head.weight": (vocab, d)}


def _pieces(sizes: dict[str, tuple[int, ...]], shape: Shape, seed: int) -> Iterator[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    for name, size in sizes.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        found = _vector(name, size[0], layer) if len(size) == 1 else _matrix(name, size, shape, rng)
        yield np.ascontiguousarray(found).view(np.uint8).reshape(-1)


def _vector(name: str, size: int, layer: int) -> F32:
    """A norm: attention does not see the constant components, the FFN sees them as _HEIGHT each."""
    found = np.ones(size, np.float32)
    if "post_attention" in name:
        found[:_CONSTANT] = _HEIGHT * (1 + 1.5 * _GROWTH * layer) ** 0.5
    else:
        found[:_CONSTANT] = 0
    return found


def _matrix(name: str, size: tuple[int, ...], shape: Shape, rng: np.random.Generator) -> F32:
    found = rng.standard_normal(size, np.float32)
    if "embed_tokens" in name:
        found[:, :_CONSTANT] = 1
    elif "down_proj" in name:
        found *= (_GROWTH / (0.25 * ACTIVE * shape.ffn)) ** 0.5
        found[:_CONSTANT] = 0
    elif "o_proj" in name:
        found *= (_GROWTH / size[1]) ** 0.5
        found[:_CONSTANT] = 0
    else:
        found *= (4.0 if "lm_head" in name else 1.0) / size[1] ** 0.5
    if "gate_proj" in name:
        often = np.clip(rng.beta(ACTIVE * SPREAD, (1 - ACTIVE) * SPREAD, size[0]), 1e-5, 0.98)
        normal = NormalDist()
        threshold = np.array([normal.inv_cdf(1 - p) for p in often.tolist()], np.float32)
        found[:, :_CONSTANT] = -threshold[:, None] / (_HEIGHT * _CONSTANT)
    return found
