"""What a Hugging Face directory has beside its weights, for a model that comes from a GGUF file or from another one.

Knows the keys that `describe` and `tokenizer_hf` read back, and that transformers reads. A directory keeps its own
files; from GGUF they are made anew.
"""

from __future__ import annotations

from typing import Any

import msgspec

from megalith.base.errors import ModelFormatError
from megalith.model.open import OpenModel
from megalith.model.tokenizer import Tokenizer
from megalith.model.tokenizer_hf import read_json
from megalith.specs.model import ModelSpec, Rope

_NAMES = {
    "llama": ("llama", "LlamaForCausalLM"), "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"), "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}  # fmt: skip
_KEPT = ("*.json", "*.jinja", "*.txt", "*.model")


def metadata_files(model: OpenModel, dtype: str, quantization: dict[str, Any] | None) -> dict[str, bytes]:
    """{file name: content} of all that is not weights. `quantization` is config.json's quantization_config."""
    if model.files.kind == "hf":
        folder = model.files.path
        names = sorted({path for pattern in _KEPT for path in folder.glob(pattern)} - {folder / "config.json"})
        found = {path.name: path.read_bytes() for path in names if not path.name.endswith(".safetensors.index.json")}
        config = read_json(folder / "config.json")
    else:
        found = _tokenizer_files(model)
        config = config_of(model.spec)
        config |= {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": model.tokenizer.eos_id}
    for key in ("quantization_config", "dtype", "torch_dtype"):
        config.pop(key, None)
    config |= {"torch_dtype": dtype} | ({} if quantization is None else {"quantization_config": quantization})
    return found | {"config.json": _json(config)}


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """`config.json` of a runnable spec, such that `spec_from_hf` gives the same model back."""
    model_type, architecture = _NAMES[spec.family]
    config: dict[str, Any] = {
        "architectures": [architecture], "model_type": model_type, "hidden_size": spec.hidden,
        "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "intermediate_size": spec.ffn,
        "vocab_size": spec.vocab, "max_position_embeddings": spec.max_context, "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings, "rope_theta": spec.rope.theta,
    }  # fmt: skip
    if spec.rope.scaling != "none":
        config["rope_scaling"] = _scaling(spec.rope)
    if spec.family != "gemma3":
        if spec.sliding_window is not None:
            raise ModelFormatError(f"{spec.name} has a sliding window, which is not written to config.json.")
        return config | {"hidden_act": spec.activation}
    local = spec.rope if spec.rope_local is None else spec.rope_local
    layers = range(spec.num_layers)
    kinds = ["full_attention" if spec.layer_window(i) is None else "sliding_attention" for i in layers]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": round(spec.attention_scale**-2),
        "rope_local_base_freq": local.theta, "sliding_window": spec.sliding_window, "layer_types": kinds,
        "sliding_window_pattern": spec.global_layer_period, "attention_bias": False,
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
    }  # fmt: skip


def _scaling(rope: Rope) -> dict[str, Any]:
    if rope.scaling == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    return {
        "rope_type": rope.scaling, "factor": rope.factor, "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor, "original_max_position_embeddings": rope.original_context,
    }  # fmt: skip


def _tokenizer_files(model: OpenModel) -> dict[str, bytes]:
    tokenizer = model.tokenizer
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.add_bos}
    for key, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if number is not None:
            config[key] = tokenizer.token_text(number)
    if model.chat_template is not None:
        config["chat_template"] = model.chat_template.source
    return {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json({"eos_token_id": sorted(tokenizer.eos_ids)}),
    }


def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The library's own file; where the model wants one, its template puts the beginning-of-text token in front."""
    data = msgspec.json.decode(tokenizer.backend.to_str())
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        text = tokenizer.token_text(tokenizer.bos_id)
        token = {"SpecialToken": {"id": text, "type_id": 0}}
        parts = {name: {"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")}
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [token, parts["A"]],
            "pair": [token, parts["A"], token, parts["B"]],
            "special_tokens": {text: {"id": text, "ids": [tokenizer.bos_id], "tokens": [text]}},
        }
    return _json(data)


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
