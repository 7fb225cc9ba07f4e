"""ModelSpec from what a model's files say about themselves: GGUF metadata or a Hugging Face `config.json`.

Knows the key names and defaults of both worlds. Must not look at weights beyond their names and shapes. Whatever would
silently change the arithmetic (an unknown rotary scaling, a soft cap, a bias we have no place for) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megalith.base.errors import ModelFormatError, ModelNotFound
from megalith.model.fields import Fields
from megalith.model.formats import dequantize
from megalith.model.gguf import GgufFile
from megalith.model.rope import rope_from_factors, rope_from_hf
from megalith.specs.model import Activation, Family, ModelSpec, Rope

RUNNABLE: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "gemma3", "mixtral")
"""Families that can be loaded and run; the others can only be planned."""

_MAX_EXPERTS = 1 << 12

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_GGUF_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_PERIOD = 6
_GEMMA3_27B_HIDDEN = 5376
_MAX_CONFIG_BYTES = 16 << 20


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """The spec of an opened GGUF file. Raises ModelFormatError: unsupported architecture, missing or impossible key."""
    architecture = file.metadata.get("general.architecture")
    family = _GGUF_FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise ModelFormatError(
            f"{file.path} holds the architecture {architecture!r}, which is not supported.",
            f"Supported in GGUF: {', '.join(_GGUF_FAMILIES)}.",
        )
    prefix = f"{architecture}."
    keys = Fields({k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}, str(file.path))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFormatError(
            f"{file.path} has no two-dimensional tensor token_embd.weight: its vocabulary is unknown."
        )
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.bad("attention.value_length", f"the key length {head_dim}, as everywhere")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise keys.bad(
            "rope.dimension_count", f"the head dimension {head_dim}: partial rotary embedding is not supported"
        )
    experts = keys.integer("expert_count", 0, least=0)
    spec = ModelSpec(
        name=file.path.stem,
        family="mixtral" if experts else family,
        num_layers=keys.integer("block_count"),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=keys.integer("feed_forward_length"),
        vocab=embedding.shape[0],
        max_context=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_gguf_rope(file, keys, head_dim),
        tied_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm=family in ("qwen3", "gemma3"),
        num_experts=experts,
        experts_per_token=keys.integer("expert_used_count", 0, least=0) if experts else 0,
        source=f"GGUF metadata of {file.path.name}",
    )
    return _checked(_gguf_gemma3(spec, keys) if family == "gemma3" else spec, str(file.path))


def _gguf_rope(file: GgufFile, keys: Fields, head_dim: int) -> Rope:
    theta = keys.number("rope.freq_base", 10_000.0)
    if "rope_freqs.weight" in file.tensors:
        tensor = file.tensors["rope_freqs.weight"]
        if tensor.shape != (head_dim // 2,):
            raise ModelFormatError(f"{file.path}: rope_freqs.weight has shape {tensor.shape}, not ({head_dim // 2},).")
        factors = dequantize(file.raw(tensor.name), tensor.type, tensor.shape)
        return rope_from_factors(factors, theta, head_dim, str(file.path))
    scaling = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if scaling not in ("none", "linear"):
        raise keys.bad("rope.scaling.type", "none or linear (llama3 comes as a tensor rope_freqs.weight)")
    return Rope(theta=theta) if factor in (0.0, 1.0) else Rope(theta=theta, scaling="linear", factor=factor)


def _gguf_gemma3(spec: ModelSpec, keys: Fields) -> ModelSpec:
    """What every Gemma 3 shares and its GGUF leaves unsaid (Gemma 3 report, arXiv:2503.19786)."""
    # The 27B model alone divides by its width per head instead of the head dimension.
    scale = (spec.hidden / spec.num_heads) ** -0.5 if spec.hidden == _GEMMA3_27B_HIDDEN else None
    return msgspec.structs.replace(
        spec,
        activation="gelu_tanh",
        post_norms=True,
        embedding_scale=spec.hidden**0.5,
        query_scale=scale,
        rope_local=Rope(theta=keys.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)),
        sliding_window=keys.integer("attention.sliding_window"),
        global_layer_period=keys.integer("attention.sliding_window_pattern", _GEMMA3_PERIOD),
    )


def spec_from_hf(directory: Path) -> ModelSpec:
    """The spec of a Hugging Face model directory, from its `config.json` alone.

    Raises ModelNotFound without that file, ModelFormatError for an unsupported model type or an impossible value.
    """
    path = directory / "config.json"
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelFormatError(f"{path} has {path.stat().st_size} bytes; a config takes a few thousand.")
        data = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise ModelNotFound(f"{directory} has no config.json, so it is not a Hugging Face model directory.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ModelFormatError(f"{path} holds a JSON {type(data).__name__}, not an object.")
    config = Fields(data, str(path))
    kind = config.text("model_type", "")
    reader = _HF_READERS.get(kind)
    if reader is None:
        raise ModelFormatError(
            f"{path} has model_type {kind!r}, which is not supported.",
            f"Supported: {', '.join(_HF_READERS)} ({', '.join(RUNNABLE)} families run; the rest can be planned).",
        )
    spec = reader(config, directory.resolve().name)
    return _checked(msgspec.structs.replace(spec, source=f"config.json of {directory.resolve().name}"), str(path))


def _hf_llama(config: Fields, name: str, **extra: Any) -> ModelSpec:
    """Everything that Llama, Mistral, Mixtral and both Qwens have in common."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    fields: dict[str, Any] = {
        "name": name,
        "family": "llama",
        "num_layers": config.integer("num_hidden_layers"),
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": config.integer("num_key_value_heads", heads),
        "head_dim": config.integer("head_dim", hidden // heads),
        "ffn": config.integer("intermediate_size"),
        "vocab": config.integer("vocab_size"),
        "max_context": config.integer("max_position_embeddings", 2048),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "activation": _activation(config, "hidden_act", "silu"),
        "rope": rope_from_hf(config),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        **_window(config),
    }
    for key in ("attention_bias", "mlp_bias"):
        if config.flag(key, False):
            raise config.bad(key, "false: biases on every projection are not supported for this family")
    return ModelSpec(**(fields | extra))


