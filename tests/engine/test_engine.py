"""The engine on an exact model: every way of scheduling a request gives the tokens that it gets alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megalith.base.clock import MonotonicClock
from megalith.base.errors import PromptTooLong, StepFailed
from megalith.engine.api import Delta
from megalith.engine.engine import Engine
from megalith.engine.params import SamplingParams
from megalith.engine.sequence import Admitted
from megalith.policy.batching import by_name
from megalith.policy.facts import PreemptMode
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from tests.engine.ledger import EOS, LedgerRunner, Letters, text_of


@dataclasses.dataclass
class Setup:
    policy: str = "splitfuse"
    budget: int = 16
    blocks: int = 64
    sequences: int = 8
    preempt: PreemptMode = "recompute"
    prefix: bool = True
    block_tokens: int = 4

    def engine(self) -> Engine:
        host = self.blocks if self.preempt == "swap" else 0
        runner = LedgerRunner(97, self.block_tokens, self.blocks, host)
        kv = KvAccount(self.blocks, self.block_tokens, host, self.prefix)
        limits = Limits(max_sequences=self.sequences, preempt=self.preempt)
        return Engine(runner, Scheduler(by_name(self.policy, self.budget), kv, limits), MonotonicClock(), salt=1)


def admit(engine: Engine, number: int, prompt: list[int], params: SamplingParams, priority: int = 0) -> None:
    new, seed = params.max_tokens or 16, params.seed if params.seed is not None else number
    ids = np.array(prompt, np.int32)
    engine.add(Admitted(number, ids, params, new, seed, frozenset({EOS}), Letters(), None, priority, number))


def run(engine: Engine, most_steps: int = 20_000) -> dict[int, list[Delta]]:
    deltas: dict[int, list[Delta]] = {}
    for _ in range(most_steps):
        if not engine.has_work:
            break
        for number, delta in engine.step():
            deltas.setdefault(number, []).append(delta)
    assert not engine.has_work, "the engine does not come to an end"
    engine.scheduler.check_integrity()
    assert engine.stats().kv_blocks_used == 0
    return deltas


def outcome(deltas: list[Delta]) -> tuple[str, tuple[int, ...], object, object]:
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    last = deltas[-1]
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    assert last.completion_tokens == len(tokens)
    return "".join(delta.text for delta in deltas), tokens, last.finish_reason, last.stop_reason


def alone(prompt: list[int], params: SamplingParams, number: int) -> tuple[str, tuple[int, ...], object, object]:
    engine = Setup(budget=256, sequences=1, prefix=False).engine()
    admit(engine, number, prompt, params)
    return outcome(run(engine)[number])


tokens = st.integers(3, 96)
prompts = st.one_of(
    st.lists(tokens, min_size=1, max_size=40),
    st.tuples(st.just([7, 8, 9, 10] * 5), st.lists(tokens, min_size=1, max_size=12)).map(lambda p: p[0] + p[1]),
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {5: 4.0, 96: -100.0}]),
    max_tokens=st.integers(1, 40),
    min_tokens=st.sampled_from([0, 0, 5]),
    ignore_eos=st.booleans(),
    stop=st.sampled_from([(), (text_of([50]),), (text_of([9, 10]), text_of([33]))]),
    stop_token_ids=st.sampled_from([(), (60, 61)]),
)
setups = st.builds(
    Setup,
    policy=st.sampled_from(["splitfuse", "prefill-first", "first-come"]),
    budget=st.sampled_from([3, 8, 64]),
    blocks=st.sampled_from([21, 30, 100]),
    sequences=st.sampled_from([1, 3, 8]),
    preempt=st.sampled_from(["recompute", "swap"]),
    prefix=st.booleans(),
)


@settings(
    max_examples=120,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(setups, st.lists(st.tuples(prompts, params, st.integers(0, 1), st.integers(0, 6)), min_size=1, max_size=8))
def test_a_request_gets_the_same_tokens_however_it_is_scheduled(
    setup: Setup, requests: list[tuple[list[int], SamplingParams, int, int]]
) -> None:
    engine = setup.engine()
    deltas: dict[int, list[Delta]] = {}
    for number, (prompt, sampling, priority, steps_before) in enumerate(requests):
        for _ in range(steps_before):
            for owner, delta in engine.step():
                deltas.setdefault(owner, []).append(delta)
        admit(engine, number, prompt, sampling, priority)
    for number, more in run(engine).items():
        deltas.setdefault(number, []).extend(more)
    for number, (prompt, sampling, _, _) in enumerate(requests):
        assert outcome(deltas[number]) == alone(prompt, sampling, number)


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_preemption_really_happens_and_changes_nothing(preempt: PreemptMode) -> None:
    setup = Setup(blocks=24, preempt=preempt, sequences=6)
    engine = setup.engine()
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    requests = {n: [n + 3] * (5 + n) for n in range(6)}
    for number, prompt in requests.items():
        admit(engine, number, prompt, sampling)
    deltas = run(engine)
    counters = engine.scheduler.counters
    assert (counters.preempted_swap if preempt == "swap" else counters.preempted_recompute) > 0
    for number, prompt in requests.items():
        assert outcome(deltas[number]) == alone(prompt, sampling, number)


def test_prefix_hits_skip_work_also_over_generated_blocks() -> None:
    engine = Setup(blocks=200).engine()
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    first = list(range(10, 31))
    admit(engine, 0, first, sampling)
    answer = outcome(run(engine)[0])[1]
    follow_up = [*first, *answer, 40, 41]
    admit(engine, 1, follow_up, sampling)
    deltas = run(engine)[1]
    # All full blocks of prompt and answer but the last: the final token was never computed.
    assert deltas[0].cached_tokens == (len(first) + len(answer) - 1) // 4 * 4
    assert outcome(deltas) == alone(follow_up, sampling, 1)
    assert engine.stats().prefix_hits_tokens == deltas[0].cached_tokens


def test_a_failing_request_ends_alone() -> None:
    engine = Setup(sequences=8, budget=64).engine()
    assert isinstance(engine.runner, LedgerRunner)
    engine.runner.poison = 1
    sampling = SamplingParams(temperature=0, max_tokens=20)
    good = {n: [10 + n, 20] for n in (0, 1, 2, 4, 5, 6)}
    for number in range(7):
        admit(engine, number, good.get(number, [11, 1, 12]), sampling)
    deltas = run(engine)
    assert [d.finish_reason for d in deltas[3]] == ["error"]
    assert "Token 1 cannot be computed" in str(deltas[3][0].error)
    for number, prompt in good.items():
        assert outcome(deltas[number]) == alone(prompt, sampling, number)
    assert engine.stats().healthy
    assert engine.stats().finished["error"] == 1


def test_a_request_that_fails_in_the_middle_of_repeated_decodes_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Setup(sequences=8, budget=64).engine()
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for number in range(5):
        admit(engine, number, [10 + number, 20], sampling)
    deltas: dict[int, list[Delta]] = {}
    for count in range(200):
        if count == 9:
            victim = engine._sequences[3]
            monkeypatch.setattr(victim, "text", BrokenText())
        if count == 15:
            assert isinstance(engine.runner, LedgerRunner)
            engine.runner.poison = int(engine._sequences[1].tokens[engine._sequences[1].length - 1])
        for number, delta in engine.step():
            deltas.setdefault(number, []).append(delta)
        if count == 15:
            engine.runner.poison = None
    assert deltas[3][-1].finish_reason == "error"
    assert deltas[1][-1].finish_reason == "error"
    for number in (0, 2, 4):
        assert outcome(deltas[number]) == alone([10 + number, 20], sampling, number)
    engine.scheduler.check_integrity()
    assert engine.stats().kv_blocks_used == 0


class BrokenText:
    def push(self, token: int, *, check_stops: bool = True) -> str:
        raise StepFailed("no text today")

    def finish(self) -> str:
        raise StepFailed("no text today")


def test_when_everything_fails_the_engine_says_so_and_recovers() -> None:
    engine = Setup().engine()
    assert isinstance(engine.runner, LedgerRunner)
    engine.runner.poison = 9
    for number in range(4):
        admit(engine, number, [9], SamplingParams())
        run(engine)
    assert not engine.stats().healthy
    assert "Token 9" in engine.stats().detail
    engine.runner.poison = None
    admit(engine, 9, [9], SamplingParams())
    assert run(engine)[9][-1].finish_reason in ("stop", "length")
    assert engine.stats().healthy


def test_abort_frees_blocks_before_the_next_step() -> None:
    engine = Setup().engine()
    for number in range(3):
        admit(engine, number, [5] * 20, SamplingParams(max_tokens=50, ignore_eos=True))
    for _ in range(6):
        engine.step()
    used = engine.stats().kv_blocks_used
    last = engine.abort(1)
    assert last is not None
    assert last.finish_reason == "abort"
    assert engine.stats().kv_blocks_used < used
    assert engine.abort(1) is None
    assert set(run(engine)) == {0, 2}


def test_prompt_logprobs_are_those_of_each_prompt_token() -> None:
    engine = Setup(budget=5, blocks=30, sequences=2, preempt="recompute").engine()
    prompt = list(range(10, 33))
    sampling = SamplingParams(temperature=0, max_tokens=30, prompt_logprobs=True, logprobs=2, ignore_eos=True)
    admit(engine, 0, prompt, sampling)
    admit(engine, 1, [40] * 30, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    deltas = run(engine)[0]
    scores = deltas[0].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert [s.token_id for s in scores[1:] if s is not None] == prompt[1:]
    assert all(delta.prompt_logprobs is None for delta in deltas[1:])
    fresh = LedgerRunner()
    from megalith.engine.batch import StepBatch

    rows = np.arange(len(prompt), dtype=np.int32)
    logits = fresh.logits(
        StepBatch(
            np.array(prompt, np.int32),
            rows,
            np.array([0, len(prompt)], np.int32),
            np.arange(8, dtype=np.int32)[None],
            rows,
        )
    )
    for i, score in enumerate(scores[1:]):
        assert score is not None
        row = logits[i].astype(np.float64)
        expected = row - np.log(np.exp(row).sum())
        assert score.logprob == pytest.approx(expected[prompt[i + 1]], abs=1e-5)
        assert [token for token, _ in score.top] == np.argsort(-row)[:2].tolist()
    for delta in deltas:
        assert delta.logprobs is not None
        assert delta.logprobs[0].logprob == pytest.approx(delta.logprobs[0].top[0][1])


def test_min_tokens_holds_off_every_end() -> None:
    engine = Setup().engine()
    assert isinstance(engine.runner, LedgerRunner)
    engine.runner.eos_every = 1
    admit(engine, 0, [5], SamplingParams(temperature=0, max_tokens=20, min_tokens=7))
    text, tokens, reason, _ = outcome(run(engine)[0])
    assert (len(tokens), tokens[-1], reason, len(text)) == (8, EOS, "stop", 7)


def test_what_can_never_fit_is_refused() -> None:
    engine = Setup(blocks=5).engine()
    with pytest.raises(PromptTooLong, match="6 KV blocks"):
        admit(engine, 0, [5] * 20, SamplingParams(max_tokens=2))
    assert not engine.has_work
