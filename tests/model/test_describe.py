"""ModelSpec from configs: fields, parameter-relevant shapes, and refusal of what would change the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ModelError, ModelFormatError, ModelNotFound
from megalith.model.describe import spec_from_hf
from megalith.model.rope import inverse_frequencies, rope_from_factors
from megalith.specs.model import ModelSpec, Rope
from tests.model.packaged import opened

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip


def _spec(folder: Path, config: Any, **changes: Any) -> ModelSpec:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config | changes))
    return spec_from_hf(folder)


def test_llama_3_1_8b(tmp_path: Path) -> None:
    spec = _spec(tmp_path, _LLAMA)
    assert (spec.family, spec.num_layers, spec.hidden, spec.head_dim, spec.ffn) == ("llama", 32, 4096, 128, 14336)
    assert (spec.num_heads, spec.num_kv_heads, spec.vocab, spec.max_context) == (32, 8, 128256, 131072)
    assert spec.rope == Rope(theta=500000.0, scaling="llama3", factor=8.0, original_context=8192)
    assert (spec.tied_embeddings, spec.norm_eps) == (False, 1e-5)


def test_both_spellings_of_the_rotary_embedding(tmp_path: Path) -> None:
    old = _spec(tmp_path, _LLAMA)
    parameters = _LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
    new = _spec(tmp_path, _LLAMA, rope_parameters=parameters, rope_scaling=None, rope_theta=None)
    assert old == new
    linear = _spec(tmp_path, _LLAMA, rope_scaling={"type": "linear", "factor": 4})
    assert linear.rope == Rope(theta=500000.0, scaling="linear", factor=4.0)


def test_qwens_and_mistral(tmp_path: Path) -> None:
    plain = _LLAMA | {"rope_scaling": None}
    qwen2 = _spec(tmp_path, plain, model_type="qwen2", use_sliding_window=False, sliding_window=4096)
    assert (qwen2.family, qwen2.attention_bias, qwen2.qk_norm, qwen2.sliding_window) == ("qwen2", True, False, None)
    qwen3 = _spec(tmp_path, plain, model_type="qwen3", hidden_size=1024, head_dim=None, attention_bias=False)
    assert (qwen3.family, qwen3.qk_norm, qwen3.head_dim, qwen3.attention_bias) == ("qwen3", True, 128, False)
    mistral = _spec(tmp_path, plain, model_type="mistral", sliding_window=4096)
    assert mistral.family == "llama"
    assert {mistral.layer_window(i) for i in range(mistral.num_layers)} == {4096}
    assert _spec(tmp_path, plain, model_type="mistral", sliding_window=None).sliding_window is None
    mixtral = _spec(tmp_path, plain, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    assert (mixtral.family, mixtral.num_experts, mixtral.experts_per_token) == ("mixtral", 8, 2)
    with pytest.raises(ModelFormatError, match="9 of 8 experts a token cannot be"):
        _spec(tmp_path, plain, model_type="mixtral", num_local_experts=8, num_experts_per_tok=9)


def test_gemma3_text_and_the_one_inside_the_multimodal_config(tmp_path: Path) -> None:
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    spec = _spec(tmp_path, {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
    assert (spec.family, spec.hidden, spec.num_heads, spec.num_kv_heads, spec.head_dim) == ("gemma3", 2560, 8, 4, 256)
    assert (spec.vocab, spec.tied_embeddings, spec.activation) == (262208, True, "gelu_tanh")
    assert spec.rope == Rope(theta=1e6, scaling="linear", factor=8.0)
    assert spec.rope_local == Rope(theta=1e4)
    assert [i for i in range(34) if spec.layer_window(i) is None] == [5, 11, 17, 23, 29]
    assert spec.embedding_scale == 2560**0.5
    alone = _spec(tmp_path, text | {"model_type": "gemma3_text", "query_pre_attn_scalar": 168, "head_dim": 128})
    assert alone.attention_scale == 168**-0.5


def test_gemma3_layer_types_must_be_periodic(tmp_path: Path) -> None:
    sliding, full = "sliding_attention", "full_attention"
    base = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 6}
    assert _spec(tmp_path, base, layer_types=[sliding, sliding, full] * 2).global_layer_period == 3
    none_global = _spec(tmp_path, base, layer_types=[sliding] * 6)
    assert {none_global.layer_window(i) for i in range(6)} == {4096}
    with pytest.raises(ModelFormatError, match="layer_types"):
        _spec(tmp_path, base, layer_types=[sliding, full, full, sliding, full, sliding])


def test_gpt_likes_can_be_planned(tmp_path: Path) -> None:
    gpt2 = _spec(
        tmp_path,
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    )
    assert (gpt2.family, gpt2.ffn, gpt2.num_positions, gpt2.position) == ("gpt2", 3072, 1024, "learned")
    assert (gpt2.linear_bias, gpt2.gated_ffn, gpt2.norm, gpt2.activation) == (True, False, "layer", "gelu_tanh")
    opt = {"model_type": "opt", "hidden_size": 9216, "ffn_dim": 36864, "num_hidden_layers": 64}
    opt |= {"num_attention_heads": 72, "vocab_size": 50272, "max_position_embeddings": 2048}
    spec = _spec(tmp_path, opt)
    assert (spec.family, spec.num_positions, spec.activation, spec.head_dim) == ("opt", 2050, "relu", 128)
    with pytest.raises(ModelFormatError, match="350M"):
        _spec(tmp_path, opt, word_embed_proj_dim=512)
    bloom = {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880}
    spec = _spec(tmp_path, bloom)
    assert (spec.family, spec.position, spec.embedding_norm, spec.ffn) == ("bloom", "alibi", True, 57344)


def test_gguf_metadata_of_both_models() -> None:
    smollm, gemma = opened("smollm2").spec, opened("gemma3-270m").spec
    assert (smollm.family, smollm.num_layers, smollm.hidden, smollm.num_heads) == ("llama", 30, 576, 9)
    assert (smollm.num_kv_heads, smollm.head_dim, smollm.ffn, smollm.vocab) == (3, 64, 1536, 49152)
    assert (smollm.rope, smollm.norm_eps, smollm.tied_embeddings) == (Rope(theta=1e5), 1e-5, True)
    assert (gemma.family, gemma.num_layers, gemma.hidden, gemma.head_dim) == ("gemma3", 18, 640, 256)
    assert (gemma.num_heads, gemma.num_kv_heads, gemma.vocab, gemma.norm_eps) == (4, 1, 262144, 1e-6)
    assert (gemma.rope, gemma.rope_local) == (Rope(theta=1e6), Rope(theta=1e4))
    assert (gemma.qk_norm, gemma.post_norms, gemma.attention_scale) == (True, True, 256**-0.5)
    assert [i for i in range(18) if gemma.layer_window(i) is None] == [5, 11, 17]


_BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "not an object"),
    "deep": ("[" * 100_000, "cannot be read"),
    "unknown type": (_LLAMA | {"model_type": "mamba"}, "'mamba'.*Supported: llama, mistral, qwen2"),
    "no type": ({}, "model_type ''"),
    "type of a type": ({"model_type": 5}, "must be a string"),
    "missing": ({"model_type": "llama", "hidden_size": 64}, "does not say num_attention_heads"),
    "text": (_LLAMA | {"hidden_size": "64"}, "hidden_size is '64'"),
    "true": (_LLAMA | {"hidden_size": True}, "hidden_size is True"),
    "zero": (_LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "huge": (_LLAMA | {"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
    "heads": (_LLAMA | {"num_key_value_heads": 5}, "32 query heads cannot share 5"),
    "odd head": (_LLAMA | {"head_dim": 127}, "127 is odd"),
    "eps": (_LLAMA | {"rms_norm_eps": -1.0}, "epsilon -1"),
    "yarn": (_LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn' is not supported"),
    "no factor": (_LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "does not say factor"),
    "low above high": (_LLAMA | {"rope_scaling": _LLAMA["rope_scaling"] | {"low_freq_factor": 9}}, "low_freq_factor"),
    "partial": (_LLAMA | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
    "biases": (_LLAMA | {"attention_bias": True}, "attention_bias is True"),
    "activation": (_LLAMA | {"hidden_act": "mish"}, "hidden_act is 'mish'"),
    "some windows": (
        _LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 9},
        "every layer or by none",
    ),
    "soft cap": ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "soft caps"),
}  # fmt: skip


@pytest.mark.parametrize("name", _BROKEN)
def test_what_cannot_be_right_is_refused(name: str, tmp_path: Path) -> None:
    config, message = _BROKEN[name]
    with pytest.raises(ModelFormatError, match=message):
        _spec(tmp_path, config)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        spec_from_hf(tmp_path)


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(sorted(_LLAMA)),
    value=st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.booleans() | st.lists(st.integers()),
    kind=st.sampled_from(["llama", "qwen3", "gemma3_text", "mixtral", "opt", "gpt2", "bloom", "gemma3"]),
)
def test_any_value_is_read_or_refused_in_words(
    key: str, value: Any, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        spec = _spec(tmp_path_factory.getbasetemp(), _LLAMA | {"model_type": kind} | {key: value})
    except ModelError as error:
        assert len(str(error)) > 20  # noqa: PT017
    else:
        assert spec.num_heads % spec.num_kv_heads == 0


def test_llama3_factors_of_a_gguf_file_become_the_same_frequencies() -> None:
    for factor, head_dim, theta in ((8.0, 128, 500000.0), (32.0, 64, 500000.0)):
        rope = Rope(theta=theta, scaling="llama3", factor=factor)
        plain = inverse_frequencies(Rope(theta=theta), head_dim)
        factors = (plain / inverse_frequencies(rope, head_dim)).astype(np.float32)
        found = rope_from_factors(factors, theta, head_dim, "x")
        assert found.factor == pytest.approx(factor, rel=1e-5)
        assert np.allclose(inverse_frequencies(found, head_dim), inverse_frequencies(rope, head_dim), rtol=1e-5)
    assert rope_from_factors(np.ones(32, np.float32), 1e4, 64, "x") == Rope(theta=1e4)
    with pytest.raises(ModelFormatError, match="largest divisor is 7"):
        rope_from_factors(np.linspace(1, 7, 32, dtype=np.float32), 1e4, 64, "x")
    with pytest.raises(ModelFormatError, match="rule"):
        rope_from_factors(np.full(32, np.nan, np.float32), 1e4, 64, "x")
