"""A model through a window of its weights: the same bits as in memory, and failures that name what failed."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from megalith.base.errors import DoesNotFit, StepFailed, TierError
from megalith.engine import packed_file
from megalith.engine.api import Delta, EngineConfig
from megalith.engine.launch import BuiltEngine, build_engine
from megalith.engine.native import build
from megalith.engine.native_runner import NativeRunner
from megalith.engine.packed_file import PackedFile, ensure_packed, packed_path
from megalith.engine.params import SamplingParams
from megalith.engine.service import merge
from megalith.engine.weight_window import WeightWindow
from megalith.policy.weight_window import lay_out, least_bytes
from megalith.specs.model import ModelSpec
from megalith.tier.disk import DirectFile
from megalith.tier.memory import HUGE_PAGE_BYTES
from tests.engine.native_models import SPECS, RandomCheckpoint, batch_of, llama

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")
KIB, MIB = 1 << 10, 1 << 20
PIECE = 12 * KIB
DEEP = llama(num_layers=6)
SIZES = {"block_tokens": 16, "num_blocks": 12, "num_host_blocks": 0, "max_rows": 64, "threads": 1}


def windowed(spec: ModelSpec, path: Path, budget: int, kind: str = "Q8_0") -> NativeRunner:
    weights = RandomCheckpoint(spec, kind)
    ensure_packed(path, spec, weights, piece_bytes=PIECE)  # type: ignore[arg-type]
    window = WeightWindow(PackedFile(path), spec, budget, page_bytes=4096)
    return NativeRunner(spec, weights, window=window, **SIZES)  # type: ignore[arg-type]


def prompt(spec: ModelSpec, count: int = 30, done: int = 0, outputs: int | None = None):  # type: ignore[no-untyped-def]
    tokens = np.random.default_rng(3).integers(0, spec.vocab, 64).astype(np.int32)[done : done + count]
    rows = list(range(count)) if outputs is None else list(range(outputs))
    return batch_of([(tokens, done)], [np.arange(4, dtype=np.int32)], [rows])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_steps_through_a_window_have_the_bits_of_memory(name: str, kind: str, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPECS[name], num_layers=6)
    with_all = NativeRunner(spec, RandomCheckpoint(spec, kind), **SIZES)  # type: ignore[arg-type]
    whole = with_all.memory_bytes()["weights"]
    streaming = windowed(spec, tmp_path / "p", whole * 3 // 4, kind)
    assert streaming.window is not None
    assert streaming.window.layout.streamed
    for batch in (prompt(spec, 20), prompt(spec, 5, 20, outputs=0), prompt(spec, 1, 25), prompt(spec, 4, 26)):
        np.testing.assert_array_equal(streaming.logits(batch), with_all.logits(batch))
    streaming.close()
    with_all.close()


def test_everything_stays_where_it_fits(tmp_path: Path) -> None:
    runner = windowed(DEEP, tmp_path / "p", 64 * MIB)
    assert runner.window is not None
    assert runner.window.step_bytes == runner.window.read_bytes == 0
    runner.logits(prompt(DEEP))
    runner.close()


def test_layouts_keep_to_the_budget() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        sizes = [int(size) for size in rng.integers(1, 30 * MIB, int(rng.integers(1, 40)))]
        head, budget = int(rng.integers(0, len(sizes))), int(rng.integers(1, sum(sizes) + 1))
        try:
            layout = lay_out(sizes, head, budget, HUGE_PAGE_BYTES)
        except DoesNotFit:
            assert budget < least_bytes(sizes, HUGE_PAGE_BYTES)
            continue
        assert layout.num_bytes <= budget
        assert sorted((*layout.pinned, *layout.streamed)) == list(range(len(sizes)))
        assert all(sizes[piece] <= layout.slot_bytes for piece in layout.streamed)
        assert len(layout.streamed) >= layout.slots


def test_the_head_stays_first() -> None:
    layout = lay_out([8 * MIB] * 100, 90, 300 * MIB, HUGE_PAGE_BYTES)
    assert layout.slots == 8
    assert set(range(90, 100)) < set(layout.pinned)
    assert layout.num_bytes >= 296 * MIB


def test_a_truncated_file_is_refused_with_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p"
    ensure_packed(path, DEEP, RandomCheckpoint(DEEP))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(TierError, match="cut short"):
        PackedFile(path)


def test_a_corrupted_piece_fails_its_step_by_name_and_other_kv_survives(tmp_path: Path) -> None:
    path = tmp_path / "p"
    expected = windowed(DEEP, path, 64 * MIB)
    first, second = prompt(DEEP, 20), prompt(DEEP, 1, 20)
    expected.logits(first)
    wanted = expected.logits(second)
    expected.close()
    runner = windowed(DEEP, path, 90 * KIB)
    assert runner.window is not None
    packed = runner.window._packed
    runner.logits(first)
    piece = runner.window.layout.streamed[-1]
    at = packed.index.pieces[piece].offset + 100
    before = path.read_bytes()[at : at + 1]
    packed._verified.clear()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([before[0] ^ 1]))
        file.flush()
        os.fsync(file.fileno())
    runner.window._prime(0)  # what was read ahead before is good still
    with pytest.raises(StepFailed, match=packed.index.pieces[piece].name):
        runner.logits(second)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(before)
        file.flush()
        os.fsync(file.fileno())
    np.testing.assert_array_equal(runner.logits(second), wanted)
    runner.close()
    with pytest.raises(StepFailed, match="closed"):
        runner.logits(second)


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DirectFile, offset: int, view: memoryview) -> None:
        raise TierError(f"Writing {view.nbytes} bytes: there is no room.") from OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(DirectFile, "write_from", full)
        with pytest.raises(TierError, match="no room"):
            ensure_packed(tmp_path / "p", DEEP, RandomCheckpoint(DEEP))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(packed_file, "packed_size", lambda spec, weights: 1 << 60)
    with pytest.raises(TierError, match="are free"):
        ensure_packed(tmp_path / "p", DEEP, RandomCheckpoint(DEEP))


def test_a_streamed_head_gives_the_bits_of_memory_to_more_outputs_than_one_pass_has(tmp_path: Path) -> None:
    spec = llama(num_layers=2, vocab=3000)  # the head is most of the model
    with_all = NativeRunner(spec, RandomCheckpoint(spec), **SIZES)  # type: ignore[arg-type]
    streaming = windowed(spec, tmp_path / "p", 150 * KIB)
    assert streaming.window is not None
    head = range(streaming.window._packed.index.head, len(streaming.window.sizes))
    assert len(set(head) & set(streaming.window.layout.streamed)) > 10
    for batch in (prompt(spec, 40), prompt(spec, 1, 40)):
        np.testing.assert_array_equal(streaming.logits(batch), with_all.logits(batch))
    streaming.close()
    with_all.close()


def test_closing_during_a_read_waits_for_it_and_is_idempotent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = windowed(DEEP, tmp_path / "p", 90 * KIB)
    assert runner.window is not None
    reading, ended, read = threading.Event(), threading.Event(), DirectFile.read_into

    def slow(self: DirectFile, offset: int, view: memoryview) -> None:
        reading.set()
        time.sleep(0.3)
        read(self, offset, view)
        ended.set()

    monkeypatch.setattr(DirectFile, "read_into", slow)
    runner.window._prime(0)
    assert reading.wait(10)
    runner.close()
    assert ended.is_set()  # it never writes into memory that was given back
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mover")]
    runner.close()


def test_what_was_packed_of_a_file_that_changed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path / "home"))
    source, other = tmp_path / "a.gguf", tmp_path / "b" / "a.gguf"
    other.parent.mkdir()
    for path in (source, other):
        path.write_bytes(b"1")
        ensure_packed(packed_path(path), DEEP, RandomCheckpoint(DEEP))
    source.write_bytes(b"22")
    new = ensure_packed(packed_path(source), DEEP, RandomCheckpoint(DEEP))
    assert sorted(new.parent.iterdir()) == sorted([new, packed_path(other)])


def test_a_real_model_streams_the_words_of_memory_and_a_cancelled_request_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)

    async def answers(settings: EngineConfig) -> tuple[str, BuiltEngine]:
        built = build_engine(settings)
        await built.engine.start()
        ids = built.model.tokenizer.encode("The capital of France is")
        try:
            async with aclosing(built.engine.generate(ids[:-1], replace(params, max_tokens=200))) as cancelled:
                await anext(cancelled)
                asked = asyncio.ensure_future(collect(built.engine.generate(ids, params)))
                await anext(cancelled)
            return await asyncio.wait_for(asked, 60), built
        finally:
            await built.engine.stop()

    async def collect(stream: AsyncIterator[Delta]) -> str:
        return merge([delta async for delta in stream]).text

    small = EngineConfig(model="smollm2", memory_bytes=150 * MIB, max_context=512, threads=1, max_sequences=2)
    streamed, built = asyncio.run(answers(small))
    assert built.fit.window_bytes is not None
    assert built.fit.plan.need_bytes <= 150 * MIB
    assert re.search(r"decode steps of .* \(measured; .* predicted", built.streamed())
    assert built.streamed_facts()["step_bytes"] > 10 * MIB
    assert asyncio.run(answers(replace(small, memory_bytes=1 << 30)))[0] == streamed
