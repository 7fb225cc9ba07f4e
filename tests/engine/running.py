"""Running prompts through a synchronous engine over any runner, for tests that compare tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megalith.base.clock import MonotonicClock
from megalith.engine.api import Delta
from megalith.engine.batch import Runner
from megalith.engine.engine import Engine
from megalith.engine.params import SamplingParams
from megalith.engine.sequence import Admitted
from megalith.engine.service import merge
from megalith.model.tokenizer import Tokenizer
from megalith.policy.batching import by_name
from megalith.policy.facts import PreemptMode
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler


@dataclass
class Way:
    """How an engine schedules."""

    policy: str = "splitfuse"
    budget: int = 256
    sequences: int = 32
    blocks: int | None = None
    """Fewer than the runner has: preemption."""
    preempt: PreemptMode = "recompute"
    prefix: bool = False
    arrivals: tuple[int, ...] = field(default=())
    """Steps before each request comes; empty: all at once."""


def make_engine(runner: Runner, way: Way) -> Engine:
    blocks = way.blocks or runner.num_blocks
    host = runner.num_host_blocks if way.preempt == "swap" else 0
    kv = KvAccount(blocks, runner.block_tokens, host, way.prefix)
    limits = Limits(max_sequences=way.sequences, preempt=way.preempt)
    return Engine(runner, Scheduler(by_name(way.policy, way.budget), kv, limits), MonotonicClock(), salt=1)


def run_prompts(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams, way: Way
) -> list[Delta]:
    """Each prompt's whole output as one delta, in order."""
    deltas: dict[int, list[Delta]] = {i: [] for i in range(len(prompts))}

    def step() -> None:
        for number, delta in engine.step():
            deltas[number].append(delta)

    for number, prompt in enumerate(prompts):
        for _ in range(way.arrivals[number] if way.arrivals else 0):
            step()
        new = params.max_tokens or 16
        ids = np.array(prompt, np.int32)
        engine.add(
            Admitted(
                number, ids, params, new, params.seed or number, tokenizer.eos_ids, tokenizer.stream(), None, 0, number
            )
        )
    for _ in range(100_000):
        if not engine.has_work:
            break
        step()
    engine.scheduler.check_integrity()
    assert engine.stats().kv_blocks_used == 0
    return [merge(deltas[number]) for number in range(len(prompts))]
