"""A model through a window of its weights: the same bits as in memory, and failures that name what failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from megalith.base.errors import DoesNotFit, StepFailed, TierError
from megalith.engine import packed_file
from megalith.engine.native import build
from megalith.engine.native_runner import NativeRunner
from megalith.engine.packed_file import PackedFile, ensure_packed
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


def test_closing_while_reads_are_under_way_is_quick_and_idempotent(tmp_path: Path) -> None:
    runner = windowed(DEEP, tmp_path / "p", 90 * KIB)
    assert runner.window is not None
    runner.close()
    runner.close()