def _hf_qwen2(config: Fields, name: str) -> ModelSpec:
    return _hf_llama(config, name, family="qwen2", attention_bias=True)


def _hf_qwen3(config: Fields, name: str) -> ModelSpec:
    return _hf_llama(config, name, family="qwen3", qk_norm=True, head_dim=config.integer("head_dim", 128))


def _hf_mixtral(config: Fields, name: str) -> ModelSpec:
    experts, used = config.integer("num_local_experts", 8), config.integer("num_experts_per_tok", 2)
    return _hf_llama(config, name, family="mixtral", num_experts=experts, experts_per_token=used)


def _hf_gemma3_multimodal(config: Fields, name: str) -> ModelSpec:
    """The text model inside a multimodal Gemma 3; what its `text_config` leaves out has the published defaults."""
    return _hf_gemma3(config.section("text_config"), name)


def _hf_gemma3(config: Fields, name: str) -> ModelSpec:
    hidden, head_dim = config.integer("hidden_size", 2304), config.integer("head_dim", 256)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.present(key):
            raise config.bad(key, "null: soft caps are not supported")
    if config.flag("attention_bias", False) or config.flag("use_bidirectional_attention", False):
        raise ModelFormatError(f"{config.origin}: attention biases and bidirectional attention are not supported.")
    scalar = config.number("query_pre_attn_scalar", 256.0)
    if scalar <= 0:
        raise config.bad("query_pre_attn_scalar", "above 0")
    return ModelSpec(
        name=name,
        family="gemma3",
        num_layers=config.integer("num_hidden_layers", 26),
        hidden=hidden,
        num_heads=config.integer("num_attention_heads", 8),
        num_kv_heads=config.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        ffn=config.integer("intermediate_size", 9216),
        vocab=config.integer("vocab_size", 262_208),
        max_context=config.integer("max_position_embeddings", 131_072),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        rope=rope_from_hf(config, "full_attention", 1_000_000.0),
        rope_local=rope_from_hf(
            config, "sliding_attention", config.number("rope_local_base_freq", _GEMMA3_LOCAL_THETA)
        ),
        tied_embeddings=config.flag("tie_word_embeddings", True),
        qk_norm=True,
        post_norms=True,
        embedding_scale=hidden**0.5,
        query_scale=None if scalar == head_dim else scalar**-0.5,
        sliding_window=config.integer("sliding_window", 4096),
        global_layer_period=_gemma3_period(config),
    )


def _gemma3_period(config: Fields) -> int:
    types = config.strings("layer_types")
    if types is None:
        return config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", _GEMMA3_PERIOD))
    period = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(types))]
    if types != expected:
        raise config.bad("layer_types", "one full_attention layer after every fixed number of sliding_attention layers")
    return period


def _window(config: Fields) -> dict[str, int]:
    """Sliding window of Mistral (every layer) and Qwen (behind a switch): all layers or none."""
    if not config.present("sliding_window") or not config.flag("use_sliding_window", True):
        return {}
    layers = config.integer("num_hidden_layers")
    first_sliding = config.integer("max_window_layers", 0, least=0)
    types = config.strings("layer_types") or ["full_attention" if i < first_sliding else "" for i in range(layers)]
    full = types.count("full_attention")
    if full == layers:
        return {}
    if full:
        raise config.bad("sliding_window", "used by every layer or by none")
    return {"sliding_window": config.integer("sliding_window"), "global_layer_period": layers + 1}


