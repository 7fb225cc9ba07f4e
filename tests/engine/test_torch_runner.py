"""The torch runner on a tiny real model: equal to transformers, and to itself however the work is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megalith.base.errors import EngineError, MachineError, StepFailed
from megalith.engine.batch import StepBatch
from megalith.engine.params import SamplingParams
from megalith.engine.torch_graphs import StaticDecodes
from megalith.engine.torch_runner import TorchRunner, _greedy
from megalith.model.open import OpenModel
from tests.engine.batches import Row, sampling_batch
from tests.engine.running import Way, make_engine, run_prompts
from tests.engine.tiny import VOCAB

BLOCKS, BLOCK = 96, 4
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def runner(tiny_model: OpenModel) -> Iterator[TorchRunner]:
    runner = TorchRunner(
        tiny_model.spec, tiny_model.checkpoint, block_tokens=BLOCK, num_blocks=BLOCKS, num_host_blocks=64, threads=1
    )
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCAB, n).tolist() for n in (1, 3, 9, 17, 30, 5, 12, 21)]


def one_by_one(runner: TorchRunner, model: OpenModel, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    way = Way()
    return [run_prompts(make_engine(runner, way), model.tokenizer, [p], GREEDY, way)[0].token_ids for p in prompts]


@pytest.fixture(scope="module")
def alone(runner: TorchRunner, tiny_model: OpenModel, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    tokens = one_by_one(runner, tiny_model, prompts)
    assert len({piece[-4:] for piece in tokens}) > 4, "the model repeats itself too much to test anything"
    return tokens


def whole(prompt: list[int]) -> StepBatch:
    rows = np.arange(len(prompt), dtype=np.int32)
    table = np.arange(1 + len(prompt) // BLOCK, dtype=np.int32)[None]
    return StepBatch(np.array(prompt, np.int32), rows, np.array([0, len(prompt)], np.int32), table, rows)


def test_logits_equal_transformers_in_float32(
    runner: TorchRunner, tiny: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for prompt in prompts:
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[0].numpy()
        got = runner.logits(whole(prompt))
        np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())
        assert got.argmax(1).tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize(
    "way",
    [
        Way(),
        Way(budget=5),
        Way(budget=64, arrivals=(0, 2, 1, 5, 0, 3, 1, 2)),
        Way(policy="prefill-first", arrivals=(0, 2, 1, 5, 0, 3, 1, 2)),
        Way(policy="first-come", sequences=3),
        Way(prefix=True, budget=16),
        Way(blocks=24, budget=16),
        Way(blocks=24, budget=16, preempt="swap"),
    ],
    ids=["batch", "chunked", "arrivals", "prefill-first", "first-come", "prefix", "recompute", "swap"],
)
def test_greedy_tokens_are_the_same_alone_and_in_any_company(
    runner: TorchRunner, tiny_model: OpenModel, prompts: list[list[int]], alone: list[tuple[int, ...]], way: Way
) -> None:
    if way.prefix:
        prompts = [prompts[4] + p for p in prompts]
        alone = one_by_one(runner, tiny_model, prompts)
    engine = make_engine(runner, way)
    together = run_prompts(engine, tiny_model.tokenizer, prompts, GREEDY, way)
    assert [delta.token_ids for delta in together] == alone
    counters = engine.scheduler.counters
    if way.blocks is not None:
        assert (counters.preempted_swap if way.preempt == "swap" else counters.preempted_recompute) > 0
    if way.prefix:
        assert counters.prefix_hit_tokens >= 28 * 6


def test_seeded_samples_do_not_depend_on_the_batch(
    runner: TorchRunner, tiny_model: OpenModel, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=77, max_tokens=20, ignore_eos=True)
    way = Way(budget=16)
    together = run_prompts(make_engine(runner, way), tiny_model.tokenizer, prompts, params, way)
    for prompt, delta in zip(prompts, together, strict=True):
        alone = run_prompts(make_engine(runner, way), tiny_model.tokenizer, [prompt], params, way)[0]
        assert alone.token_ids == delta.token_ids


def test_static_decodes_equal_the_ragged_path(tiny_model: OpenModel, prompts: list[list[int]]) -> None:
    """The code that CUDA graphs replay, run eagerly here: padded to buckets, over two kinds of windows."""
    spec = tiny_model.spec
    make = lambda: TorchRunner(spec, tiny_model.checkpoint, block_tokens=BLOCK, num_blocks=BLOCKS)  # noqa: E731
    ragged, static = make(), make()
    for runner in (ragged, static):
        runner._windows = [None, 6]
    decodes = StaticDecodes(static._model, static._kv, static._windows, capture=False)
    rng = np.random.default_rng(0)
    for count in (1, 3, 8):
        chosen = prompts[:count]
        tables = rng.permutation(BLOCKS)[: count * 12].reshape(count, 12).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum([len(p) for p in chosen])]).astype(np.int32)
        positions = np.concatenate([np.arange(len(p)) for p in chosen]).astype(np.int32)
        prefill = StepBatch(np.concatenate(chosen).astype(np.int32), positions, starts, tables, starts[1:] - 1)
        np.testing.assert_array_equal(ragged.logits(prefill), static.logits(prefill))
        assert decodes.takes(prefill) == all(len(p) == 1 for p in chosen)
        for step in range(5):
            tokens = rng.integers(3, VOCAB, count).astype(np.int32)
            at = np.array([len(p) + step for p in chosen], np.int32)
            rows = np.arange(count, dtype=np.int32)
            batch = StepBatch(tokens, at, np.arange(count + 1, dtype=np.int32), tables, rows)
            assert decodes.takes(batch)
            with torch.inference_mode():
                got = decodes.run(batch).numpy()
            np.testing.assert_allclose(got, ragged.logits(batch), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("widen", [False, True])
def test_bf16_is_close_to_float32(
    tiny_model: OpenModel, prompts: list[list[int]], runner: TorchRunner, widen: bool
) -> None:
    spec, checkpoint = tiny_model.spec, tiny_model.checkpoint
    bf16 = TorchRunner(spec, checkpoint, dtype="bf16", block_tokens=BLOCK, num_blocks=BLOCKS, widen=widen)
    got, exact = bf16.logits(whole(prompts[4])), runner.logits(whole(prompts[4]))
    assert np.abs(got - exact).max() < 0.1 * np.abs(exact).max()
    assert (got.argmax(1) == exact.argmax(1)).mean() > 0.8
    assert bf16.memory_bytes()["kv"] == (BLOCKS + 1) * bf16.block_bytes
    assert bf16.block_bytes * 2 == runner.block_bytes
    exact_weights = runner.memory_bytes()["weights"]
    assert bf16.memory_bytes()["weights"] == pytest.approx(exact_weights / (1 if widen else 2), rel=0.01)


def test_the_device_arg_max_takes_the_lowest_id_on_a_tie_and_refuses_nan() -> None:
    logits = torch.zeros((3, 1000))
    logits[1, 400:] = 2.0
    logits[2, 999] = 1.0
    assert _greedy(logits).tolist() == [0, 400, 999]
    logits[0, 7] = torch.nan
    with pytest.raises(StepFailed):
        _greedy(logits)


def test_a_step_may_have_no_output(runner: TorchRunner, prompts: list[list[int]]) -> None:
    batch = whole(prompts[3])
    batch.output_rows_N = batch.output_rows_N[:0]
    assert runner.step(batch, sampling_batch([], VOCAB)).tokens_N.size == 0
    assert runner.logits(batch).shape == (0, VOCAB)
    assert runner.step(whole([5]), sampling_batch([Row()], VOCAB)).tokens_N.shape == (1,)


def test_close_gives_everything_back_and_says_so(tiny_model: OpenModel) -> None:
    runner = TorchRunner(tiny_model.spec, tiny_model.checkpoint, num_blocks=4)
    runner.close()
    runner.close()
    assert sum(runner.memory_bytes().values()) == 0
    with pytest.raises(EngineError, match="closed"):
        runner.logits(whole([5]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_refused(tiny_model: OpenModel) -> None:
    with pytest.raises(MachineError, match="no device cuda"):
        TorchRunner(tiny_model.spec, tiny_model.checkpoint, device="cuda", num_blocks=4)
