"""KV in block floating point: orders leave logits alone, caches take the formula's bytes, refusals say why."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from megalith.base.errors import ConfigError
from megalith.cost.memory import kv_bytes_per_token
from megalith.engine.api import EngineConfig
from megalith.engine.batch import StepBatch
from megalith.engine.k_order import best_order, channel_orders, larger_first, logit_error
from megalith.engine.kv_option import check_kv
from megalith.engine.launch import build_engine
from megalith.engine.torch_residence import Residence
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import OpenModel
from megalith.model.transformer import Transformer
from megalith.specs.kv_format import BlockFloat, parse_kv_format
from tests.engine.tiny import HEAD_DIM, KV_HEADS, LAYERS, VOCAB

BLOCK, BLOCKS = 4, 32
TOKENS = np.random.default_rng(3).integers(3, VOCAB, 60).tolist()


def runner_of(model: OpenModel, text: str = "", orders: np.ndarray | None = None) -> TorchRunner:
    return TorchRunner(
        model.spec, model.checkpoint, block_tokens=BLOCK, num_blocks=BLOCKS, num_host_blocks=2, threads=1,
        kv_form=parse_kv_format(text), residence=Residence(channel_orders=orders),
    )  # fmt: skip


def logits_of(runner: TorchRunner) -> np.ndarray:
    """Of all tokens, in a prompt of 40 and then one by one."""
    found = [runner.logits(StepBatch.of_one(TOKENS[:40], 0, np.arange(40), BLOCK))]
    found += [runner.logits(StepBatch.of_one([TOKENS[i]], i, [0], BLOCK)) for i in range(40, 60)]
    return np.concatenate(found)


def shuffled() -> np.ndarray:
    rng = np.random.default_rng(8)
    orders = [[rng.permutation(HEAD_DIM) for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    return np.array(orders, np.int64)


def test_any_order_leaves_the_logits_as_they_are(tiny_model: OpenModel) -> None:
    plain, ordered = logits_of(runner_of(tiny_model)), logits_of(runner_of(tiny_model, orders=shuffled()))
    assert np.abs(plain).max() > 5
    np.testing.assert_allclose(ordered, plain, atol=2e-4)


def test_k_and_q_are_laid_out_in_the_order(tiny_model: OpenModel) -> None:
    """Bit for bit the same numbers in other places: queries take the order of their KV head."""
    orders, seen = shuffled(), []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            seen.append((q, k, v))
        return torch.zeros_like(q)

    with torch.inference_mode():
        for given in (None, orders):
            Transformer(tiny_model.checkpoint, channel_orders=given)(torch.tensor(TOKENS), torch.arange(60), attend)
    (q, k, v), (q_in_order, k_in_order, v_same) = seen
    each = q.shape[1] // KV_HEADS
    for head in range(q.shape[1]):
        order = torch.from_numpy(orders[0, head // each])
        torch.testing.assert_close(q_in_order[:, head], q[:, head][:, order], atol=1e-5, rtol=1e-5)
    for head in range(KV_HEADS):
        torch.testing.assert_close(k_in_order[:, head], k[:, head][:, torch.from_numpy(orders[0, head])],
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
    assert torch.equal(v, v_same)


@pytest.mark.parametrize("text", ["bfp8:block=16", "bfp4:block=16", "bfp3:block=8,values=8", "bfp2:block=8"])
def test_the_cache_takes_the_bytes_of_the_formula(tiny_model: OpenModel, text: str) -> None:
    runner = runner_of(tiny_model, text)
    token = kv_bytes_per_token(tiny_model.spec, text)
    assert runner.block_bytes == BLOCK * token
    assert runner.memory_bytes()["kv"] == (BLOCKS + 1 + 2) * BLOCK * token  # One more that pads, two of the host.
    assert runner_of(tiny_model).memory_bytes()["kv"] == (BLOCKS + 1 + 2) * BLOCK * 4 * 2 * LAYERS * KV_HEADS * HEAD_DIM


def test_more_bits_are_nearer_to_float(tiny_model: OpenModel) -> None:
    plain = logits_of(runner_of(tiny_model))
    errors = [float(np.square(logits_of(runner_of(tiny_model, f"bfp{bits}:block=16")) - plain).mean())
              for bits in (8, 6, 4, 2)]  # fmt: skip
    assert errors == sorted(errors)
    assert 0 < errors[0] < errors[-1] / 50


def test_swapped_blocks_come_back(tiny_model: OpenModel) -> None:
    runner = runner_of(tiny_model, "bfp4:block=16")
    batch = StepBatch.of_one(TOKENS[:8], 0, [7], BLOCK)
    runner.logits(batch)
    before = runner._kv.device_blocks[:, :, :2].clone()
    runner.swap_out(np.array([0, 1], np.int32), np.array([1, 0], np.int32))
    with torch.inference_mode():
        runner._kv.device_blocks.zero_()
    runner.swap_in(np.array([1, 0], np.int32), np.array([0, 1], np.int32))
    assert before.any()
    assert torch.equal(runner._kv.device_blocks[:, :, :2], before)


def test_the_order_of_a_head_is_never_worse_where_it_was_chosen() -> None:
    rng, form = np.random.default_rng(2), BlockFloat(3, 16)
    size = np.where(np.arange(64) % 8 == 0, 30.0, 1.0)  # Outliers in every block; after a sort, in one.
    k, q = (
        (rng.standard_normal((200, *shape)) * scale).astype(np.float32)
        for shape, scale in (((64,), size), ((2, 64), 1 / size))
    )
    found = best_order(q, k, np.square(size).astype(np.float32), form)
    assert sorted(found) == list(range(64))
    natural = logit_error(q, k, form)
    assert logit_error(q[..., found], k[:, found], form) < natural / 2
    assert larger_first(np.array([1, 5, 9, 2, 6, 3], np.float32)).tolist() == [2, 4, 3, 1, 5, 0]


def test_calibrated_orders_are_orders(tiny_model: OpenModel) -> None:
    orders = channel_orders(tiny_model.checkpoint, TOKENS, BlockFloat(3, 8))
    assert orders.shape == (LAYERS, KV_HEADS, HEAD_DIM)
    assert (np.sort(orders, -1) == np.arange(HEAD_DIM)).all()


def test_a_built_engine_has_the_format(tiny: Path) -> None:
    config = EngineConfig(
        model=str(tiny), max_context=64, max_sequences=1, num_blocks=8, threads=1, kv_format="bfp4:block=8,reorder"
    )
    built = build_engine(config)
    try:
        assert built.runner.name == "torch-cpu-bf16-bfp4"
        assert "torch runner's" in built.why
        assert built.fit.plan.kv_bytes_per_token == kv_bytes_per_token(built.model.spec, "bfp4:block=8")
    finally:
        built.runner.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "native"}, "bfloat16 only"),
        ({"device": "cuda"}, "on the CPU so far"),
        ({"attention": "workers:2"}, "in this process alone"),
        ({"tensor_parallel": 2}, "in this process alone"),
        ({"window": "1"}, "all weights in memory"),
        ({"kv_format": "bfp4:block=32"}, "do not divide the heads"),
        ({"kv_format": "bfp11"}, "11 bits"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tiny_model: OpenModel, changes: dict[str, object], words: str) -> None:
    config = EngineConfig(model="tiny", kv_format="bfp4:block=16,reorder")
    with pytest.raises(ConfigError, match=words):
        check_kv(msgspec.structs.replace(config, **changes), tiny_model.spec)


def test_shared_norms_of_heads_refuse_an_order(tiny_model: OpenModel) -> None:
    spec = msgspec.structs.replace(tiny_model.spec, qk_norm=True)
    with pytest.raises(ConfigError, match="norms q and k"):
        check_kv(EngineConfig(model="tiny", kv_format="bfp4:block=16,reorder"), spec)
    assert check_kv(EngineConfig(model="tiny", kv_format="bfp4:block=16"), spec) is not None
