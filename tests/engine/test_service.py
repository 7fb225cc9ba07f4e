"""The asyncio face of the engine: delivery, aborts, limits, drain and stop, and a soak that must lose nothing."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

from megalith.base.clock import MonotonicClock
from megalith.base.errors import EngineStopped, PromptTooLong, QueueFull, RequestError
from megalith.base.units import NS_PER_S
from megalith.engine.admission import Admission
from megalith.engine.api import Delta, EngineConfig
from megalith.engine.batch import SamplingBatch, StepBatch, StepResult
from megalith.engine.engine import Engine
from megalith.engine.grammar import GrammarCompiler
from megalith.engine.params import SamplingParams
from megalith.engine.service import LocalEngine, merge
from megalith.policy.batching import by_name
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from megalith.specs.model import ModelSpec
from tests.engine.ledger import EOS, LedgerRunner, Letters, text_of

SPEC = ModelSpec(
    name="ledger", family="llama", num_layers=1, hidden=1, num_heads=1, num_kv_heads=1, head_dim=1, ffn=1, vocab=97,
    max_context=256,
)  # fmt: skip


class Paced(LedgerRunner):
    """Takes `pace_s` a step and can be told to break for good or to hang until released."""

    pace_s = 0.0
    broken: BaseException | None = None
    hold: threading.Event | None = None

    def step(self, batch: StepBatch, sampling: SamplingBatch) -> StepResult:
        if self.hold is not None:
            self.hold.wait(20)
        if self.broken is not None:
            raise self.broken
        if self.pace_s:
            time.sleep(self.pace_s)
        return super().step(batch, sampling)


def build(blocks: int = 120, *, max_waiting: int = 64, preempt: str = "recompute", context: int = 256) -> LocalEngine:
    config = EngineConfig(model="ledger", max_waiting=max_waiting, preempt=preempt)  # type: ignore[arg-type]
    runner = Paced(97, 4, blocks, blocks if preempt == "swap" else 0)
    kv = KvAccount(blocks, 4, runner.num_host_blocks)
    limits = Limits(max_sequences=16, max_waiting=max_waiting + 32, preempt=config.preempt)
    clock = MonotonicClock()
    core = Engine(runner, Scheduler(by_name("splitfuse", 32), kv, limits), clock)
    eos = frozenset({EOS})
    admission = Admission(
        max_context=min(context, blocks * 4), vocab=97, eos_ids=eos, new_stream=Letters,
        grammars=GrammarCompiler(lambda: "{}", 97, eos),
    )  # fmt: skip
    return LocalEngine(core, admission, config, SPEC, clock)


def go(use: Callable[[LocalEngine], Awaitable[None]], **options: int | str) -> None:
    """Run `use` on a started engine, then stop it and check that nothing is left."""

    async def main() -> None:
        engine = build(**options)  # type: ignore[arg-type]
        await engine.start()
        try:
            await asyncio.wait_for(use(engine), 60)
        finally:
            await engine.stop()
        engine._core.scheduler.check_integrity()
        assert engine.stats().kv_blocks_used == 0
        assert not engine._streams

    asyncio.run(main())


async def read(engine: LocalEngine, prompt: list[int], params: SamplingParams) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt, params)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for the step thread to get there; go() has the deadline."""
    while not condition():
        await asyncio.sleep(0.01)


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_one_request_streams_to_its_end() -> None:
    async def use(engine: LocalEngine) -> None:
        deltas = await read(engine, [5, 6, 7], GREEDY)
        assert deltas[-1].finish_reason == "length"
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert len(tokens) == 12 == deltas[-1].completion_tokens
        assert "".join(delta.text for delta in deltas) == text_of(tokens)
        assert deltas == [merge([delta]) for delta in deltas]
        stats = engine.stats()
        assert (stats.finished, stats.generated_tokens, stats.prompt_tokens) == ({"length": 1}, 12, 3)

    go(use)


def test_seeds_give_the_same_tokens_in_any_company() -> None:
    async def use(engine: LocalEngine) -> None:
        seeded = SamplingParams(temperature=1, seed=42, max_tokens=20, ignore_eos=True)
        alone = merge(await read(engine, [9, 8], seeded)).token_ids
        crowd = [read(engine, [9, 8 + i], SamplingParams(max_tokens=20)) for i in range(10)]
        again, *_ = await asyncio.gather(read(engine, [9, 8], seeded), *crowd)
        assert merge(again).token_ids == alone
        free = SamplingParams(temperature=1, max_tokens=20, ignore_eos=True)
        first, second = await asyncio.gather(read(engine, [9, 8], free), read(engine, [9, 8], free))
        assert merge(first).token_ids != merge(second).token_ids

    go(use)


