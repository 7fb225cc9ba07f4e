"""The native runner: the forward pass against NumPy, bitwise independence of batch mates, and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from megalith.base.errors import MachineError, StepFailed
from megalith.engine.batch import StepBatch
from megalith.engine.native import binding, build
from megalith.engine.native_runner import NativeRunner, packed_weight_bytes, supports
from megalith.specs.model import ModelSpec
from tests.engine.native_models import SPECS, RandomCheckpoint, batch_of, forward, llama, sampling_of

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


def runner_of(spec: ModelSpec, kind: str = "Q8_0", **changes: int) -> NativeRunner:
    sizes = {"block_tokens": 16, "num_blocks": 40, "num_host_blocks": 4, "max_rows": 160, "threads": 1} | changes
    return NativeRunner(spec, RandomCheckpoint(spec, kind), **sizes)  # type: ignore[arg-type]


def tokens_of(spec: ModelSpec, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, spec.vocab, count).astype(np.int32)


def table_of(first: int, blocks: int, step: int = 1) -> np.ndarray:
    return np.arange(first, first + blocks * step, step, dtype=np.int32)


@pytest.fixture(params=["best", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "best":
        monkeypatch.setenv("MEGALITH_NATIVE_ISA", request.param)
    return request.param


@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_the_numpy_forward_pass(name: str, isa: str) -> None:
    """The reference also rounds activations and K and V, so what is left is float32 noise and a few other roundings."""
    spec = SPECS[name]
    runner = runner_of(spec)
    tokens = tokens_of(spec, 90)
    got = runner.logits(batch_of([(tokens, 0)], [table_of(3, 6, 5)], [list(range(90))]))
    expected = forward(spec, RandomCheckpoint(spec), tokens)
    scale = np.abs(expected).max()
    assert np.median(np.abs(got - expected)) < 1e-3 * scale
    assert np.abs(got - expected).max() < 0.03 * scale
    exact = forward(spec, RandomCheckpoint(spec), tokens, exact=True)
    assert np.abs(got - exact).max() < 0.1 * scale
    runner.close()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32"])
def test_every_format_gives_the_same_model(kind: str) -> None:
    spec = SPECS["llama"]
    runner = runner_of(spec, kind)
    tokens = tokens_of(spec, 40)
    got = runner.logits(batch_of([(tokens, 0)], [table_of(0, 3)], [list(range(40))]))
    expected = forward(spec, RandomCheckpoint(spec, kind), tokens)
    assert np.median(np.abs(got - expected)) < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_give_the_same_model(kind: str) -> None:
    spec = llama(hidden=256, ffn=512, num_heads=8, num_kv_heads=4, head_dim=32)
    runner = runner_of(spec, kind)
    tokens = tokens_of(spec, 40)
    got = runner.logits(batch_of([(tokens, 0)], [table_of(0, 3)], [list(range(40))]))
    expected = forward(spec, RandomCheckpoint(spec, kind), tokens)
    assert np.median(np.abs(got - expected)) < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_tokens", [16, 32])
def test_a_request_has_the_same_bits_alone_chunked_and_in_any_batch(name: str, threads: int, block_tokens: int) -> None:
    spec = SPECS[name]
    alone = runner_of(spec)
    tokens = tokens_of(spec, 75)
    expected = alone.logits(batch_of([(tokens, 0)], [table_of(0, 5)], [list(range(75))]))
    runner = runner_of(spec, threads=threads, block_tokens=block_tokens)
    table = table_of(30, 5, -2) if block_tokens == 16 else table_of(20, 3, -3)
    got, done = [], 0
    for step, count in enumerate((20, 1, 33, 1, 13, 7)):
        mates = [(tokens_of(spec, 3 * i + 1, seed=i), 0) for i in range(step)]
        tables = [table_of(31 + i, 1) for i in range(step)]
        parts = [*mates[: step // 2], (tokens[done : done + count], done), *mates[step // 2 :]]
        tables.insert(step // 2, table)
        outputs = [[] if i != step // 2 else list(range(count)) for i in range(step + 1)]
        got.append(runner.logits(batch_of(parts, tables, outputs)))
        done += count
    np.testing.assert_array_equal(np.concatenate(got), expected)


def test_steps_sample_what_the_logits_say() -> None:
    spec = SPECS["llama"]
    runner = runner_of(spec)
    parts = [(tokens_of(spec, 5 + i, seed=i), 0) for i in range(40)]  # more outputs than one run of the head takes
    parts = [(t[:3], 0) for t, _ in parts]
    batch = batch_of(parts, [table_of(i, 1) for i in range(40)])
    logits = runner.logits(batch)
    result = runner.step(batch, sampling_of(40, num_logprobs_N=np.full(40, 3, np.int32)))
    np.testing.assert_array_equal(result.tokens_N, logits.argmax(1))
    peak = logits.max(1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(1, keepdims=True))
    assert result.logprobs_N is not None
    assert result.top_ids_NK is not None
    np.testing.assert_allclose(result.logprobs_N, logprobs.max(1), atol=1e-5)
    np.testing.assert_array_equal(result.top_ids_NK[:, :3], np.argsort(-logits, 1, kind="stable")[:, :3])


def test_a_step_without_outputs_fills_the_cache() -> None:
    spec = SPECS["gemma3"]
    runner = runner_of(spec)
    tokens = tokens_of(spec, 33)
    expected = runner.logits(batch_of([(tokens, 0)], [table_of(0, 3)]))
    empty = runner.step(batch_of([(tokens[:32], 0)], [table_of(5, 3)], [[]]), sampling_of(0))
    assert empty.tokens_N.size == 0
    np.testing.assert_array_equal(runner.logits(batch_of([(tokens[32:], 32)], [table_of(5, 3)])), expected)


def test_swapped_blocks_come_back_bit_for_bit() -> None:
    spec = SPECS["llama"]
    runner = runner_of(spec)
    tokens = tokens_of(spec, 33)
    expected = runner.logits(batch_of([(tokens, 0)], [table_of(0, 3)]))
    runner.swap_out(table_of(0, 3), table_of(3, 3, -1))
    runner.logits(batch_of([(tokens_of(spec, 48, 9), 0)], [table_of(0, 3)]))  # overwrites the device blocks
    runner.swap_in(table_of(3, 3, -1), table_of(20, 3))
    np.testing.assert_array_equal(runner.logits(batch_of([(tokens[32:], 32)], [table_of(20, 3)])), expected)
    with pytest.raises(StepFailed, match="swap of block 99"):
        runner.swap_out(np.array([99], np.int32), np.array([0], np.int32))
    with pytest.raises(StepFailed, match="host block 4"):
        runner.swap_in(np.array([4], np.int32), np.array([0], np.int32))


def test_what_a_broken_request_left_behind_reaches_nobody() -> None:
    """NaN in freed blocks must not reach a request that so far fills only part of them."""
    spec = SPECS["llama"]
    checkpoint = RandomCheckpoint(spec)
    checkpoint.tensor("embed.weight").raw[202, :2] = np.array([np.nan], np.float16).view(np.uint8)
    runner = NativeRunner(spec, checkpoint, block_tokens=16, num_blocks=40, num_host_blocks=0, max_rows=160, threads=1)  # type: ignore[arg-type]
    tokens = tokens_of(spec, 35) % 202
    expected = [runner.logits(batch_of([(tokens[:n], 0)], [table_of(0, 3)])) for n in (9, 10, 35)]
    poison = batch_of([(np.full(48, 202, np.int32), 0)], [table_of(0, 3)])
    assert np.isnan(runner.logits(poison)).any()
    with pytest.raises(StepFailed, match="output 0 has no token"):
        runner.step(poison, sampling_of(1))
    for n, clean in zip((9, 10, 35), expected, strict=True):
        runner.logits(poison)
        np.testing.assert_array_equal(runner.logits(batch_of([(tokens[:n], 0)], [table_of(0, 3)])), clean)


BAD = {
    "token": lambda b: b.tokens_M.__setitem__(2, 203),
    "negative token": lambda b: b.tokens_M.__setitem__(0, -1),
    "position": lambda b: b.positions_M.__setitem__(1, 7),
    "negative position": lambda b: b.positions_M.__setitem__(slice(0, 5), np.arange(-3, 2)),
    "beyond context": lambda b: b.positions_M.__setitem__(slice(0, 5), np.arange(510, 515)),
    "beyond table": lambda b: b.positions_M.__setitem__(slice(0, 5), np.arange(14, 19)),
    "block": lambda b: b.block_tables_SW.__setitem__((0, 0), 40),
    "negative block": lambda b: b.block_tables_SW.__setitem__((1, 0), -1),
    "row starts": lambda b: b.row_starts_S1.__setitem__(1, 9),
    "empty sequence": lambda b: b.row_starts_S1.__setitem__(1, 0),
    "first row": lambda b: b.row_starts_S1.__setitem__(0, 1),
    "output": lambda b: b.output_rows_N.__setitem__(1, 8),
    "outputs not ascending": lambda b: b.output_rows_N.__setitem__(0, 7),
    "wrong type": lambda b: setattr(b, "tokens_M", b.tokens_M.astype(np.int64)),
    "wrong length": lambda b: setattr(b, "positions_M", b.positions_M[:-1]),
    "not contiguous": lambda b: setattr(b, "tokens_M", np.repeat(b.tokens_M, 2)[::2]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_batch_is_refused_and_harms_nobody(name: str) -> None:
    spec = SPECS["llama"]
    runner = runner_of(spec)
    good = batch_of([(tokens_of(spec, 5), 0), (tokens_of(spec, 3, 1), 0)], [table_of(0, 1), table_of(1, 1)])
    expected = runner.logits(good)
    bad = batch_of([(tokens_of(spec, 5), 0), (tokens_of(spec, 3, 1), 0)], [table_of(0, 1), table_of(1, 1)])
    BAD[name](bad)
    with pytest.raises(StepFailed):
        runner.step(bad, sampling_of(2))
    with pytest.raises(StepFailed):
        runner.logits(bad)
    np.testing.assert_array_equal(runner.logits(good), expected)


BAD_SAMPLING = {
    "mask row": {"mask_rows_N": np.array([0, -1], np.int32)},
    "target": {"targets_N": np.array([203, -1], np.int32)},
    "logprobs": {"num_logprobs_N": np.array([21, -1], np.int32)},
    "temperature": {"temperature_N": np.array([np.nan, 0], np.float32)},
    "top k": {"top_k_N": np.array([-1, 0], np.int32)},
    "top p": {"top_p_N": np.array([0, 1], np.float32)},
    "repetition": {"repetition_N": np.array([0, 1], np.float32)},
    "seen": {"seen_starts_N1": np.array([0, 1, 1], np.int32)},
    "seen id": {
        "seen_starts_N1": np.array([0, 1, 1], np.int32), "seen_ids": np.array([203], np.int32),
        "seen_counts": np.array([1], np.int32),
    },
    "bias id": {
        "bias_starts_N1": np.array([0, 0, 1], np.int32), "bias_ids": np.array([-1], np.int32),
        "bias_values": np.array([1], np.float32),
    },
    "bias order": {
        "bias_starts_N1": np.array([0, 1, 0], np.int32), "bias_ids": np.array([1], np.int32),
        "bias_values": np.array([1], np.float32),
    },
    "short": {"draw_N": np.zeros(1, np.uint64)},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SAMPLING)
def test_bad_sampling_is_refused(name: str) -> None:
    runner = runner_of(SPECS["llama"])
    batch = batch_of([(tokens_of(runner_spec := SPECS["llama"], 2), 0), (tokens_of(runner_spec, 2), 0)],
                     [table_of(0, 1), table_of(1, 1)])  # fmt: skip
    with pytest.raises(StepFailed):
        runner.step(batch, sampling_of(2, **BAD_SAMPLING[name]))


def test_too_many_rows_or_none_are_refused() -> None:
    spec = SPECS["llama"]
    runner = runner_of(spec, max_rows=8)
    with pytest.raises(StepFailed, match="9 rows; a step takes 1 to 8"):
        runner.logits(batch_of([(tokens_of(spec, 9), 0)], [table_of(0, 1)]))
    i32 = np.zeros(0, np.int32)
    with pytest.raises(StepFailed, match="0 rows"):
        runner.logits(StepBatch(i32, i32, np.zeros(1, np.int32), np.zeros((0, 1), np.int32), i32))


def test_a_closed_runner_refuses_and_closes_again() -> None:
    runner = runner_of(SPECS["llama"], threads=2)
    runner.close()
    runner.close()
    with pytest.raises(StepFailed, match="closed"):
        runner.logits(batch_of([(tokens_of(SPECS["llama"], 2), 0)], [table_of(0, 1)]))


def test_memory_is_itemised_and_predicted() -> None:
    for name, kind in (("llama", "Q4_1"), ("llama3", "Q8_0"), ("qwen2", "Q5_0"), ("gemma3", "BF16")):
        spec = SPECS[name]
        checkpoint = RandomCheckpoint(spec, kind)
        runner = runner_of(spec, kind)
        memory = runner.memory_bytes()
        assert memory["weights"] == packed_weight_bytes(
            spec, {n: checkpoint.tensor(n).format for n in checkpoint.names()}
        )
        per_token = spec.kv_elements_per_token() * 2
        assert runner.block_bytes == 16 * per_token
        assert (memory["kv"], memory["host_kv"]) == (40 * runner.block_bytes, 4 * runner.block_bytes)
        assert memory["activations"] > 0


def test_what_has_no_kernel_is_said() -> None:
    spec = llama(head_dim=24, num_heads=4, num_kv_heads=4)
    reason = supports(spec, RandomCheckpoint(spec))  # type: ignore[arg-type]
    assert reason is not None
    assert "head_dim is 24" in reason
    with pytest.raises(MachineError, match="head_dim is 24"):
        runner_of(spec)
    for change, words in (
        ({"norm": "layer"}, "layer norms"), ({"activation": "relu"}, "relu"), ({"num_experts": 8}, "experts"),
        ({"position": "alibi"}, "alibi"), ({"gated_ffn": False}, "gate"), ({"ffn": 48}, "ffn is 48"),
        ({"family": "mixtral"}, "mixtral"),
    ):  # fmt: skip
        spec = llama(**change)
        reason = supports(spec, RandomCheckpoint(llama()))  # type: ignore[arg-type]
        assert reason is not None
        assert words in reason


def test_the_instruction_set_can_be_chosen_and_a_wrong_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITH_NATIVE_ISA", "portable")
    assert runner_of(SPECS["llama"]).name == "native-portable"
    assert build.status().chosen == "portable"
    monkeypatch.setenv("MEGALITH_NATIVE_ISA", "sse9")
    assert "sse9" in (supports(SPECS["llama"], RandomCheckpoint(SPECS["llama"])) or "")  # type: ignore[arg-type]
    assert build.status().problems
    with pytest.raises(MachineError, match="sse9"):
        runner_of(SPECS["llama"])


def test_the_phases_are_counted() -> None:
    spec = SPECS["llama"]
    runner = runner_of(spec)
    runner.step(batch_of([(tokens_of(spec, 20), 0)], [table_of(0, 2)]), sampling_of(1))
    phases = runner.phase_ns(reset=True)
    assert set(phases) == set(binding.PHASES)
    assert phases.pop("wait") == 0  # no window
    assert all(ns > 0 for ns in phases.values())
    assert sum(runner.phase_ns().values()) == 0
