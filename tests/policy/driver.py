"""An executor for tests that keeps the content of every KV slot, so that a wrong block shows as a wrong content.

The "KV" of position p is a number made from all tokens up to p. The next token is made from the KV of the last
position, so equal prompts get equal outputs, and a request's tokens do not depend on its batch: as in greedy decoding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megalith.policy.facts import Request, RequestId, StepPlan
from megalith.policy.hashing import BlockHasher, block_hashes
from megalith.policy.scheduler import Scheduler

MASK = (1 << 61) - 1
VOCAB = 5


def mix(parent: int, token: int) -> int:
    return (parent * 1_000_003 + token * 7919 + 12345) & MASK


def reference_output(prompt: list[int], count: int) -> list[int]:
    """What a request must produce, computed with no scheduler at all."""
    state = 0
    for token in prompt:
        state = mix(state, token)
    output = []
    for _ in range(count):
        output.append((state >> 7) % VOCAB)
        state = mix(state, output[-1])
    return output


@dataclass
class Live:
    request: Request
    prompt: list[int]
    wanted: int
    tokens: list[int]
    hasher: BlockHasher
    hashes: list[int] = field(default_factory=list)


class Executor:
    """Runs the plans of one scheduler for real, one at a time, and checks every rule that a plan must keep."""

    def __init__(self, scheduler: Scheduler, seal: bool = True) -> None:
        self.scheduler = scheduler
        self.seal = seal
        kv = scheduler.kv
        self.device = [[-1] * kv.block_tokens for _ in range(kv.num_blocks)]
        self.host = [[-1] * kv.block_tokens for _ in range(kv.num_host_blocks)]
        self.live: dict[RequestId, Live] = {}
        self.outputs: dict[RequestId, list[int]] = {}
        self.steps = 0

    def add(
        self,
        request_id: int,
        prompt: list[int],
        max_new: int,
        wanted: int | None = None,
        priority: int = 0,
        at: int = 0,
    ) -> None:
        """`wanted` is the true output length (a stop token), never told to the scheduler."""
        block_tokens = self.scheduler.kv.block_tokens
        hashes = block_hashes(prompt, block_tokens) if self.scheduler.kv.prefix_cache else ()
        request = Request(request_id, at, len(prompt), max_new, priority, hashes)
        self.scheduler.add(request)
        hasher = BlockHasher(block_tokens)
        live = Live(request, prompt, wanted or max_new, list(prompt), hasher)
        live.hashes += hasher.feed(prompt)
        self.live[request_id] = live

    def abort(self, request_id: int) -> None:
        assert self.scheduler.abort(request_id)
        del self.live[request_id]

    def step(self) -> StepPlan:
        """Plan, run, complete, seal. Returns the plan; an empty one is not run."""
        plan = self.scheduler.plan()
        if plan.chunks:
            self.run(plan)
        else:
            assert not self.live, "requests are live but nothing is planned"
        return plan

    def run(self, plan: StepPlan) -> list[int]:
        finished = self.forward(plan)
        self.scheduler.complete(plan, finished)
        if self.seal:
            for request_id in [chunk.request_id for chunk in plan.chunks if chunk.request_id in self.live]:
                for index in self.scheduler.unsealed(request_id):
                    self.scheduler.seal(request_id, self.live[request_id].hashes[index])
        return finished

    def forward(self, plan: StepPlan) -> list[int]:
        """Copies and rows of one run; returns the ids that are done."""
        self.steps += 1
        self.copy(plan)
        self.check_plan(plan)
        return [chunk.request_id for chunk in plan.chunks if self._compute(chunk.request_id, chunk.new_tokens)]

    def copy(self, plan: StepPlan) -> None:
        """What the plan moves between device and host."""
        for preempt in plan.preempts:
            for source, target in zip(preempt.device_blocks, preempt.host_blocks, strict=True):
                self.host[target] = list(self.device[source])
        for resume in plan.resumes:
            for source, target in zip(resume.host_blocks, resume.device_blocks, strict=True):
                self.device[target] = list(self.host[source])

    def _compute(self, request_id: int, count: int) -> bool:
        live, block_tokens = self.live[request_id], self.scheduler.kv.block_tokens
        table = self.scheduler.block_table(request_id)
        context, known, _ = self.scheduler.progress(request_id)
        assert known == len(live.tokens)
        state = 0
        for position in range(context + count):
            block, slot = table[position // block_tokens], position % block_tokens
            state = mix(state, live.tokens[position])
            if position < context:
                assert self.device[block][slot] == state, f"request {request_id} reads a wrong KV at {position}"
            else:
                self.device[block][slot] = state
        if context + count < known:
            return False
        live.tokens.append((state >> 7) % VOCAB)
        live.hashes += live.hasher.feed([live.tokens[-1]])
        if len(live.tokens) - len(live.prompt) < live.wanted:
            return False
        self.outputs[request_id] = live.tokens[len(live.prompt) :]
        del self.live[request_id]
        return True

    def check_plan(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        kv, limits = scheduler.kv, scheduler.limits
        ids = [chunk.request_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids) <= limits.max_sequences
        assert scheduler.num_running <= limits.max_sequences
        assert plan.repeats == 0 or all(chunk.new_tokens == 1 and chunk.samples for chunk in plan.chunks)
        assert plan.repeats == 0 or not (plan.preempts or plan.resumes), "the copies would be made again"
        holders = Counter(block for request_id in self.live for block in set(scheduler.block_table(request_id)))
        for chunk in plan.chunks:
            computed, known, _ = scheduler.progress(chunk.request_id)
            table = scheduler.block_table(chunk.request_id)
            assert chunk.new_tokens >= 1
            assert chunk.samples == (computed + chunk.new_tokens == known)
            assert len(table) * kv.block_tokens >= computed + chunk.new_tokens
            assert len(set(table)) == len(table)
            first, last = computed // kv.block_tokens, (computed + chunk.new_tokens - 1) // kv.block_tokens
            shared = [block for block in table[first : last + 1] if holders[block] != 1]
            assert not shared, f"request {chunk.request_id} writes blocks {shared} that others hold"
        scheduler.check_integrity()

    def drain(self, limit: int = 20_000) -> None:
        """Step until nothing is left."""
        for _ in range(limit):
            if not self.step().chunks:
                return
        raise AssertionError(f"still {len(self.live)} requests after {limit} steps")
