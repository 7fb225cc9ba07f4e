"""GGUF files of transformers models, written with the gguf package the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

_PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_exps": "ffn_gate_exps", "mlp.experts.up_exps": "ffn_up_exps",
    "mlp.experts.down_exps": "ffn_down_exps",
}  # fmt: skip
_GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(model: Any, path: Path, kind: str = "F32", factors: np.ndarray | None = None) -> Path:
    """`model` as a GGUF file whose matrices are in format `kind`; `factors` become rope_freqs.weight."""
    config = model.config
    architecture = {"gemma3_text": "gemma3", "mixtral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if name.endswith("mlp.experts.gate_up_proj"):  # transformers stacks both, llama.cpp each
            stem = name.removesuffix("gate_up_proj")
            for part, half in zip(("gate_exps", "up_exps"), np.split(values, 2, axis=1), strict=True):
                _add(writer, f"{stem}{part}.weight", np.ascontiguousarray(half), config, architecture, kind)
            continue
        name = f"{name}.weight".replace("down_proj", "down_exps") if name.endswith("experts.down_proj") else name
        _add(writer, name, values, config, architecture, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, values: np.ndarray, config: Any, architecture: str, kind: str) -> None:
    stem, _, end = name.rpartition(".")
    if stem in _TOP:
        stored = _TOP[stem]
    else:
        _, _, layer, part = stem.split(".", 3)
        stored = f"blk.{layer}.{(_PARTS | (_GEMMA_PARTS if architecture == 'gemma3' else {}))[part]}"
    if architecture == "llama" and stored.endswith(("attn_q", "attn_k")):
        heads = config.num_attention_heads if stored.endswith("q") else config.num_key_value_heads
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if architecture == "gemma3" and stored.endswith("norm"):
        values = values + np.float32(1)
    quantised = kind if values.ndim >= 2 else "F32"
    chosen = gguf.GGMLQuantizationType[quantised]
    writer.add_tensor(f"{stored}.{end}", gguf.quants.quantize(values, chosen), raw_dtype=chosen)
