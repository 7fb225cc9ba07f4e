"""Damage anywhere in a model file: whatever is broken, opening it ends in one of our errors or in a usable model."""

from __future__ import annotations

import contextlib
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megalith.base.errors import ModelError
from megalith.model.checkpoint import gguf_checkpoint
from megalith.model.gguf import GgufFile
from megalith.model.tokenizer_gguf import tokenizer_from_gguf

_SHAPES = {
    "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8),
    "blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16), "blk.0.attn_norm": (8,),
    "blk.0.ffn_norm": (8,), "output_norm": (8,),
}  # fmt: skip


def _model(path: Path, kind: str) -> Path:
    """A whole one-layer Llama with a tokenizer of `kind`, a few hundred header bytes that all matter."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    texts = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁" if kind == "llama" else "Ġ", "\u0102"]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 4])
    if kind == "llama":
        writer.add_token_scores([0.0, 0.0, 0.0, -2.0, -3.0, -1.0, -4.0, 0.0])
    else:
        writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.normal(size=(len(texts), 8)).astype(np.float32))
    for name, shape in _SHAPES.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("damage") / "sound.gguf", request.param)


def _open_and_use(path: Path) -> None:
    file = GgufFile(path)
    checkpoint = gguf_checkpoint(file)
    for name in checkpoint.names():
        checkpoint.tensor(name).float32()
    tokenizer = tokenizer_from_gguf(file)
    ids = tokenizer.encode("ab a\u00e9<s>", parse_special=True) + tokenizer.encode("ab", parse_special=False)
    tokenizer.decode([*ids, 0, 7])


def test_the_sound_file_opens(sound: Path) -> None:
    _open_and_use(sound)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=3))
@example(flips=[(24, 1)])
def test_damage_ends_in_one_of_our_errors_or_in_a_model(sound: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(sound.read_bytes())
    header = min(tensor.offset for tensor in GgufFile(sound).tensors.values())
    for at, mask in flips:
        data[at % header] ^= mask
    damaged = sound.with_name("damaged.gguf")
    damaged.write_bytes(data)
    with contextlib.suppress(ModelError):
        _open_and_use(damaged)
