"""Shards, windows, options and frames of ranks, in one process."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, TierError
from megalith.engine.api import EngineConfig
from megalith.engine.batch import StepBatch
from megalith.engine.frames import WireError
from megalith.engine.parallel.collectives import Ranks
from megalith.engine.parallel.option import check_parallel, degrees
from megalith.engine.parallel.shard import ShardCheckpoint
from megalith.engine.parallel.share import Layers
from megalith.engine.parallel.wire import decode_step, encode_step
from megalith.model.open import OpenModel
from megalith.model.transformer import Part, Transformer, causal_attention, plain_linear
from megalith.specs import catalog

IDS = torch.tensor([5, 9, 200, 31, 7, 7, 120])


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_put_together_are_the_model(ranks: int, tiny_model: OpenModel) -> None:
    whole = tiny_model.checkpoint
    shards = [ShardCheckpoint(whole, rank, ranks) for rank in range(ranks)]
    for name in whole.names():
        parts = [shard.tensor(name).float32() for shard in shards]
        assert all(part.shape == shard.shape(name) for part, shard in zip(parts, shards, strict=True))
        expected = whole.tensor(name).float32()
        if name.endswith((".o.weight", ".down.weight")):
            found = np.concatenate(parts, axis=1)
        elif name.split(".")[-2] in ("k", "v") and ranks == 4:  # two KV heads: each on two ranks
            found = np.concatenate(parts[::2])
            assert (parts[0] == parts[1]).all()
        elif name.split(".")[-2] in ("q", "k", "v", "gate", "up"):
            found = np.concatenate(parts)
        else:
            found = parts[0]
        assert (found == expected).all(), name


def outputs(model: Transformer) -> torch.Tensor:
    with torch.inference_mode():
        attend = causal_attention(model.spec, [0, len(IDS)])
        return model.head(model(IDS, torch.arange(len(IDS)), attend))


@pytest.mark.parametrize("blocks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_gives_the_same_bits_and_leaves_no_file(
    blocks: int, dtype: torch.dtype, tiny_model: OpenModel, tmp_path: Path
) -> None:
    layers = Layers(Ranks(0, 1, "star", {}), blocks, str(tmp_path), None)
    try:
        streamed = Transformer(tiny_model.checkpoint, dtype=dtype, make_linear=layers)
        layers.seal()
        assert not list(tmp_path.iterdir())
        window = layers.window
        assert window is not None
        plain = outputs(Transformer(tiny_model.checkpoint, dtype=dtype, make_linear=plain_linear))
        for _ in range(3):
            assert torch.equal(outputs(streamed), plain)
            assert sum(buffer.num_bytes for buffer in window._held.values()) <= window.num_bytes
        if blocks == 2:
            assert window.num_bytes == window.file_bytes // 2
            assert 3 * window.file_bytes <= window.read_bytes <= 4 * window.file_bytes
        if blocks == 4:
            window._mover.close()  # nothing is asked of the disk any more
            assert torch.equal(outputs(streamed), plain)
    finally:
        layers.close()
    with pytest.raises(TierError, match="closed"):
        window.weight(0, 0, (1, 1), dtype)


def test_a_corrupted_block_is_named(tiny_model: OpenModel, tmp_path: Path) -> None:
    layers = Layers(Ranks(0, 1, "star", {}), 2, str(tmp_path), None)
    try:
        model = Transformer(tiny_model.checkpoint, make_linear=layers)
        window = layers.window
        assert window is not None
        window._write()
        block = window._blocks[3]
        window._file.write_from(block.offset + 100, memoryview(b"\x07"))
        layers.seal()
        with pytest.raises(TierError, match="Block layer 1 ffn of the window is corrupted"):
            outputs(model)
    finally:
        layers.close()


def test_a_slow_disk_can_be_imposed(tiny_model: OpenModel, tmp_path: Path) -> None:
    import time

    layers = Layers(Ranks(0, 1, "star", {}), 2, str(tmp_path), 1_000_000)
    try:
        model = Transformer(tiny_model.checkpoint, make_linear=layers)
        layers.seal()
        assert layers.window is not None
        begin = time.monotonic()
        outputs(model)
        assert time.monotonic() - begin > 0.95 * layers.window.file_bytes / 1_000_000
    finally:
        layers.close()


def test_a_part_of_a_model_reads_only_its_own(tiny_model: OpenModel) -> None:
    shard = ShardCheckpoint(tiny_model.checkpoint, 1, 2)
    Transformer(shard, part=Part(layers=range(1, 2), embedding=False, head=False))
    assert shard.tensors_read
    assert all(name.startswith("layers.1.") for name in shard.tensors_read)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_steps_survive_the_way_without_their_tokens(rows: int, sequences: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(rows, np.ones(sequences) / sequences)
    ids = rng.integers(1 << 24, 1 << 30, rows).astype(np.int32)
    batch = StepBatch(
        ids, rng.integers(0, 99, rows).astype(np.int32), np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        rng.integers(0, 50, (sequences, width)).astype(np.int32), np.zeros(0, np.int32),
    )  # fmt: skip
    hidden = rng.normal(size=(rows, 8)).astype(np.float32)
    head, values = encode_step(batch, hidden)
    payload = head + values.tobytes()
    assert not any(token.tobytes() in head for token in ids)
    found = decode_step(memoryview(payload), 8)
    assert (found.hidden_MD == hidden).all()
    assert (found.batch.positions_M == batch.positions_M).all()
    assert (found.batch.row_starts_S1 == batch.row_starts_S1).all()
    assert (found.batch.block_tables_SW == batch.block_tables_SW).all()
    assert found.batch.tokens_M.size == 0
    for cut in (b"", payload[:-1], payload + b"\0"):
        with pytest.raises(WireError):
            decode_step(memoryview(cut), 8)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tensor_parallel": 3}, "4 heads and 2 KV heads.*over 3 ranks.*of: 2, 4"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0"),
        ({"tensor_parallel": 2, "mode": "native"}, "torch runner's"),
        ({"tensor_parallel": 2, "device": "cuda"}, "--device cpu"),
        ({"tensor_parallel": 2, "attention": "workers:2"}, "--attention here"),
        ({"tensor_parallel": 2, "preempt": "swap"}, "--preempt recompute"),
        ({"tensor_parallel": 2, "window": "4"}, "--window-blocks"),
        ({"tensor_parallel": 2, "memory_bytes": 1 << 30}, "--memory limits one process"),
        ({"window_blocks": 1}, "--window-blocks 2"),
        ({"link": "2ms"}, "no link"),
        ({"tensor_parallel": 2, "link": "fast"}, "fast"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(settings: dict[str, object], says: str, tiny_model: OpenModel) -> None:
    config = msgspec.convert({"model": "tiny", **settings}, EngineConfig)
    with pytest.raises(ConfigError, match=says):
        check_parallel(config, tiny_model.spec)


def test_degrees_follow_from_heads_and_kv_heads() -> None:
    assert degrees(catalog.model("llama-2-70b")) == [1, 2, 4, 8, 16]
    assert degrees(catalog.model("smollm2-135m")) == [1, 3, 9]
