"""Hugging Face transformers as the oracle: a model built from its config, filled with our dequantised weights.

Nothing is fetched: no hub, no file but ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalith.model.checkpoint import Checkpoint
from megalith.specs.model import ModelSpec, Rope

_HF_PART = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj", "attn_norm": "input_layernorm",
}  # fmt: skip


def reference_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers causal language model with the exact float32 values of `checkpoint`."""
    config, kind = reference_config(checkpoint.spec)
    with torch.device("meta"):
        model = kind(config)
    state = {_hf_name(name, checkpoint.spec): _value(checkpoint, name).to(dtype) for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    rope = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rope
    if hasattr(model.model.embed_tokens, "embed_scale"):
        model.model.embed_tokens.embed_scale = torch.tensor(checkpoint.spec.embedding_scale)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, left
    return model.eval()


def reference_config(spec: ModelSpec) -> tuple[Any, Any]:
    """(config, class) of transformers for a spec."""
    import transformers as hf

    fields: dict[str, Any] = {
        "vocab_size": spec.vocab, "hidden_size": spec.hidden, "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_context, "tie_word_embeddings": spec.tied_embeddings,
        "rope_parameters": _rope(spec.rope), "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    if spec.family == "gemma3":
        assert spec.rope_local is not None
        types = ["sliding_attention" if spec.layer_window(i) else "full_attention" for i in range(spec.num_layers)]
        fields |= {
            "layer_types": types,
            "sliding_window": spec.sliding_window,
            "query_pre_attn_scalar": round(spec.attention_scale**-2),
            "rope_parameters": {"full_attention": _rope(spec.rope), "sliding_attention": _rope(spec.rope_local)},
        }
        return hf.Gemma3TextConfig(**fields), hf.Gemma3ForCausalLM
    classes = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
    }
    config, model = classes[spec.family]
    return config(**fields), model


def _rope(rope: Rope) -> dict[str, Any]:
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling == "linear":
        return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}
    return {
        "rope_type": "llama3", "rope_theta": rope.theta, "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }  # fmt: skip


def _hf_name(name: str, spec: ModelSpec) -> str:
    top = {"embed.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name]
    if name == "head.weight":
        return "lm_head.weight"
    _, layer, part, kind = name.split(".")
    norms = {"ffn_norm": "post_attention_layernorm"}
    if spec.post_norms:
        norms = {
            "ffn_norm": "pre_feedforward_layernorm",
            "post_attn_norm": "post_attention_layernorm",
            "post_ffn_norm": "post_feedforward_layernorm",
        }
    return f"model.layers.{layer}.{(_HF_PART | norms)[part]}.{kind}"


def _value(checkpoint: Checkpoint, name: str) -> Tensor:
    values = checkpoint.tensor(name).float32()
    if checkpoint.spec.family == "gemma3" and name.split(".")[-2].endswith("norm"):
        values -= np.float32(1)  # transformers adds it again
    return torch.from_numpy(values)


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int], last: int = 0) -> Tensor:
    """Float32 logits [len(ids), V] of one sequence, or of its `last` positions only."""
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=last).logits[0]
    return logits.float()


@torch.inference_mode()
def check_greedy(model: Any, prompt: list[int], produced: list[int]) -> float:
    """Assert that `produced` is what the reference would choose greedily after `prompt`, token by token.

    One forward over prompt + output gives the reference's choice after every prefix; if each is the next token, then
    its own greedy decoding is that sequence, by induction. Returns the least lead of a choice over the runner-up.
    """
    logits = reference_logits(model, prompt + produced[:-1], last=len(produced))
    top = logits.topk(2, dim=-1)
    chosen = top.indices[:, 0].tolist()
    assert chosen == produced, _first_difference(chosen, produced, logits)
    return float((top.values[:, 0] - top.values[:, 1]).min())


def _first_difference(chosen: list[int], produced: list[int], logits: Tensor) -> str:
    at = next(i for i, (a, b) in enumerate(zip(chosen, produced, strict=True)) if a != b)
    a, b = chosen[at], produced[at]
    return f"token {at}: the reference has {a} at {logits[at, a]:.5f}, we have {b}, at {logits[at, b]:.5f} there"
