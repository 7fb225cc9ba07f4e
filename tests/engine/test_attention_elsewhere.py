"""Attention in other real processes: the same tokens, the bytes of the formula, and what happens when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, MachineError, StepFailed
from megalith.cost.attention_devices import VALUE_BYTES, crossing_bytes
from megalith.engine import attention_wire as wire
from megalith.engine.api import Delta, EngineConfig
from megalith.engine.attention_option import AttentionOption, check_attention, parse_attention
from megalith.engine.attention_share import KvShare
from megalith.engine.attention_spread import SpreadKv
from megalith.engine.attention_wire import Run, Tables, WireError, WorkerSetup
from megalith.engine.batch import StepBatch
from megalith.engine.launch import build_engine
from megalith.engine.params import SamplingParams
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import OpenModel
from tests.engine.running import Way, make_engine, run_prompts
from tests.engine.tiny import HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCAB

BLOCK, BLOCKS = 4, 96
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
WAY = Way(budget=24, arrivals=(0, 2, 1, 5, 0, 3), prefix=True)


def open_runner(model: OpenModel, attention: str = "here", blocks: int = BLOCKS, dtype: str = "float32") -> TorchRunner:
    return TorchRunner(
        model.spec, model.checkpoint, block_tokens=BLOCK, num_blocks=blocks, threads=1,
        dtype=dtype, attention=parse_attention(attention),  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    shared = rng.integers(3, VOCAB, 18).tolist()
    return [rng.integers(3, VOCAB, n).tolist() for n in (1, 9, 30, 21)] + [[*shared, 7, 8], [*shared, 9]]


def tokens_of(runner: TorchRunner, model: OpenModel, prompts: list[list[int]], way: Way = WAY) -> list[Delta]:
    return run_prompts(make_engine(runner, way), model.tokenizer, prompts, GREEDY, way)


@pytest.fixture(scope="module")
def plain(tiny_model: OpenModel, prompts: list[list[int]]) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    found = {}
    for dtype in ("float32", "bf16"):
        runner = open_runner(tiny_model, dtype=dtype)
        found[dtype] = [delta.token_ids for delta in tokens_of(runner, tiny_model, prompts)]
        runner.close()
    return found


@pytest.mark.parametrize(
    ("attention", "blocks", "dtype"),
    [
        ("workers:2", BLOCKS, "float32"),
        ("workers:3", BLOCKS, "float32"),  # more than KV heads: by request
        ("workers:2", BLOCKS, "bf16"),
        ("spread:2", 20, "float32"),  # blocks move all the time
        ("spread:2", 20, "bf16"),
        ("storage:FOLDER/keep=1", 40, "float32"),  # the log goes round
    ],
)
def test_tokens_equal_those_of_attention_here(
    attention: str, blocks: int, dtype: str, tiny_model: OpenModel, prompts: list[list[int]],
    plain: dict[str, list[tuple[int, ...]]], tmp_path: Path,
) -> None:  # fmt: skip
    runner = open_runner(tiny_model, attention.replace("FOLDER", str(tmp_path)), blocks, dtype)
    try:
        found = [delta.token_ids for delta in tokens_of(runner, tiny_model, prompts)]
        if dtype == "bf16":
            # Some processors sum bfloat16 products of other shapes in another order: a near tie may go the other way.
            assert [ids[:5] for ids in found] == [ids[:5] for ids in plain[dtype]]
            assert sum(one == other for one, other in zip(found, plain[dtype], strict=True)) > len(found) / 2
        else:
            assert found == plain[dtype]
        assert runner.elsewhere is not None
        if isinstance(runner.elsewhere, SpreadKv):
            assert runner.elsewhere.moved_blocks > 20
        assert not list(tmp_path.iterdir()), "the KV file has no name"
    finally:
        runner.close()


def decode_bytes(runner: TorchRunner, context: int, steps: int = 8) -> tuple[int, int]:
    """(data, header) bytes of so many decode steps of one sequence after its prompt."""
    rows = np.arange(context, dtype=np.int32)
    table = np.arange(-(-(context + steps) // BLOCK), dtype=np.int32)[None]
    tokens = (rows % (VOCAB - 3) + 3).astype(np.int32)
    for low in range(0, context, 32):
        part = rows[low : low + 32]
        starts = np.array([0, len(part)], np.int32)
        runner.logits(StepBatch(tokens[part], part, starts, table, np.array([len(part) - 1], np.int32)))
    assert runner.elsewhere is not None
    before = runner.elsewhere.group.traffic()
    one = np.array([0, 1], np.int32)
    for position in range(context, context + steps):
        at = np.array([position], np.int32)
        runner.logits(StepBatch(np.array([5], np.int32), at, one, table, np.array([0], np.int32)))
    after = runner.elsewhere.group.traffic()
    return after["data"] - before["data"], after["headers"] - before["headers"]


@pytest.mark.parametrize("attention", ["workers:2", "storage:FOLDER"])
def test_bytes_for_a_token_are_those_of_the_formula(attention: str, tiny_model: OpenModel, tmp_path: Path) -> None:
    runner = open_runner(tiny_model, attention.replace("FOLDER", str(tmp_path)))
    try:
        group, width, wide = HEADS // KV_HEADS, HEADS * HEAD_DIM, 4
        short, long = decode_bytes(runner, 40), decode_bytes(runner, 320)
        assert short[0] == 8 * LAYERS * (2 + 2 / group) * wide * width
        assert short[0] == 8 * crossing_bytes(tiny_model.spec) * wide // VALUE_BYTES
        assert long == short, "neither tensors nor headers grow with the context"
        frames = 1 + 3 * LAYERS  # STEP; QUERY, PAIR and OUTPUT in every layer
        each = frames * wire.HEADER_BYTES + 20
        workers = len(runner.elsewhere.group.links)  # type: ignore[union-attr]
        assert 8 * each * workers <= short[1] <= 8 * (each + 8) * workers
    finally:
        runner.close()


def test_a_prompt_of_four_times_the_blocks_of_an_instance_completes(tiny_model: OpenModel) -> None:
    prompt = np.random.default_rng(1).integers(3, VOCAB, 4 * 16 * BLOCK).tolist()
    way = Way(budget=16)
    free, spread = open_runner(tiny_model), open_runner(tiny_model, "spread:4", 16)
    try:
        expected = tokens_of(free, tiny_model, [prompt], way)[0]
        found = tokens_of(spread, tiny_model, [prompt], way)[0]
        assert found.token_ids == expected.token_ids
        assert found.finish_reason == "length"
        place = spread.elsewhere
        assert isinstance(place, SpreadKv)
        assert spread.num_blocks == 5 * 16
        counts = np.bincount(place._place[place._place >= 0], minlength=5)
        assert counts.max() <= 16, "no instance holds more than its budget"
        assert (counts[1:] > 0).all(), "every lender holds a part"
    finally:
        free.close()
        spread.close()


def test_what_crosses_for_a_token_of_a_spread_request_does_not_depend_on_its_context(tiny_model: OpenModel) -> None:
    runner = open_runner(tiny_model, "spread:2", 48)
    try:
        short, long = decode_bytes(runner, 240), decode_bytes(runner, 480)
        parts = (HEADS * HEAD_DIM + 2 * HEADS + HEADS * HEAD_DIM) * 4 * LAYERS  # q there; values, maximum, sum back
        moved = runner.block_bytes * 8 // BLOCK  # blocks that make room for new ones: eight tokens fill two
        assert short[0] - 8 * 2 * parts in (0, moved, moved + runner.block_bytes)
        assert long[0] <= short[0] + moved + runner.block_bytes
    finally:
        runner.close()


def test_sparf_reads_less_and_is_dense_when_everything_is_kept(tiny_model: OpenModel, tmp_path: Path) -> None:
    read = {}
    logits = {}
    context = np.random.default_rng(3).integers(3, VOCAB, 300).astype(np.int32)
    rows = np.arange(300, dtype=np.int32)
    table = np.arange(76, dtype=np.int32)[None]
    for keep in (1, 8):
        runner = open_runner(tiny_model, f"storage:{tmp_path}/keep={keep}")
        try:
            link = runner.elsewhere.group.links[0]  # type: ignore[union-attr]
            runner.logits(StepBatch(context, rows, np.array([0, 300], np.int32), table, rows[-1:]))
            before = link.stats()["read"]
            one = StepBatch(context[:1], np.array([300], np.int32), np.array([0, 1], np.int32), table, rows[:1])
            logits[keep] = runner.logits(one)
            read[keep] = link.stats()["read"] - before
        finally:
            runner.close()
    kept = LAYERS * KV_HEADS * 4 * (300 * HEAD_DIM // 8 + 2 * 38 * HEAD_DIM)
    assert read == {1: LAYERS * KV_HEADS * 4 * 2 * 300 * HEAD_DIM, 8: kept}
    assert not np.allclose(logits[1], logits[8])
    assert np.corrcoef(logits[1][0], logits[8][0])[0, 1] > 0.5


def setup_of(**changes: object) -> WorkerSetup:
    fields: dict[str, object] = {
        "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "block_tokens": 4, "num_blocks": 32, "scale": 0.4,
        "windows": (None,), "float_queries": True, "float_kv": True,
    }  # fmt: skip
    return WorkerSetup(**{**fields, **changes})  # type: ignore[arg-type]


def test_sparf_equals_dense_when_the_rest_has_no_weight() -> None:
    """One key dominates: whatever is left out weighs nothing, so both give its value."""
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(100, 2, 8)).astype(np.float32) for _ in range(2))
    k[50] = 30.0
    run = Run(1, 100, np.stack([np.arange(26), np.arange(26)], axis=1).astype(np.int32))
    q = np.ones((1, 4, 8), np.float32)
    values = []
    for keep in (1, 4):
        share = KvShare(setup_of(keep=keep))
        for _ in range(2):  # a step that failed elsewhere is run again
            share.write(0, np.arange(100) // 4, np.arange(100) % 4, k, v)
        if share._value_sums is not None:
            np.testing.assert_allclose(share._value_sums[0].sum(axis=1), v.sum(axis=0), atol=1e-4)
        values.append(share.stored(0, q, run).values)
    np.testing.assert_allclose(values[0], values[1], atol=1e-6)
    np.testing.assert_allclose(values[0][0], v[50, 0], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([None, 1, 7, 30]))
def test_stored_and_new_parts_merge_to_plain_attention(seed: int, rows: int, window: int | None) -> None:
    from megalith.engine.partial_attention import merge

    rng = np.random.default_rng(seed)
    first = int(rng.integers(0, 60))
    total = first + rows
    k, v = (rng.normal(size=(total, 2, 8)).astype(np.float32) for _ in range(2))
    q = rng.normal(size=(rows, 4, 8)).astype(np.float32)
    table = rng.permutation(32)[: -(-total // 4)].astype(np.int32)
    share = KvShare(setup_of(windows=(window,)))
    at = np.arange(first)
    share.write(0, table[at // 4], at % 4, k[:first], v[:first])
    run = Run(rows, first, np.stack([table, np.arange(len(table), dtype=np.int32)], axis=1))
    half = rng.random(len(table)) < 0.5
    parts = [share.stored(0, q, run._replace(blocks=run.blocks[chosen])) for chosen in (half, ~half)]
    found = merge([*parts, share.new(0, q, k[first:], v[first:])]).values.reshape(rows, 4, 8)
    seen = np.arange(total)[None] <= first + np.arange(rows)[:, None]
    if window is not None:
        seen &= np.arange(total)[None] > first + np.arange(rows)[:, None] - window
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(0, 1) for x in (q, k.repeat(2, 1), v.repeat(2, 1))),
        attn_mask=torch.from_numpy(seen), scale=0.4,
    ).transpose(0, 1)  # fmt: skip
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_survive_the_way_and_grow_only_by_what_is_new(data: st.DataObject) -> None:
    here, there = Tables(), Tables()
    table = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=12)
    for _ in range(4):
        runs = [
            Run(1, 2, np.array(blocks, np.int32).reshape(-1, 2))
            for blocks in data.draw(st.lists(table, min_size=1, max_size=4))
        ]
        found = there.decode(memoryview(here.encode(runs)), len(runs))
        for run, back in zip(runs, found, strict=True):
            assert (back.rows, back.first) == (run.rows, run.first)
            assert (back.blocks == run.blocks).all()
    assert len(here.encode(runs)) <= 20 * len(runs) + 8 * sum(len(run.blocks) for run in runs)
    with pytest.raises(WireError):
        there.decode(memoryview(b"\x01" * 21), 1)


@pytest.mark.parametrize(
    ("attention", "blocks", "name"),
    [
        ("workers:2", BLOCKS, "Attention worker 2 of 2"),
        ("spread:2", 12, "Lender 2 of 2"),
        ("storage:FOLDER", BLOCKS, "Storage worker 1 of 1"),
    ],
)
def test_a_worker_killed_in_the_middle_fails_by_name_and_quickly(
    attention: str, blocks: int, name: str, tiny_model: OpenModel, prompts: list[list[int]], tmp_path: Path
) -> None:
    runner = open_runner(tiny_model, attention.replace("FOLDER", str(tmp_path)), blocks)
    engine = make_engine(runner, way := Way(budget=24))
    assert runner.elsewhere is not None
    links = runner.elsewhere.group.links
    calls = 0
    plain_step = runner.step

    def step(batch: StepBatch, sampling: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 5:
            links[-1].process.kill()
        return plain_step(batch, sampling)  # type: ignore[arg-type]

    runner.step = step  # type: ignore[method-assign, assignment]
    begin = time.monotonic()
    deltas = run_prompts(engine, tiny_model.tokenizer, prompts[2:4], GREEDY, way)
    assert calls >= 5
    assert time.monotonic() - begin < 10
    for delta in deltas:
        assert delta.finish_reason == "error"
        assert name in (delta.error or "")
        assert "signal 9" in (delta.error or "")
    later = run_prompts(engine, tiny_model.tokenizer, prompts[:1], GREEDY, way)
    assert later[0].finish_reason == "error", "KV is lost: nobody gets tokens from half of it"
    assert all(link.process.poll() is not None for link in links), "the others end too"
    assert not list(tmp_path.iterdir())
    runner.close()


def test_a_worker_that_does_not_answer_is_a_failure_within_the_deadline(tiny_model: OpenModel) -> None:
    runner = open_runner(tiny_model, "workers:1")
    link = runner.elsewhere.group.links[0]  # type: ignore[union-attr]
    link.channel.deadline_s = 0.3
    os.kill(link.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StepFailed, match=r"Attention worker 1 of 1 .* did not answer within 0\.3 s"):
            decode_bytes(runner, 8)
    finally:
        runner.close()
    assert link.process.poll() is not None


PARENT = """
import sys, time
from megalith.engine.attention_link import start_workers
from megalith.engine.attention_wire import WorkerSetup
import msgspec
setups = [msgspec.json.decode(text, type=WorkerSetup) for text in sys.argv[1:]]
group = start_workers([str(i) for i in range(len(setups))], setups, 1)
print(*(link.process.pid for link in group.links), flush=True)
time.sleep(60)
"""


def test_no_worker_and_no_file_outlives_a_killed_engine(tmp_path: Path) -> None:
    import msgspec

    texts = [msgspec.json.encode(setup_of(folder=str(tmp_path))).decode(), msgspec.json.encode(setup_of()).decode()]
    with subprocess.Popen([sys.executable, "-c", PARENT, *texts], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    end = time.monotonic() + 5
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in workers)
    assert not list(tmp_path.iterdir())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_starts_without_torch() -> None:
    script = "import sys, megalith.engine.attention_worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_worker_that_cannot_have_its_file_is_an_error_that_leaves_nothing(
    tiny_model: OpenModel, tmp_path: Path
) -> None:
    with pytest.raises(MachineError, match=r"Storage worker 1 of 1 did not start.*FileNotFoundError"):
        open_runner(tiny_model, f"storage:{tmp_path}/none")


@pytest.mark.parametrize(
    "text", ["", "worker:2", "workers:0", "workers:65", "spread:", "storage:", "storage:/x/keep=0"]
)
def test_options_that_there_are_not(text: str) -> None:
    with pytest.raises(ConfigError, match="storage:FOLDER"):
        parse_attention(text)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mode": "native"}, "attends in its own step"),
        ({"device": "cuda"}, "for the torch runner on the CPU"),
        ({"preempt": "swap"}, "no host blocks to swap to"),
        ({"attention": "storage:/nowhere/at/all"}, "is not a folder"),
        ({"attention": "storage:/", "policy": "first-come"}, ""),
        ({"attention": "storage:/tmp/keep=99"}, "leaves nothing of heads of 16"),
    ],
)
def test_combinations_that_cannot_be(changes: dict[str, object], match: str, tiny_model: OpenModel) -> None:
    config = EngineConfig(**{"model": "tiny", "attention": "workers:2", **changes})  # type: ignore[arg-type]
    if not match:
        assert check_attention(config, tiny_model.spec) == AttentionOption("storage", 1, "/", 1)
        return
    with pytest.raises(ConfigError, match=match):
        check_attention(config, tiny_model.spec)


def test_an_instance_that_cannot_hold_what_a_step_writes_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"can write to 144 blocks, but this instance has 20"):
        build_engine(EngineConfig(model=str(tiny), mode="float32", attention="spread:2", num_blocks=20, threads=1))


def test_spread_instances_hold_a_longer_context_together(tiny: Path) -> None:
    built = build_engine(
        EngineConfig(
            model=str(tiny),
            mode="float32",
            attention="spread:3",
            num_blocks=8,
            threads=1,
            max_sequences=2,
            token_budget=32,
        )
    )
    try:
        assert built.fit.num_blocks == 8
        assert built.runner.num_blocks == 32
        assert built.engine.max_context == 512, "the model's own: four instances hold it"
    finally:
        built.runner.close()
