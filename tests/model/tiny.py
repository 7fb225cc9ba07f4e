"""Tiny random models of every family, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-wide-heads": ("Llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 24,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}  # fmt: skip


def make(case: str, **changes: Any) -> Any:
    """A transformers model of `case` with random weights (norms and biases included), in evaluation mode."""
    import transformers as hf

    kind, fields = CASES[case]
    config = getattr(hf, f"{kind}Config")(**(_SHAPE | {"attn_implementation": "eager"} | fields | changes))
    torch.manual_seed(11)
    model = getattr(hf, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.copy_(torch.randn_like(weight) * 0.15)
    return model


def save(model: Any, folder: Path, max_shard_size: str = "5GB") -> Path:
    """The model as a Hugging Face directory."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Float32 logits [len(ids), V] of one sequence."""
    out: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return out.float()
