"""A tiny random Llama as a real model directory: safetensors, config.json and a byte-level tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 2, 4, 2, 16, 96
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 300


def write_tiny_llama(directory: Path, seed: int = 0) -> Path:
    """The model directory, with weights large enough that greedy choices are clear and varied."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (rng.normal(0, scale / columns**0.5, (rows, columns))).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 8.0),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": matrix(VOCAB, HIDDEN, 4.0),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            layer + "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            layer + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN, 2.0),
            layer + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN, 2.0),
            layer + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN, 3.0),
            layer + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM, 3.0),
            layer + "mlp.gate_proj.weight": matrix(FFN, HIDDEN, 2.0),
            layer + "mlp.up_proj.weight": matrix(FFN, HIDDEN, 2.0),
            layer + "mlp.down_proj.weight": matrix(HIDDEN, FFN, 2.0),
        }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": FFN,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1,
        "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    _tokenizer().save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "chat_template": template})
    )
    return directory


def _tokenizer() -> Tokenizer:
    """Ids 0 to 2 special, then every byte, then pairs of letters up to the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = SPECIAL + alphabet
    merges = [(a, b) for a in "etaoin" for b in "srhldu"] + [("Ġ", c) for c in "taoswc"]
    merges = merges[: VOCAB - len(texts)]
    texts += [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer
