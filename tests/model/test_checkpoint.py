"""Weights under canonical names: the same from safetensors and from GGUF, checked against the description."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.base.errors import ModelFormatError
from megalith.model.checkpoint import Checkpoint, gguf_checkpoint, open_checkpoint
from megalith.model.gguf import GgufFile
from megalith.model.rope import inverse_frequencies
from megalith.model.safetensors import SafetensorsModel
from megalith.model.source import resolve
from megalith.model.transformer import Transformer, causal_attention
from megalith.specs.model import Rope
from tests.model import gguf_files, tiny
from tests.model.packaged import NAMES, opened, package_reader

_IDS = [5, 300, 17, 42, 5, 9, 255, 130, 77, 1, 2, 3]


def _hf(case: str, folder: Path) -> tuple[Any, Checkpoint]:
    model = tiny.make(case)
    return model, open_checkpoint(resolve(str(tiny.save(model, folder))))


@pytest.mark.parametrize("case", ["llama", "llama-wide-heads", "qwen2", "qwen3", "gemma3", "mixtral"])
def test_gguf_and_safetensors_give_the_same_weights(case: str, tmp_path: Path) -> None:
    model, ours = _hf(case, tmp_path / "hf")
    other = gguf_checkpoint(GgufFile(gguf_files.write(model, tmp_path / "m.gguf")))
    assert other.names() == ours.names()
    for name in ours.names():
        mine, theirs = ours.tensor(name), other.tensor(name)
        assert mine.shape == theirs.shape
        assert np.array_equal(mine.float32(), theirs.float32()), name
    kept = {"num_layers", "hidden", "head_dim", "num_heads", "num_kv_heads", "ffn", "vocab", "tied_embeddings"}
    kept |= {"qk_norm", "post_norms", "attention_bias", "rope", "rope_local", "activation", "norm_eps"}
    for field in kept:
        assert getattr(ours.spec, field) == getattr(other.spec, field), field


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
def test_quantised_rows_are_put_back_in_order_without_decoding(kind: str, tmp_path: Path) -> None:
    """Undoing the rotary order on the raw rows equals undoing it on the decoded ones."""
    model = tiny.make("llama", hidden_size=128, intermediate_size=128, num_attention_heads=4, head_dim=32)
    file = GgufFile(gguf_files.write(model, tmp_path / "m.gguf", kind))
    checkpoint = gguf_checkpoint(file)
    for part, heads in (("q", 4), ("k", 2)):
        tensor = checkpoint.tensor(f"layers.1.{part}.weight")
        assert tensor.format == kind
        assert tensor.raw.shape[0] == tensor.shape[0]
        weight = model.state_dict()[f"model.layers.1.self_attn.{part}_proj.weight"].numpy()
        chosen = gguf.GGMLQuantizationType[kind]
        expected = gguf.dequantize(gguf.quants.quantize(weight, chosen), chosen)
        assert np.array_equal(tensor.float32(), expected)
        stored = gguf.dequantize(file.raw(f"blk.1.attn_{part}.weight").reshape(32 * heads, -1), chosen)
        assert not np.array_equal(stored, expected), "the file's own order should differ"


def test_a_gguf_model_with_llama3_frequencies_runs_like_the_original(tmp_path: Path) -> None:
    scaling = tiny.CASES["llama3-rope"][1]["rope_parameters"] | {"original_max_position_embeddings": 8192}
    model = tiny.make("llama", rope_parameters=scaling, max_position_embeddings=16384, rms_norm_eps=1e-5)
    rope = Rope(theta=1e4, scaling="llama3", factor=8.0)
    factors = inverse_frequencies(Rope(theta=1e4), 16) / inverse_frequencies(rope, 16)
    checkpoint = gguf_checkpoint(GgufFile(gguf_files.write(model, tmp_path / "m.gguf", factors=factors)))
    assert checkpoint.spec.rope == rope
    # Far positions, where the scaling shows.
    at = torch.arange(len(_IDS)) * 900
    ours = Transformer(checkpoint)
    with torch.inference_mode():
        found = ours.head(ours(torch.tensor(_IDS), at, causal_attention(ours.spec, [0, len(_IDS)])))
        # Without a mask of its own transformers would take the gaps for the seams of packed sequences.
        mask = torch.ones(1, len(_IDS), dtype=torch.long)
        inputs = {"input_ids": torch.tensor([_IDS]), "position_ids": at[None], "attention_mask": mask}
        expected = model(**inputs, use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_packaged_models(name: str) -> None:
    checkpoint = opened(name).checkpoint
    reader = package_reader(name)
    assert len(checkpoint.names()) == len(reader.tensors) == {"smollm2": 272, "gemma3-270m": 236}[name]
    assert checkpoint.weight_bytes() == sum(int(t.n_bytes) for t in reader.tensors)
    formats = {"smollm2": {"Q4_1", "Q8_0", "F32"}, "gemma3-270m": {"Q8_0", "Q5_0", "Q4_K", "Q6_K", "F32"}}[name]
    assert set(checkpoint.formats()) == formats
    assert list(checkpoint.formats().values()) == sorted(checkpoint.formats().values(), reverse=True)
    assert checkpoint.names()[0] == "embed.weight"
    assert "head.weight" not in checkpoint
    for tensor_name in checkpoint.names():
        tensor = checkpoint.tensor(tensor_name)
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        assert tensor.raw.shape[0] == rows
    norm = checkpoint.tensor("layers.0.attn_norm.weight")
    assert norm.float32().dtype == np.float32


def test_opening_reads_no_weights() -> None:
    """Opening touches the header only: its time does not grow with the file."""
    files = opened("gemma3-270m").files
    start = time.process_time()
    open_checkpoint(files)
    assert time.process_time() - start < 2


def test_gemma_norms_are_multipliers_in_both_files(tmp_path: Path) -> None:
    model, checkpoint = _hf("gemma3", tmp_path / "hf")
    stored = model.state_dict()["model.layers.2.self_attn.q_norm.weight"].numpy()
    assert np.array_equal(checkpoint.tensor("layers.2.q_norm.weight").float32(), stored + np.float32(1))
    assert checkpoint.tensor("final_norm.weight").format == "F32"


def _rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 113}, r"gate_proj.weight has shape \(112, 64\), but \(113, 64\)"),
        ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3"),
        ({"num_hidden_layers": 2}, "layer tensors that we would ignore, such as model.layers.2"),
        ({"model_type": "qwen2"}, "lacks the tensor model.layers.0.self_attn.q_proj.bias"),
        ({"model_type": "opt", "ffn_dim": 112, "word_embed_proj_dim": 64}, "can be planned but not run.*llama, qwen2"),
    ],
)
def test_weights_that_contradict_the_description(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.make("llama"), tmp_path / "m")
    _rewrite(folder, **changes)
    with pytest.raises(ModelFormatError, match=message):
        open_checkpoint(resolve(str(folder)))


def test_biases_without_a_place_are_not_ignored(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make("qwen2"), tmp_path / "m")
    _rewrite(folder, model_type="llama")
    with pytest.raises(ModelFormatError, match="9 layer tensors that we would ignore"):
        open_checkpoint(resolve(str(folder)))


def test_an_unknown_canonical_name(tmp_path: Path) -> None:
    _, checkpoint = _hf("llama-tied", tmp_path / "m")
    with pytest.raises(ModelFormatError, match=r"no tensor 'head\.weight'"):
        checkpoint.tensor("head.weight")


def test_a_missing_shard_and_an_index_that_reaches_out(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make("llama"), tmp_path / "m", max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = sorted(folder.glob("*.safetensors"))[1]
    bad = dict.fromkeys(good["weight_map"], "../outside.safetensors")
    index.write_text(json.dumps(good | {"weight_map": bad}))
    with pytest.raises(ModelFormatError, match="not a plain file name"):
        SafetensorsModel(folder)
    index.write_text(json.dumps(good))
    shard.unlink()
    with pytest.raises(ModelFormatError, match=f"lacks the shard {shard.name}"):
        SafetensorsModel(folder)


def test_only_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelFormatError, match="only pickled"):
        SafetensorsModel(tmp_path)


def _safetensors(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


_HOSTILE = {
    "short": (b"12345", "5 bytes"),
    "huge header": (_safetensors({}, b"\0" * 8, size=2**62), "4611686018427387904 bytes"),
    "no JSON": (_safetensors(b"{nope"), "not JSON"),
    "deep JSON": (_safetensors(b"[" * 100_000), "not JSON"),
    "a list": (_safetensors([]), "not a JSON object"),
    "entry": (_safetensors({"w": 3}), "no sound dtype"),
    "negative": (_safetensors({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "no sound dtype"),
    "true": (_safetensors({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}), "no sound dtype"),
    "past the end": (_safetensors({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), "0 to 36 of 0"),
    "backwards": (_safetensors({"w": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}, b"1234"), "4 to 0 of 4"),
    "size": (_safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "takes 8 bytes"),
    "2**126": (
        _safetensors({"w": {"dtype": "BF16", "shape": [2**63, 2**63], "data_offsets": [0, 4]}}, b"1234"),
        "not 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_safetensors_are_refused_with_numbers(name: str, tmp_path: Path) -> None:
    data, message = _HOSTILE[name]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelFormatError, match=message):
        SafetensorsModel(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=6), cut=st.integers(0, 99)
)
def test_flipped_and_cut_safetensors_end_in_an_error_or_sound_views(
    tmp_path: Path, flips: list[tuple[int, int]], cut: int
) -> None:
    header = {f"w{i}": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * i, 16 * i + 16]} for i in range(5)}
    data = bytearray(_safetensors(header, bytes(80)))
    for at, mask in flips:
        data[at % len(data)] ^= mask
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) - max(0, cut - 5)])
    try:
        model = SafetensorsModel(tmp_path)
    except ModelFormatError:
        return
    for name, tensor in model.tensors.items():
        assert model.raw(name).size == tensor.num_bytes
