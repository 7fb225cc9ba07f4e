"""GGUF metadata for a model that comes from a Hugging Face directory: its description and its tokenizer.

Knows the key names that `describe` and `tokenizer_gguf` read back. What GGUF has no key for that we read is refused,
never dropped: a file that would compute something else is worse than none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megalith.base.errors import ModelFormatError
from megalith.model.chat import template_from_hf
from megalith.model.gguf_write import pair
from megalith.model.tokenizer_hf import read_json, tokenizer_from_hf
from megalith.specs.model import ModelSpec

_NORMAL, _CONTROL, _USER = 1, 3, 4
_HINT = "A GGUF file of this model from llama.cpp's converter can be quantized here."


def pairs_from_hf(spec: ModelSpec, directory: Path) -> list[bytes]:
    """All metadata pairs. Raises ModelFormatError for what cannot be said in GGUF or read back from it."""
    _check_spec(spec)
    arch = spec.family
    numbers: dict[str, int | float] = {
        "block_count": spec.num_layers, "context_length": spec.max_context, "embedding_length": spec.hidden,
        "feed_forward_length": spec.ffn, "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads, "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim, "rope.dimension_count": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps), "rope.freq_base": float(spec.rope.theta),
    }  # fmt: skip
    if spec.rope.scaling == "linear":
        numbers["rope.scaling.factor"] = float(spec.rope.factor)
    pairs = [pair("general.architecture", arch), pair("general.name", spec.name)]
    pairs.append(pair("general.quantization_version", 2))
    pairs += [pair(f"{arch}.{key}", value) for key, value in numbers.items()]
    if spec.rope.scaling == "linear":
        pairs.append(pair(f"{arch}.rope.scaling.type", "linear"))
    return pairs + _tokenizer_pairs(spec, directory)


def _check_spec(spec: ModelSpec) -> None:
    if spec.family not in ("llama", "qwen2", "qwen3"):
        raise ModelFormatError(f"{spec.name}: a Hugging Face {spec.family} cannot be written as GGUF yet.", _HINT)
    if spec.rope.scaling not in ("none", "linear") or spec.sliding_window:
        what = f"rotary scaling {spec.rope.scaling!r}" if not spec.sliding_window else "a sliding window"
        raise ModelFormatError(f"{spec.name} has {what}, which is not written to GGUF.", _HINT)


def _tokenizer_pairs(spec: ModelSpec, directory: Path) -> list[bytes]:
    data: dict[str, Any] = msgspec.json.decode((directory / "tokenizer.json").read_bytes())
    model = data.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback") or "merges" not in model:
        raise ModelFormatError(f"{directory}: only byte-level BPE tokenizers are written to GGUF.", _HINT)
    tokenizer = tokenizer_from_hf(directory)
    texts = [f"[PAD{i}]" for i in range(spec.vocab)]
    types = np.full(spec.vocab, _USER, np.int32)
    for text, number in model["vocab"].items():
        texts[number], types[number] = text, _NORMAL
    for token in data.get("added_tokens", []):
        texts[token["id"]], types[token["id"]] = token["content"], _CONTROL if token["special"] else _USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    pairs = [
        pair("tokenizer.ggml.model", "gpt2"), pair("tokenizer.ggml.pre", _splitter(data, directory)),
        pair("tokenizer.ggml.tokens", texts), pair("tokenizer.ggml.token_type", types),
        pair("tokenizer.ggml.merges", merges),
        pair("tokenizer.ggml.add_bos_token", bool(read_json(directory / "tokenizer_config.json").get("add_bos_token"))),
    ]  # fmt: skip
    for key, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if number is not None:
            pairs.append(pair(f"tokenizer.ggml.{key}_token_id", int(number)))
    template = template_from_hf(directory, "", "")
    return pairs if template is None else [*pairs, pair("tokenizer.chat_template", template.source)]


def _splitter(data: dict[str, Any], directory: Path) -> str:
    """GGUF's name for how text is cut before merging, from the pre-tokenizer's own description."""
    if data.get("normalizer") not in (None, {"type": "NFC"}):
        raise ModelFormatError(f"{directory}: a tokenizer with this normalizer is not written to GGUF.", _HINT)
    stage = data.get("pre_tokenizer") or {}
    stages = stage.get("pretokenizers", [stage])
    kinds = [item.get("type") for item in stages]
    if kinds == ["ByteLevel"] and stages[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(stages[0].get("pattern", {}).get("Regex", ""))
        if r"\p{N}{1,3}" in pattern:
            return "llama-bpe"
        if r"\p{N}" in pattern:
            return "qwen2"
    raise ModelFormatError(f"{directory}: the pre-tokenizer {kinds} has no name in GGUF that we read.", _HINT)