def test_closing_the_iterator_frees_its_blocks_before_the_next_step() -> None:
    async def use(engine: LocalEngine) -> None:
        assert isinstance(engine._core.runner, Paced)
        engine._core.runner.pace_s = 0.01
        async with aclosing(engine.generate([5] * 50, SamplingParams(max_tokens=200, ignore_eos=True))) as stream:
            async for _ in stream:
                break
        steps = engine.stats().steps
        await until(lambda: engine.stats().kv_blocks_used == 0)
        assert engine.stats().finished == {"abort": 1}
        # The step that ran when the iterator was closed may end; none begins with the request in it.
        assert engine.stats().steps <= steps + 1

    go(use)


def test_a_cancelled_reader_aborts_its_request() -> None:
    async def use(engine: LocalEngine) -> None:
        assert isinstance(engine._core.runner, Paced)
        engine._core.runner.pace_s = 0.005
        task = asyncio.create_task(read(engine, [5] * 30, SamplingParams(max_tokens=200, ignore_eos=True)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().finished == {"abort": 1})

    go(use)


def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    async def use(engine: LocalEngine) -> None:
        assert isinstance(engine._core.runner, Paced)
        engine._core.runner.pace_s = 0.05
        tasks = [asyncio.create_task(read(engine, [5, i + 3], GREEDY)) for i in range(40)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFull)]
        assert refused
        assert all(1 <= error.retry_after_s <= 60 for error in refused)
        assert "limit is 8" in str(refused[0])
        assert len(refused) + engine.stats().finished["length"] == 40

    go(use, max_waiting=8)


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "words"),
    [
        ([], GREEDY, RequestError, "empty"),
        ([5] * 300, GREEDY, PromptTooLong, "300 tokens"),
        ([5] * 250, GREEDY, PromptTooLong, "make 262"),
        ([5, 97], GREEDY, RequestError, "token id 97"),
        ([5], SamplingParams(logit_bias={200: 1.0}), RequestError, "logit_bias holds token id 200"),
        ([5], SamplingParams(max_tokens=3, min_tokens=4), RequestError, "min_tokens is 4"),
    ],
)
def test_impossible_requests_are_refused_with_numbers(
    prompt: list[int], params: SamplingParams, kind: type[RequestError], words: str
) -> None:
    async def use(engine: LocalEngine) -> None:
        with pytest.raises(kind, match=words) as caught:
            await read(engine, prompt, params)
        assert caught.value.param
        assert engine.stats().waiting == 0

    go(use)


def test_without_max_tokens_the_context_is_the_limit() -> None:
    async def use(engine: LocalEngine) -> None:
        last = (await read(engine, [5] * 10, SamplingParams(temperature=0, ignore_eos=True)))[-1]
        assert (last.finish_reason, last.completion_tokens) == ("length", 246)

    go(use)


def test_a_reader_that_sleeps_gets_everything_at_once_and_holds_nobody_up() -> None:
    async def use(engine: LocalEngine) -> None:
        stream = engine.generate([5, 6], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, logprobs=1))
        first = await anext(stream)
        await read(engine, [7, 8], GREEDY)
        while engine.stats().running:
            await asyncio.sleep(0.01)
        rest = [delta async for delta in stream]
        assert len(rest) == 1
        whole = merge([first, *rest])
        assert len(whole.token_ids) == 100
        assert whole.logprobs is not None
        assert tuple(entry.token_id for entry in whole.logprobs) == whole.token_ids

    go(use)


def test_drain_lets_requests_finish_and_refuses_new_ones() -> None:
    async def use(engine: LocalEngine) -> None:
        task = asyncio.create_task(read(engine, [5], GREEDY))
        await asyncio.sleep(0.01)
        draining = asyncio.create_task(engine.drain(20 * NS_PER_S))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped):
            await read(engine, [5], GREEDY)
        await draining
        assert (await task)[-1].finish_reason == "length"

    go(use)


