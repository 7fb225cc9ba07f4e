"""The shadow test: what the live engine decided, decided again by fresh policy objects, call by call."""

from __future__ import annotations

import asyncio
import gzip
import random
import re
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalith.base.clock import ManualClock, MonotonicClock
from megalith.base.errors import ConfigError, QueueFull
from megalith.engine import engine as engine_module
from megalith.engine.api import EngineConfig
from megalith.engine.engine import Engine
from megalith.engine.launch import build_engine
from megalith.engine.params import SamplingParams
from megalith.engine.record import RecordingScheduler
from megalith.engine.sequence import Admitted
from megalith.engine.torch_runner import TorchRunner
from megalith.model.open import OpenModel
from megalith.policy.batching import POLICY_NAMES, by_name
from megalith.policy.facts import PreemptMode, Request
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.sim.shadow import ShadowReport, replay
from tests.engine.ledger import LedgerRunner

BUDGET = 24
BLOCKS = 22
"""Of 4 tokens: room for about two requests, so that there is preemption."""


def scheduler(path: Path, policy: str, preempt: PreemptMode = "recompute", blocks: int = BLOCKS) -> RecordingScheduler:
    kv = KvAccount(blocks, 4, blocks if preempt == "swap" else 0, True, watermark_blocks=1)
    limits = Limits(max_sequences=6, max_waiting=24, preempt=preempt)
    return RecordingScheduler(by_name(policy, BUDGET), kv, limits, MonotonicClock(), path, "tiny")


def live_run(engine: Engine, model: OpenModel, seed: int, count: int = 30) -> None:
    """Requests of all kinds with real tokens, coming and being aborted between steps; some share a prefix."""
    choose = random.Random(seed)
    eos = model.tokenizer.eos_ids
    prefix = [choose.randrange(3, 90) for _ in range(24)]
    number = 0
    for _ in range(20_000):
        if number < count and choose.random() < 0.2:
            ids = prefix[: choose.randrange(25)] + [choose.randrange(3, 90) for _ in range(choose.randrange(1, 20))]
            new = choose.randrange(1, 40)
            params = SamplingParams(temperature=0.8, max_tokens=new)
            prompt = np.array(ids, np.int32)
            stream, priority = model.tokenizer.stream(), choose.choice([0, 0, 0, 1])
            engine.add(Admitted(number, prompt, params, new, number, eos, stream, None, priority, 10 * number))
            number += 1
        if number and choose.random() < 0.02:
            engine.abort(choose.randrange(number))
        engine.step()
        if number == count and not engine.has_work:
            break
    assert not engine.has_work
    engine.scheduler.check_integrity()
    assert isinstance(engine.scheduler, RecordingScheduler)
    engine.scheduler.close()


def recorded(path: Path, model: OpenModel) -> bytes:
    """A log of a run on a runner whose tokens are hashes."""
    live_run(Engine(LedgerRunner(300, 4, BLOCKS), scheduler(path, "splitfuse"), MonotonicClock(), salt=7), model, 3)
    return path.read_bytes()


