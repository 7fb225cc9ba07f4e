"""Closed-loop clients on one instance, stepped and leapt exactly: the real scheduler, a step timer, simulated time.

Knows requests, the scheduler and a timer. Knows no published run and no engine by name.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megalith.cost.timer import Prompt, StepTimer
from megalith.policy.facts import Request
from megalith.policy.scheduler import Scheduler

TOKENIZE_PS = 1_700_000
"""Time of a prompt token in the server's front end, one request after the other: the `tokenizers` package with a BPE
vocabulary of 8,000 on one core of an AMD EPYC (Zen 3), measured there; HTTP and chat templates are not counted."""


class Wait(NamedTuple):
    """Prompts wait until so many tokens are there, for at most so many steps (TensorRT-LLM's batch_wait_*)."""

    tokens: int = 0
    steps: int = 0


NO_WAIT = Wait()


@dataclass
class Client:
    """One request of a closed loop."""

    request: Request
    output_tokens: int
    sent_ps: int = 0
    first_ps: int = -1
    last_ps: int = -1
    generated: int = 0
    finish_clock: int = -1


class ClosedLoop:
    """`concurrency` clients, each sending the next request when its last one is answered; stepped and leapt exactly."""

    def __init__(
        self,
        scheduler: Scheduler,
        timer: StepTimer,
        clients: Sequence[Client],
        wait: Wait = NO_WAIT,
        overlap: bool = False,
    ) -> None:
        """`overlap`: the engine plans a step when the one before begins, so who comes during a step misses the next."""
        self.scheduler, self.timer, self.wait, self.overlap = scheduler, timer, wait, overlap
        self.todo = deque(clients)
        self.by_id = {client.request.id: client for client in clients}
        self.on_the_way: deque[tuple[int, Client]] = deque()
        """(when the tokenizer is done with it, request): the engine has begun its next step before that."""
        self.tokenizer_ps = 0
        self.held: list[Client] = []
        self.waited = self.now_ps = self.planned_ps = self.clock = 0
        self.ends: list[tuple[int, int]] = []

    def run(self, concurrency: int) -> None:
        """Until every request is answered."""
        for _ in range(min(concurrency, len(self.todo))):
            self._send()
        while True:
            self._arrive()
            self._release()
            plan = self.scheduler.plan()
            if plan.empty:
                if not self.on_the_way:
                    return
                self.planned_ps = self.now_ps = max(self.now_ps, self.on_the_way[0][0])
                continue
            self.planned_ps = self.now_ps
            for preempt in plan.preempts:
                client = self.by_id[preempt.request_id]
                if client.finish_clock >= 0:
                    client.generated = client.output_tokens - (client.finish_clock - self.clock)
                    client.finish_clock = -1
            if plan.listed:
                chunks = [Prompt(chunk.new_tokens, chunk.context_tokens, chunk.samples) for chunk in plan.listed]
                self.now_ps += self.timer.step_ps(chunks, plan.decodes, plan.decode_context_sum, 0)
                steps = 1
            else:
                line = self.timer.decode_line(plan.decodes, plan.decode_context_sum, 0)
                steps = min(plan.repeats + 1, line.steps, self._next_end() - self.clock)
                if self.on_the_way:
                    steps = 1
                if self.held:
                    steps = min(steps, self.wait.steps - self.waited)
                self.now_ps += line.total_ps(steps)
            self.clock += steps if plan.decodes else 0
            self.waited += steps if self.held else 0
            done = self._ended()
            for chunk in plan.listed:
                if chunk.samples:
                    done += self._sampled(self.by_id[chunk.request_id])
            self.scheduler.complete(plan, [client.request.id for client in done], steps)
            for client in done:
                client.last_ps = self.now_ps
                self._send()

    def _send(self) -> None:
        if self.todo:
            client = self.todo.popleft()
            client.sent_ps = self.now_ps
            begin_ps = max(self.now_ps, self.tokenizer_ps)
            self.tokenizer_ps = begin_ps + client.request.prompt_tokens * TOKENIZE_PS
            self.on_the_way.append((self.tokenizer_ps, client))

    def _arrive(self) -> None:
        known_ps = self.planned_ps if self.overlap else self.now_ps
        while self.on_the_way and self.on_the_way[0][0] <= known_ps:
            self.held.append(self.on_the_way.popleft()[1])

    def _release(self) -> None:
        """Hand requests to the scheduler, unless the engine waits for more of them."""
        if not self.held:
            return
        tokens = sum(client.request.prompt_tokens for client in self.held) + self.scheduler.num_running
        if tokens >= self.wait.tokens or self.waited >= self.wait.steps or not self.scheduler.num_running:
            for client in self.held:
                self.scheduler.add(client.request)
            self.held.clear()
            self.waited = 0

    def _next_end(self) -> int:
        while self.by_id[self.ends[0][1]].finish_clock != self.ends[0][0]:
            heapq.heappop(self.ends)
        return self.ends[0][0]

    def _ended(self) -> list[Client]:
        done = []
        while self.ends and self.ends[0][0] <= self.clock:
            clock, key = heapq.heappop(self.ends)
            if self.by_id[key].finish_clock == clock:
                self.by_id[key].finish_clock = -1
                done.append(self.by_id[key])
        return done

    def _sampled(self, client: Client) -> list[Client]:
        """A prompt's last chunk gave a token."""
        client.generated += 1
        if client.first_ps < 0:
            client.first_ps = self.now_ps
        if client.generated == client.output_tokens:
            return [client]
        client.finish_clock = self.clock + client.output_tokens - client.generated
        heapq.heappush(self.ends, (client.finish_clock, client.request.id))
        return []