def _hf_gpt2(config: Fields, name: str) -> ModelSpec:
    hidden, heads, context = config.integer("n_embd"), config.integer("n_head"), config.integer("n_positions")
    ffn = config.integer("n_inner", 4 * hidden)
    shape = _old_shape("gpt2", name, config.integer("n_layer"), hidden, heads, ffn)
    return msgspec.structs.replace(
        shape,
        vocab=config.integer("vocab_size"),
        max_context=context,
        num_positions=context,
        position="learned",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=_activation(config, "activation_function", "gelu_new"),
    )


def _hf_opt(config: Fields, name: str) -> ModelSpec:
    hidden = config.integer("hidden_size")
    if config.integer("word_embed_proj_dim", hidden) != hidden or not config.flag("do_layer_norm_before", True):
        raise ModelFormatError(f"{config.origin}: OPT with projected embeddings (the 350M model) is not supported.")
    heads, context = config.integer("num_attention_heads"), config.integer("max_position_embeddings", 2048)
    shape = _old_shape("opt", name, config.integer("num_hidden_layers"), hidden, heads, config.integer("ffn_dim"))
    return msgspec.structs.replace(
        shape,
        vocab=config.integer("vocab_size"),
        max_context=context,
        num_positions=context + 2,
        position="learned",
        activation=_activation(config, "activation_function", "relu"),
    )


def _hf_bloom(config: Fields, name: str) -> ModelSpec:
    hidden = config.integer("hidden_size", config.integer("n_embed", 0, least=0))
    heads = config.integer("n_head", config.integer("num_attention_heads", 0, least=0))
    layers = config.integer("n_layer", config.integer("num_hidden_layers", 0, least=0))
    return msgspec.structs.replace(
        _old_shape("bloom", name, layers, hidden, heads, 4 * hidden),
        vocab=config.integer("vocab_size"),
        max_context=config.integer("seq_length", 2048),
        position="alibi",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        embedding_norm=True,
    )


def _old_shape(family: Family, name: str, layers: int, hidden: int, heads: int, ffn: int) -> ModelSpec:
    """What GPT-2, OPT and BLOOM share: layer norm, biases everywhere, two-matrix FFN, tied head, no grouped heads."""
    return ModelSpec(
        name=name,
        family=family,
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads if heads else 0,
        ffn=ffn,
        vocab=1,
        max_context=1,
        norm="layer",
        gated_ffn=False,
        tied_embeddings=True,
        attention_bias=True,
        linear_bias=True,
    )


def _activation(config: Fields, key: str, default: str) -> Activation:
    found = _ACTIVATIONS.get(config.text(key, default))
    if found is None:
        raise config.bad(key, f"one of {', '.join(_ACTIVATIONS)}")
    return found


def _checked(spec: ModelSpec, origin: str) -> ModelSpec:
    """`spec` if its numbers are possible together. Raises ModelFormatError."""
    limits = {"num_layers": 1 << 13, "hidden": 1 << 20, "num_heads": 1 << 14, "head_dim": 1 << 14, "vocab": 1 << 24}
    for name, most in (limits | {"ffn": 1 << 24, "max_context": 1 << 31, "global_layer_period": 1 << 14}).items():
        value = getattr(spec, name)
        if not 1 <= value <= most:
            raise ModelFormatError(f"{origin}: {name} is {value}, which is not between 1 and {most}.")
    if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
        raise ModelFormatError(f"{origin}: {spec.num_heads} query heads cannot share {spec.num_kv_heads} KV heads.")
    if spec.num_experts and not 1 <= spec.experts_per_token <= spec.num_experts <= _MAX_EXPERTS:
        raise ModelFormatError(
            f"{origin}: {spec.experts_per_token} of {spec.num_experts} experts a token cannot be; at most "
            f"{_MAX_EXPERTS} are read."
        )
    if spec.position == "rope" and spec.head_dim % 2:
        raise ModelFormatError(f"{origin}: the head dimension {spec.head_dim} is odd; a rotary embedding needs pairs.")
    if not (0 < spec.norm_eps < 1 and spec.rope.theta > 0 and np.isfinite(spec.rope.theta)):
        raise ModelFormatError(f"{origin}: norm epsilon {spec.norm_eps} or rope theta {spec.rope.theta} is impossible.")
    return spec


_HF_READERS: dict[str, Callable[[Fields, str], ModelSpec]] = {
    "llama": _hf_llama,
    "mistral": _hf_llama,
    "qwen2": _hf_qwen2,
    "qwen3": _hf_qwen3,
    "gemma3_text": _hf_gemma3,
    "gemma3": _hf_gemma3_multimodal,
    "mixtral": _hf_mixtral,
    "gpt2": _hf_gpt2,
    "opt": _hf_opt,
    "bloom": _hf_bloom,
}