def test_drain_aborts_what_is_not_done_in_time() -> None:
    async def use(engine: LocalEngine) -> None:
        assert isinstance(engine._core.runner, Paced)
        engine._core.runner.pace_s = 0.02
        long = SamplingParams(max_tokens=200, ignore_eos=True)
        tasks = [asyncio.create_task(read(engine, [5, i + 3], long)) for i in range(20)]
        await asyncio.sleep(0.1)
        await engine.drain(NS_PER_S // 10)
        assert {(await task)[-1].finish_reason for task in tasks} == {"abort"}

    go(use)


def test_stop_is_idempotent_ends_readers_and_restores_the_switch_interval() -> None:
    before = sys.getswitchinterval()

    async def use(engine: LocalEngine) -> None:
        assert sys.getswitchinterval() < before
        task = asyncio.create_task(read(engine, [5], SamplingParams(max_tokens=250, ignore_eos=True)))
        await asyncio.sleep(0.005)
        await engine.stop()
        assert (await task)[-1].finish_reason in ("abort", "length")
        await engine.stop()
        with pytest.raises(EngineStopped):
            await engine.start()

    go(use)
    assert sys.getswitchinterval() == before


def test_stop_does_not_wait_for_ever_on_a_step_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalith.engine.service._STOP_WAIT_S", 0.2)

    async def main() -> None:
        engine = build()
        assert isinstance(engine._core.runner, Paced)
        engine._core.runner.hold = threading.Event()
        await engine.start()
        task = asyncio.create_task(read(engine, [5], GREEDY))
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        await engine.stop()
        assert time.monotonic() - begin < 5
        assert (await task)[-1].finish_reason == "abort"
        engine._core.runner.hold.set()

    asyncio.run(main())


def test_a_broken_loop_fails_its_requests_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(engine: LocalEngine) -> None:
        def bug() -> None:
            raise ZeroDivisionError("a bug of ours")

        assert isinstance(engine._core.runner, Paced)
        engine._core.runner.pace_s = 0.01
        task = asyncio.create_task(read(engine, [5], SamplingParams(max_tokens=250, ignore_eos=True)))
        await until(lambda: engine.stats().generated_tokens > 0)
        monkeypatch.setattr(engine._core, "step", bug)
        last = (await task)[-1]
        assert last.finish_reason == "error"
        assert "a bug of ours" in str(last.error)
        assert not engine.stats().healthy
        with pytest.raises(EngineStopped, match="a bug of ours"):
            await read(engine, [5], GREEDY)
        engine._core.abort(1)  # the books of a failed engine are not tidied up by itself

    go(use)


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_soak_200_mixed_requests_lose_nothing(preempt: str) -> None:
    rng = random.Random(7)
    outcomes: dict[str, int] = {}

    async def one(engine: LocalEngine) -> None:
        prompt = [rng.randrange(3, 97) for _ in range(rng.choice([1, 3, 20, 60]))]
        if rng.random() < 0.4:
            prompt = [11, 12, 13, 14] * 6 + prompt
        if rng.random() < 0.05:
            prompt.append(1)  # breaks the step that computes it
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), max_tokens=rng.choice([1, 5, 30, 90]), top_p=rng.choice([1.0, 0.9]),
            frequency_penalty=rng.choice([0.0, 0.5]), ignore_eos=rng.random() < 0.5, min_tokens=rng.choice([0, 1]),
            logprobs=rng.choice([None, 3]), prompt_logprobs=rng.random() < 0.2, stop=rng.choice([(), (text_of([40]),)]),
        )  # fmt: skip
        await asyncio.sleep(rng.random() * 0.3)
        leave_after = rng.choice([None, None, None, 0, 3])
        count, finish = 0, "left"
        async with aclosing(engine.generate(prompt, params, priority=rng.choice([0, 0, 1]))) as stream:
            async for delta in stream:
                count += 1
                if delta.finish_reason is not None:
                    finish = delta.finish_reason
                elif leave_after is not None and count > leave_after:
                    break
                if rng.random() < 0.05:
                    await asyncio.sleep(0.02)
        outcomes[finish] = outcomes.get(finish, 0) + 1

    async def use(engine: LocalEngine) -> None:
        assert isinstance(engine._core.runner, Paced)
        engine._core.runner.poison = 1
        await asyncio.gather(*(one(engine) for _ in range(200)))
        assert sum(outcomes.values()) == 200
        assert outcomes["error"] >= 3
        await until(lambda: not engine._core.has_work)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.swapped, stats.kv_blocks_used) == (0, 0, 0, 0)
        assert stats.healthy
        assert stats.preemptions > 0
        assert sum(stats.finished.values()) == 200

    go(use, blocks=60, max_waiting=300, preempt=preempt)
