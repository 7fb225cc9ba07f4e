"""The engine: one step after another over a scheduler and a runner. Synchronous, single-threaded, no asyncio.

Knows sequences, plans and arrays; knows no text protocol, no clock but the one it is given, and no device. A failure
that belongs to one request ends that request; the others go on.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from megalith.base.clock import Clock
from megalith.base.errors import EngineError, MegalithError
from megalith.engine.api import Delta, EngineStats, FinishReason, TokenLogprob
from megalith.engine.assemble import Assembler, Output, StepInput
from megalith.engine.batch import Runner, StepResult
from megalith.engine.sequence import Admitted, Sequence
from megalith.policy.facts import Chunk, Preempt, Request, Resume, StepPlan
from megalith.policy.hashing import BlockHasher
from megalith.policy.scheduler import Scheduler

log = logging.getLogger(__name__)
_FAILED_STEPS = 3
"""Steps in a row in which every request failed, after which the engine calls itself unhealthy."""


class Emitted(NamedTuple):
    """One delta and whose it is."""

    request_id: int
    delta: Delta


class Engine:
    """One instance: add() and abort() between steps, step() until nothing is left.

    Not thread-safe. `salt` keys the prefix hashes (None: a fresh random one).
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, clock: Clock, salt: int | None = None) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self._clock = clock
        self._salt = secrets.randbits(64) if salt is None else salt
        self._sequences: dict[int, Sequence] = {}
        self._assembler = Assembler(self._sequences, scheduler.block_table, runner.block_tokens, runner.vocab)
        self._plan: StepPlan | None = None
        self._input: StepInput | None = None
        self._runs = 0
        """How often the current plan has run."""
        self._failed_steps = 0
        self._prompt_tokens = self._generated = self._steps = self._rows = self._step_ns = self._python_ns = 0
        self._finished: Counter[str] = Counter()
        self._detail = ""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences)

    def add(self, admitted: Admitted) -> None:
        """Queue a request. Raises PromptTooLong or QueueFull as the scheduler does."""
        size = self.runner.block_tokens
        shared = self.scheduler.kv.prefix_cache and not admitted.params.prompt_logprobs  # scoring needs every row
        hasher = BlockHasher(size, self._salt) if shared else None
        hashes = hasher.feed(admitted.prompt.tolist()) if hasher is not None else ()
        request = Request(
            admitted.id, admitted.arrival_ns, admitted.prompt.size, admitted.max_new, admitted.priority, hashes
        )  # fmt: skip
        self.scheduler.add(request)
        self._sequences[admitted.id] = Sequence(admitted, size, hasher)
        self._prompt_tokens += admitted.prompt.size

    def abort(self, request_id: int) -> Delta | None:
        """End a request now and free its KV; its last delta, or None when it is not here any more."""
        return self._end(request_id, "abort")

    def step(self) -> list[Emitted]:
        """Run one step and give what it emitted; an empty list when there is nothing to do."""
        begin_ns, runner_before_ns = self._clock.now_ns(), self._step_ns
        emitted: list[Emitted] = []
        plan = self._next_plan(emitted)
        if plan.chunks:
            finished: list[int] = []
            for step, result in self._execute(plan, emitted):
                tokens = result.tokens_N.tolist()
                for output in step.outputs:
                    self._take(output, tokens, result, emitted, finished)
            self.scheduler.complete(plan, finished)
            self._seal(plan)
            self._steps += 1
            self._rows += plan.num_tokens
        self._python_ns += self._clock.now_ns() - begin_ns - (self._step_ns - runner_before_ns)
        return emitted

    def stats(self) -> EngineStats:
        """Counters since start and gauges now."""
        scheduler, counters = self.scheduler, self.scheduler.counters
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            swapped=scheduler.num_swapped,
            kv_blocks_used=scheduler.kv.used_blocks,
            kv_blocks_total=scheduler.kv.num_blocks,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            prefix_queries_tokens=counters.prefix_queried_tokens,
            prefix_hits_tokens=counters.prefix_hit_tokens,
            preemptions=counters.preemptions,
            steps=self._steps,
            step_rows=self._rows,
            step_ns=self._step_ns,
            python_ns=self._python_ns,
            finished=dict(self._finished),
            healthy=self._failed_steps < _FAILED_STEPS,
            detail=self._detail if self._failed_steps >= _FAILED_STEPS else "",
        )

    # A step

    def _next_plan(self, emitted: list[Emitted]) -> StepPlan:
        """The plan in hand while it stays valid, else a new one with its copies made."""
        if self._plan is not None and self.scheduler.again(self._plan):
            self._runs += 1
            return self._plan
        plan = self.scheduler.plan()
        self._plan, self._input, self._runs = plan, None, 0
        moves: tuple[Preempt | Resume, ...] = (*plan.preempts, *plan.resumes)
        for move in moves:
            sequence = self._sequences[move.request_id]
            sequence.reset_table()
            try:
                self._copy(move)
            except Exception as error:
                self._fail(move.request_id, error, emitted)
        return plan

    def _copy(self, move: Preempt | Resume) -> None:
        if not move.device_blocks:
            return
        device, host = np.array(move.device_blocks, np.int32), np.array(move.host_blocks, np.int32)
        if isinstance(move, Preempt):
            self.runner.swap_out(device, host)
        else:
            self.runner.swap_in(host, device)

    def _execute(self, plan: StepPlan, emitted: list[Emitted]) -> Iterable[tuple[StepInput, StepResult]]:
        """Run the chunks; if that fails, halve them until the culprit stands alone, and fail it only."""
        try:
            if self._input is not None:
                step = self._assembler.advance(self._input)
            else:
                chunks = self._alive(plan.chunks)
                if not chunks:
                    return ()
                step = self._assembler.build(chunks)
            result = self._run(step)
        except Exception as error:
            self._input = None
            later = tuple([c._replace(context_tokens=c.context_tokens + self._runs) for c in plan.chunks])
            results = self._halves(self._alive(later), error, emitted)
            self._failed_steps = 0 if results else self._failed_steps + 1
            self._detail = describe(error)
            return results
        self._failed_steps = 0
        self._input = step
        return ((step, result),)

    def _halves(
        self, chunks: tuple[Chunk, ...], error: Exception, emitted: list[Emitted]
    ) -> list[tuple[StepInput, StepResult]]:
        """Results of those chunks that run, found by bisection after `error` broke all of them together."""
        if len(chunks) <= 1:
            for chunk in chunks:
                self._fail(chunk.request_id, error, emitted)
            return []
        results: list[tuple[StepInput, StepResult]] = []
        for part in (chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]):
            try:
                step = self._assembler.build(part)
                results.append((step, self._run(step)))
            except Exception as again:
                results += self._halves(part, again, emitted)
        return results

    def _run(self, step: StepInput) -> StepResult:
        begin_ns = self._clock.now_ns()
        try:
            return self.runner.step(step.batch, step.sampling)
        finally:
            self._step_ns += self._clock.now_ns() - begin_ns

    def _alive(self, chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
        return tuple([chunk for chunk in chunks if chunk.request_id in self._sequences])

    # Results

    def _take(
        self, output: Output, tokens: list[int], result: StepResult, emitted: list[Emitted], finished: list[int]
    ) -> None:
        """Hand a sequence what its rows gave; it may end here."""
        sequence = output.sequence
        try:
            if output.high - output.low > output.samples:
                self._score(output, result)
            if not output.samples:
                return
            row = output.high - 1
            text, reason, stopped = sequence.accept(tokens[row])
            scored = (_logprob(result, row, sequence.logprobs_wanted),) if sequence.logprobs_wanted >= 0 else None
            first = sequence.generated == 1
            if first:
                sequence.cached = self.scheduler.progress(sequence.id).cached
            prompt = sequence.prompt_logprobs if first else None
            delta = Delta(
                text, (tokens[row],), reason, scored, tuple(prompt) if prompt is not None else None,
                sequence.prompt_size, sequence.cached, sequence.generated, stopped,
            )  # fmt: skip
        except Exception as error:
            self._fail(sequence.id, error, emitted)
            return
        self._generated += 1
        emitted.append(Emitted(sequence.id, delta))
        if reason is not None:
            finished.append(sequence.id)
            self._finished[reason] += 1
            del self._sequences[sequence.id]

    def _score(self, output: Output, result: StepResult) -> None:
        scores = output.sequence.prompt_logprobs
        if scores is not None:
            wanted = max(0, output.sequence.logprobs_wanted)
            scores += [_logprob(result, row, wanted) for row in range(output.low, output.high - output.samples)]

    def _seal(self, plan: StepPlan) -> None:
        """Tell the scheduler the hashes of generated blocks that this step completed (it knows those of prompts)."""
        if not self.scheduler.kv.prefix_cache:
            return
        for chunk in plan.chunks:
            sequence = self._sequences.get(chunk.request_id)
            if sequence is not None:
                computed = chunk.context_tokens + self._runs + chunk.new_tokens
                for block_hash in sequence.new_hashes(computed, self.runner.block_tokens):
                    self.scheduler.seal(sequence.id, block_hash)

    def _fail(self, request_id: int, error: Exception, emitted: list[Emitted]) -> None:
        if not isinstance(error, MegalithError):
            log.error("request %d failed inside the engine", request_id, exc_info=error)
        delta = self._end(request_id, "error", describe(error))
        if delta is not None:
            emitted.append(Emitted(request_id, delta))

    def _end(self, request_id: int, reason: FinishReason, error: str | None = None) -> Delta | None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        self.scheduler.abort(request_id)
        self._finished[reason] += 1
        return sequence.end(reason, error)


def describe(error: Exception) -> str:
    """What a client may read of an error: our own words, or the kind of a failure that is not ours."""
    if isinstance(error, MegalithError):
        return str(error)
    return f"The engine failed on this request ({type(error).__name__}: {error})."


def _logprob(result: StepResult, row: int, wanted: int) -> TokenLogprob:
    token = int(result.tokens_N[row])
    if result.logprobs_N is None:
        raise EngineError(f"The runner gave no log probabilities for row {row}.")
    top: tuple[tuple[int, float], ...] = ()
    if wanted > 0 and result.top_ids_NK is not None and result.top_logprobs_NK is not None:
        ids, values = result.top_ids_NK[row, :wanted].tolist(), result.top_logprobs_NK[row, :wanted].tolist()
        top = tuple(zip(ids, values, strict=True))
    return TokenLogprob(token, float(result.logprobs_N[row]), top)
