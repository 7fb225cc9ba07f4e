"""Real ranks: the same tokens as one process, nothing of the prompt on the wire, and every way to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megalith.base.errors import MachineError, StepFailed
from megalith.engine.batch import F32, StepBatch
from megalith.engine.frames import HELLO
from megalith.engine.parallel import group, wire
from megalith.engine.parallel.option import ParallelOption
from megalith.engine.parallel.ports import PortChannel
from megalith.engine.parallel.runner import TensorParallelRunner
from megalith.engine.params import SamplingParams
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import OpenModel
from tests.engine.running import Way, make_engine, run_prompts
from tests.engine.tiny import VOCAB

BLOCK, BLOCKS = 4, 96
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
WAY = Way(budget=24, arrivals=(0, 2, 1, 5, 0, 3), prefix=True)
LONG = np.arange(40, 40 + 32, dtype=np.int32)
"""A prompt whose ids stand out."""


def open_ranks(model: OpenModel, option: ParallelOption) -> TensorParallelRunner:
    return TensorParallelRunner(
        model.checkpoint,
        model.files.path,
        option,
        dtype="float32",
        block_tokens=BLOCK,
        num_blocks=BLOCKS,
        threads=1,
        deadline_s=10,
    )


def logits(runner: TorchRunner, ids: np.ndarray) -> F32:
    rows = np.arange(len(ids), dtype=np.int32)
    table = np.arange(-(-len(ids) // BLOCK), dtype=np.int32)[None]
    return runner.logits(StepBatch(ids, rows, np.array([0, len(ids)], np.int32), table, rows))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    shared = rng.integers(3, VOCAB, 18).tolist()
    return [rng.integers(3, VOCAB, n).tolist() for n in (1, 9, 30, 21)] + [[*shared, 7, 8], [*shared, 9]]


@pytest.fixture(scope="module")
def plain(tiny_model: OpenModel, prompts: list[list[int]]) -> Iterator[tuple[list[tuple[int, ...]], F32]]:
    runner = TorchRunner(tiny_model.spec, tiny_model.checkpoint, block_tokens=BLOCK, num_blocks=BLOCKS, threads=1)
    deltas = run_prompts(make_engine(runner, WAY), tiny_model.tokenizer, prompts, GREEDY, WAY)
    yield [delta.token_ids for delta in deltas], logits(runner, LONG)
    runner.close()


def kill_within_a_step(runner: TensorParallelRunner) -> None:
    """The last rank stops, the step waits for its share of a sum, and it is gone."""
    victim = runner.group.links[-1]
    process = victim.process
    process.send_signal(signal.SIGSTOP)
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    begin = time.monotonic()
    says = rf"{victim.name} \(process {process.pid}\) has failed: signal 9 ended it.*KV it held is lost"
    with pytest.raises(StepFailed, match=says):
        logits(runner, LONG)
    assert 0.2 < time.monotonic() - begin < 5
    with pytest.raises(StepFailed, match="Restart the engine"):
        logits(runner, LONG)
    killer.join()


@pytest.mark.parametrize(
    "option",
    [
        ParallelOption(2, "star"),
        ParallelOption(4, "ring", window_blocks=2),  # KV heads on two ranks each
    ],
)
def test_tokens_are_those_of_one_process_and_no_rank_sees_them(
    option: ParallelOption, tiny_model: OpenModel, prompts: list[list[int]],
    plain: tuple[list[tuple[int, ...]], F32], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sent: list[tuple[int, bytes]] = []
    send = PortChannel.send

    def recorded(self: PortChannel, kind: int, *parts: object, layer: int = 0, count: int = 0) -> None:
        sent.append((kind, b"".join(np.ascontiguousarray(p).tobytes() if isinstance(p, np.ndarray) else bytes(p)  # type: ignore[call-overload]
                                    for p in parts)))  # fmt: skip
        send(self, kind, *parts, layer=layer, count=count)  # type: ignore[arg-type]

    monkeypatch.setattr(PortChannel, "send", recorded)
    runner = open_ranks(tiny_model, option)
    try:
        found = logits(runner, LONG)
        assert np.abs(found - plain[1]).max() <= 1e-4 * np.abs(plain[1]).max()
        assert (logits(runner, LONG) == found).all(), "a fixed order of additions"
        deltas = run_prompts(make_engine(runner, WAY), tiny_model.tokenizer, prompts, GREEDY, WAY)
        assert [delta.token_ids for delta in deltas] == plain[0]
        for link in runner.group.links:
            report = link.stats()
            assert not [name for name in report.tensors if not name.startswith("layers.")], "no embedding, no head"
            assert (report.read_bytes > 0) == (option.window_blocks > 0)
        assert {kind for kind, _ in sent} == {HELLO, wire.STEP, wire.SUM, wire.STATS}
        runs = [LONG[:3], *(np.array(prompt[:3]) for prompt in prompts if len(prompt) > 2)]
        for ids in runs:
            for width in (np.int16, np.int32, np.int64):
                needle = ids.astype(width).tobytes()
                assert not [kind for kind, payload in sent if needle in payload]
    finally:
        runner.close()
    assert {link.process.poll() for link in runner.group.links[:-1]} <= {0, 1}, "they ended by themselves"


def test_ranks_end_when_the_engine_is_killed_and_stay_through_an_interrupt(tiny: Path) -> None:
    text = """
import sys, time
from megalith.engine.parallel.option import ParallelOption
from megalith.engine.parallel.runner import TensorParallelRunner
from megalith.model.open import open_model
model = open_model(sys.argv[1])
runner = TensorParallelRunner(
    model.checkpoint, model.files.path, ParallelOption(2), dtype="float32", block_tokens=4, num_blocks=8, threads=1)
print(runner.group.links[0].process.pid, flush=True)
time.sleep(60)
"""
    engine = subprocess.Popen([sys.executable, "-c", text, str(tiny)], stdout=subprocess.PIPE, text=True)
    try:
        assert engine.stdout is not None
        rank = int(engine.stdout.readline())
        os.kill(rank, signal.SIGINT)
        time.sleep(0.2)
        assert _alive(rank)
    finally:
        engine.kill()
        engine.communicate()
    until = time.monotonic() + 10
    while time.monotonic() < until and _alive(rank):
        time.sleep(0.02)
    assert not _alive(rank)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rank_that_cannot_start_leaves_nobody_behind(tiny_model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    init = group.RankLink.__init__

    def noted(self: group.RankLink, *arguments: object) -> None:
        setup = arguments[0]
        assert isinstance(setup, wire.RankSetup)
        gone = wire.RankSetup(**{**{f: getattr(setup, f) for f in setup.__struct_fields__}, "model": "/no/such/model"})
        init(self, gone, *arguments[1:])  # type: ignore[arg-type]
        started.append(self.process)

    monkeypatch.setattr(group.RankLink, "__init__", noted)
    with pytest.raises(MachineError, match=r"Rank 1 of 2 did not start: .*ModelNotFound"):
        open_ranks(tiny_model, ParallelOption(2))
    assert [process.poll() for process in started] == [1]
