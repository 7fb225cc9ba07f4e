"""The interpreter's share of a step: at most 0.3 ms for one request, 2 ms for 32. Processor time of this thread, so
that a busy machine does not count."""

from __future__ import annotations

import time

import numpy as np
import pytest

from megalith.base.clock import Clock
from megalith.engine.engine import Engine
from megalith.engine.params import SamplingParams
from megalith.engine.sequence import Admitted
from megalith.model.open import OpenModel
from megalith.policy.batching import by_name
from megalith.policy.kv import KvAccount
from megalith.policy.scheduler import Limits, Scheduler
from tests.engine.ledger import LedgerRunner


class ThreadClock(Clock):
    """Processor time of the calling thread."""

    def now_ns(self) -> int:
        return time.thread_time_ns()


PLAIN = SamplingParams(temperature=0, ignore_eos=True)
RICH = SamplingParams(
    temperature=0.8, top_p=0.9, frequency_penalty=0.4, logprobs=5, stop=("\n\nUser:",), ignore_eos=True
)


@pytest.mark.parametrize(
    ("batch", "params", "limit_ms"), [(1, PLAIN, 0.3), (1, RICH, 0.3), (32, PLAIN, 2.0), (32, RICH, 2.0)]
)
def test_python_cost_of_a_decode_step(
    tiny_model: OpenModel, batch: int, params: SamplingParams, limit_ms: float
) -> None:
    runner = LedgerRunner(block_tokens=16, num_blocks=2000)
    scheduler = Scheduler(by_name("splitfuse", 256), KvAccount(2000, 16), Limits(max_sequences=64))
    engine = Engine(runner, scheduler, ThreadClock())
    rng = np.random.default_rng(0)
    for number in range(batch):
        prompt = rng.integers(3, 97, 128).astype(np.int32)
        stream = tiny_model.tokenizer.stream()
        engine.add(Admitted(number, prompt, params, 200 + 3 * number, number, frozenset({2}), stream))
    costs_ms = []
    while engine.has_work:
        before, decodes = engine.stats(), engine.stats().running == batch
        engine.step()
        if decodes and len(engine._sequences) == batch:
            costs_ms.append((engine.stats().python_ns - before.python_ns) / 1e6)
    median = float(np.median(costs_ms))
    print(
        f"batch {batch}: median {median:.3f} ms, 95th {np.percentile(costs_ms, 95):.3f} ms over {len(costs_ms)} steps"
    )
    assert len(costs_ms) > 100
    assert median < limit_ms