def recorded_llama(path: Path, model: OpenModel, policy: str, preempt: PreemptMode) -> ShadowReport:
    """A run on the tiny Llama, recorded and replayed."""
    runner = TorchRunner(
        model.spec, model.checkpoint, device="cpu", dtype="float32", block_tokens=4, num_blocks=BLOCKS,
        num_host_blocks=BLOCKS if preempt == "swap" else 0, threads=1,
    )  # fmt: skip
    engine = Engine(runner, scheduler(path, policy, preempt), MonotonicClock(), salt=7)
    live_run(engine, model, seed=3)
    runner.close()
    assert engine.stats().steps > 100
    return replay(path)


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_fresh_policy_objects_decide_as_the_live_ones_did(
    tmp_path: Path, tiny_model: OpenModel, policy: str, preempt: PreemptMode
) -> None:
    path = tmp_path / "log.jsonl"
    report = recorded_llama(path, tiny_model, policy, preempt)
    assert report.identical, str(report)
    assert report.complete
    assert report.calls["add"] == 30
    assert min(report.calls[kind] for kind in ("plan", "again", "complete", "abort", "seal")) > 0
    assert report.prefix_hit_tokens > 0
    if policy != "first-come":  # whose batches are static: what was admitted together mostly fits
        assert report.preemptions > 0
    assert "identical" in str(report)
    # The controls: a smaller budget and each other policy must be caught.
    smaller = replay(path, token_budget=BUDGET - 1 if policy == "splitfuse" else BUDGET // 4)
    assert not smaller.identical
    assert "first difference is in line" in str(smaller)
    for other in set(POLICY_NAMES) - {policy}:
        assert not replay(path, policy=other).identical, other


def test_one_changed_answer_is_found_where_it_is(tmp_path: Path, tiny_model: OpenModel) -> None:
    path = tmp_path / "log.jsonl"
    lines = recorded(path, tiny_model).splitlines(keepends=True)
    number, old, new = next(
        (i, line, line.replace(b",true]]", b",false]]"))
        for i, line in enumerate(lines)
        if i > 100 and line.startswith(b'["plan"') and b",true]]" in line
    )
    path.write_bytes(b"".join([*lines[:number], new, *lines[number + 1 :]]))
    difference = replay(path).difference
    assert difference is not None
    assert difference.line == number + 1
    assert difference.call == "plan"
    assert "no logits" in difference.recorded
    assert "no logits" not in difference.replayed
    assert len(difference.before) == 6
    assert old != new


def test_a_hidden_input_is_caught(tmp_path: Path, tiny_model: OpenModel) -> None:
    """The control of the whole idea: a policy that reads more than its facts does not replay."""

    class Moody:
        name = "splitfuse"

        def __init__(self) -> None:
            self.asked = 0

        def shape(self, facts: Any) -> Any:
            self.asked += 1
            return by_name("splitfuse", BUDGET if self.asked % 10 else BUDGET // 4).shape(facts)

    path = tmp_path / "log.jsonl"
    runner = LedgerRunner(300, 4, BLOCKS)
    kv, limits = KvAccount(BLOCKS, 4, 0, True), Limits(max_sequences=6, max_waiting=64)
    moody = RecordingScheduler(Moody(), kv, limits, MonotonicClock(), path)
    live_run(Engine(runner, moody, MonotonicClock(), salt=7), tiny_model, seed=4)
    assert not replay(path).identical


def use(path: Path, model: Path, work: Callable[[Any], Any], **changes: Any) -> None:
    settings = {"model": str(model), "mode": "float32", "num_blocks": 40, "threads": 1, "block_tokens": 4}
    config = EngineConfig(**{**settings, "token_budget": 32, "max_sequences": 8, "record": str(path), **changes})

    async def main() -> None:
        built = build_engine(config)
        await built.engine.start()
        try:
            await asyncio.wait_for(work(built.engine), 120)
        finally:
            await built.engine.stop()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_the_service_under_concurrent_requests(tmp_path: Path, tiny: Path, name: str) -> None:
    async def work(engine: Any) -> None:
        choose = random.Random(1)
        prefix = [choose.randrange(3, 290) for _ in range(30)]

        async def one(number: int) -> int:
            await asyncio.sleep(choose.random() * 0.2)
            prompt = prefix[: choose.randrange(31)] + [choose.randrange(3, 290) for _ in range(choose.randrange(1, 30))]
            params = SamplingParams(temperature=1.0, seed=number, max_tokens=choose.randrange(1, 60))
            count = 0
            async with aclosing(engine.generate(prompt, params, priority=int(number % 7 == 0))) as stream:
                async for delta in stream:
                    count += len(delta.token_ids)
                    if number % 5 == 0 and count > 8:
                        break  # the client goes away: an abort
            return count

        counts = await asyncio.gather(*[one(number) for number in range(48)])
        assert min(counts) > 0

    path = tmp_path / name
    use(path, tiny, work)
    with pytest.raises(ConfigError, match="exists already"):
        use(path, tiny, work)
    report = replay(path)
    assert report.identical, str(report)
    assert report.complete
    assert report.calls["add"] == 48
    assert report.calls["abort"] > 0
    assert report.preemptions > 0
    assert not replay(path, token_budget=31).identical
    text = (gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()).decode()
    assert text.splitlines()[0].startswith('{"log_version":1,"megalith"')
    assert text.splitlines()[-1].startswith('["end"')


def test_refusals_are_part_of_the_record(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    live = RecordingScheduler(
        by_name("splitfuse", 8), KvAccount(8, 4), Limits(max_sequences=1, max_waiting=1), ManualClock(5), path
    )
    live.add(Request(1, 0, 4, 4))
    with pytest.raises(QueueFull):
        live.add(Request(2, 0, 4, 4))
    with pytest.raises(ValueError, match="here already"):
        live.add(Request(1, 0, 4, 4))
    live.close()
    assert replay(path).identical
    path.write_bytes(path.read_bytes().replace(b"QueueFull", b"PromptTooLong"))
    assert "recorded: PromptTooLong\n  replayed: QueueFull" in str(replay(path))


def test_a_log_that_was_cut_off_replays_as_far_as_it_goes(tmp_path: Path, tiny_model: OpenModel) -> None:
    path = tmp_path / "log.jsonl"
    whole = recorded(path, tiny_model)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    report = replay(path)
    assert report.identical
    assert not report.complete
    assert "no end" in str(report)
    squeezed = tmp_path / "cut.jsonl.gz"
    squeezed.write_bytes(gzip.compress(whole)[: len(gzip.compress(whole)) // 2])
    assert replay(squeezed).identical
    path.write_bytes(whole.replace(b'["again"', b'["agai', 1))
    with pytest.raises(ConfigError, match="damaged"):
        replay(path)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        replay(tmp_path / "none.jsonl")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"requests": 3}\n')
    with pytest.raises(ConfigError, match="no decision log"):
        replay(wrong)
    live = scheduler(tmp_path / "log.jsonl", "splitfuse")
    live.close()
    live.close()
    with pytest.raises(ConfigError, match="exists already"):
        scheduler(tmp_path / "log.jsonl", "splitfuse")
    with pytest.raises(ConfigError, match="cannot be made"):
        scheduler(tmp_path / "no" / "log.jsonl", "splitfuse")
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"log_version":1', b'"log_version":9'))
    with pytest.raises(ConfigError, match="version 9"):
        replay(log)


def test_a_full_log_ends_and_the_engine_goes_on(tmp_path: Path, tiny_model: OpenModel) -> None:
    path = tmp_path / "log.jsonl"
    live = scheduler(path, "splitfuse")
    live._record._max_bytes = 20_000
    live_run(Engine(LedgerRunner(300, 4, BLOCKS), live, MonotonicClock(), salt=7), tiny_model, seed=3)
    assert path.stat().st_size < 21_000
    assert b'"full"' in path.read_bytes().splitlines()[-1]
    assert replay(path).identical


def test_recording_costs_little_and_nothing_when_off(tmp_path: Path) -> None:
    """Processor time of the scheduler's part of a step of 8 decodes, with and without a recorder."""

    def step_ns(live: Scheduler) -> float:
        for number in range(8):
            live.add(Request(number, 0, 8, 2000))
        begin_ns, steps = 0, 0
        plan = None
        while steps < 1500:
            if steps == 50:
                begin_ns = time.thread_time_ns()
            if plan is None or not live.again(plan):
                plan = live.plan()
                assert plan.chunks
            live.complete(plan)
            steps += 1
        if isinstance(live, RecordingScheduler):
            live.close()
        return (time.thread_time_ns() - begin_ns) / (steps - 50)

    def plain() -> Scheduler:
        return Scheduler(by_name("splitfuse", 64), KvAccount(5000, 4), Limits(max_sequences=8))

    def recording(name: str) -> Scheduler:
        kv, limits = KvAccount(5000, 4), Limits(max_sequences=8)
        return RecordingScheduler(by_name("splitfuse", 64), kv, limits, MonotonicClock(), tmp_path / name)

    off = min(step_ns(plain()) for _ in range(3))
    on = min(step_ns(recording(f"{i}.jsonl")) for i in range(3))
    print(f"a step of the scheduler: {off / 1e3:.2f} us, recorded {on / 1e3:.2f} us")
    assert on - off < 10_000


def test_every_call_of_the_engine_is_recorded() -> None:
    sources = "".join([path.read_text() for path in Path(engine_module.__file__).parent.glob("*.py")])
    called = set(re.findall(r"scheduler\.([a-z_]+)\(", sources)) & set(vars(Scheduler))
    reading = {"valid", "block_table", "progress", "unsealed", "check_integrity"}
    assert {"add", "plan", "complete"} <= called
    assert called - reading <= set(vars(RecordingScheduler))
